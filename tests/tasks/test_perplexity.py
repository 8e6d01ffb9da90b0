import copy
import math

import pytest
import tiny
import torch
from transformers import GPT2LMHeadModel

from kronecker_transformers.tasks.perplexity import NORMALISATIONS, perplexity

WORDS = tiny.TEXT.split()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return (
        tiny.teacher(GPT2LMHeadModel, dtype=torch.float64),
        tiny.gpt2_tokenizer(tmp_path_factory.mktemp("tokenizer")),
    )


def running_text(tokenizer, tokens):
    """A text of exactly so many tokens."""
    ids = tokenizer(" ".join(WORDS * 20)).input_ids[:tokens]
    text = tokenizer.decode(ids)
    assert tokenizer(text).input_ids == ids
    return text


def context_of(target, window, stride):
    """Where the first window that holds the target begins."""
    begin = 0
    while begin + window <= target:
        begin += stride
    return begin


@torch.no_grad()
def plain_nats(model, tokenizer, text, window, stride):
    """Every token by itself, from exactly its context."""
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    total = 0.0
    for target in range(1, len(ids)):
        context = ids[context_of(target, window, stride) : target]
        probabilities = model(torch.tensor([context])).logits[0, -1].softmax(-1)
        total -= math.log(float(probabilities[ids[target]]))
    return total


@pytest.mark.parametrize(("window", "stride"), [(12, 5), (12, 1), (13, 12), (2, 1), (40, 20)])
@pytest.mark.parametrize("tokens", [1, 6, 11, 12, 13, 29, 61])
def test_perplexity_is_that_of_a_plain_loop(window, stride, tokens, language_model):
    model, tokenizer = language_model
    text = running_text(tokenizer, tokens)
    expected = plain_nats(model, tokenizer, text, window, stride)
    for batch_size in (1, 3):
        found = perplexity(model, tokenizer, text, window=window, stride=stride, batch_size=batch_size)
        assert found.nats == pytest.approx(expected, rel=1e-9)
        assert (found.tokens, found.words) == (tokens, len(text.split()))
        assert found.per_token == pytest.approx(math.exp(expected / tokens), rel=1e-9)
        assert found.per_word == pytest.approx(math.exp(expected / len(text.split())), rel=1e-9)


def test_perplexity_tells_its_protocol_and_evaluates(language_model):
    model, tokenizer = language_model
    model.train()
    text = "the fox jumps , the dog knows"
    found = [perplexity(model, tokenizer, text, window=12, stride=5, normalisation="wikitext") for _ in range(2)]
    assert found[0] == found[1]  # no dropout
    assert model.training
    model.eval()
    plain = perplexity(model, tokenizer, "the fox jumps, the dog knows", window=12, stride=5)
    assert found[0].nats == plain.nats
    assert (found[0].words, plain.words) == (7, 6)  # words are those of the text as it is given
    assert found[0].protocol == "window 12, stride 5, text normalisation: wikitext"
    assert str(plain) == (
        f"perplexity {plain.per_token:.2f} per token, {plain.per_word:.2f} per word "
        "(window 12, stride 5, text normalisation: none)"
    )


def test_perplexity_in_half_precision(language_model):
    model, tokenizer = language_model
    text = running_text(tokenizer, 30)
    half = tiny.teacher(GPT2LMHeadModel, dtype=torch.bfloat16)
    expected = perplexity(model, tokenizer, text, window=12, stride=5).nats
    assert perplexity(half, tokenizer, text, window=12, stride=5).nats == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("tokenised", "expected"),
    [
        ("a well @-@ known 1 @,@ 000 and 2 @.@ 5", "a well-known 1,000 and 2.5"),
        ("one , two . Three ; four : five ! six ?", "one, two. Three; four: five! six?"),
        ("it ( in part ) is [ or was ] so .", "it (in part) is [or was] so."),
        ("50 % of $ 5 and £ 6", "50% of $5 and £6"),
        (
            "he 's what they 'd say , isn 't it , and do n't we know",
            "he's what they'd say, isn't it, and don't we know",
        ),
        ('he said " yes " and " no " .', 'he said "yes" and "no".'),
        ('an inch is 1 " long \n and " this " too', 'an inch is 1 " long\nand "this" too'),
        (" = Title = \n \n text \n", "= Title =\n\ntext\n"),
        ("a .22 rifle and ... dots", "a .22 rifle and ... dots"),
        ('plain (text) stays, "as it" is: 50% don\'t', 'plain (text) stays, "as it" is: 50% don\'t'),
    ],
)
def test_wikitext_normalisation(tokenised, expected):
    assert NORMALISATIONS["wikitext"](tokenised).strip(" ") == expected
    assert NORMALISATIONS["none"](tokenised) == tokenised


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 41}, "window=41 must be from 2 to the model's maximum of 40 tokens; choose another"),
        ({"window": 1, "stride": 1}, "window=1 must be from 2"),
        ({"stride": 0}, "stride=0 must be at least 1 and below window=12; choose another"),
        ({"stride": 12}, "stride=12 must be at least 1 and below window=12"),
        ({"normalisation": "lower"}, "normalisation='lower' is not known; choose one of none, wikitext"),
        ({"text": ""}, "text has 0 words"),
        ({"text": " \n"}, "text has 0 words, so there is nothing to predict; give another"),
    ],
)
def test_perplexity_refuses(options, message, language_model):
    model, tokenizer = language_model
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, **{"text": "the fox", "window": 12, "stride": 5, **options})


def test_a_text_needs_a_token_to_begin_with(language_model):
    model, tokenizer = language_model
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has neither a bos nor an eos token for the text to begin with"):
        perplexity(model, tokenizer, "the fox", window=12, stride=5)
