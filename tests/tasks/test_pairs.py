import pytest
import tiny
from transformers import GPT2Tokenizer

from kronecker_transformers.tasks.labels import match_labels
from kronecker_transformers.tasks.pairs import encode_texts

WORDS = tiny.TEXT.split()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("first", "second"), [(3, 4), (40, 3), (3, 40), (40, 40), (9, 8)])
@pytest.mark.parametrize("length", [10, 11, 24])
def test_pairs_keep_their_separator_and_a_fair_share(family, first, second, length, tmp_path):
    tokenizer = (tiny.bert_tokenizer if family == "bert" else tiny.gpt2_tokenizer)(tmp_path)
    texts = [" ".join(["dog"] * first)], [" ".join(["fox"] * second)]
    (ids,) = encode_texts(tokenizer, *texts, length)["input_ids"]
    assert len(ids) <= length
    middle = [tokenizer.sep_token_id] if family == "bert" else [tokenizer.eos_token_id]  # it knows no line break
    place = next(i for i in range(len(ids)) if ids[i : i + len(middle)] == middle)
    one, other = ids[:place], ids[place + len(middle) :]
    if family == "bert":
        one, other = one[1:], other[:-1]
        assert ids[-1] == tokenizer.sep_token_id
    whole = [tokenizer(text, add_special_tokens=False).input_ids for (text,) in texts]
    assert whole[0][: len(one)] == one
    assert whole[1][: len(other)] == other
    room = length - (3 if family == "bert" else len(middle))
    assert len(one) + len(other) == min(room, len(whole[0]) + len(whole[1]))
    for kept, own in ((one, whole[0]), (other, whole[1])):
        assert len(kept) >= min(len(own), room // 2)


def test_one_text_is_what_the_tokenizer_says(tmp_path):
    tokenizer = tiny.bert_tokenizer(tmp_path)
    assert encode_texts(tokenizer, WORDS, length=5) == dict(tokenizer(WORDS, truncation=True, max_length=5))


def test_a_text_without_tokens(tmp_path):
    tokenizer = tiny.gpt2_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="text '' gives no token; every row needs one"):
        encode_texts(tokenizer, ["dog", ""])
    assert encode_texts(tokenizer, [""], ["dog"])["input_ids"][0]


NLI = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("teacher", "task", "ids", "certain"),
    [
        (("CONTRADICTION", "ENTAILMENT", "NEUTRAL"), NLI, (1, 2, 0), True),
        (("not entailment", "Entailment"), ("entailment", "not_entailment"), (1, 0), True),
        (("entailment", "not-entailment"), ("entailment", "not_entailment"), (0, 1), True),
        (("LABEL_0", "LABEL_1", "LABEL_2"), NLI, (0, 1, 2), False),
        (("negative", "positive"), ("0", "1"), (0, 1), False),
        (("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1"), (1, 0), True),
        (("1", "0", "-1"), ("-1", "0", "1"), (2, 1, 0), True),
        (("A-", "A", "B"), ("A", "A-", "B"), (1, 0, 2), True),
        (("LABEL_0", "label 1"), ("-1", "1"), (0, 1), False),
    ],
)
def test_labels_are_matched(teacher, task, ids, certain):
    assert match_labels(teacher, task) == (ids, certain)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (("entailment", "neutral"), r"has 2 labels \(entailment, neutral\), where the task has 3"),
        (
            ("yes", "maybe", "no"),
            "has the labels yes, maybe, no, where the task has entailment, neutral, contradiction; give",
        ),
    ],
)
def test_other_labels(teacher, message):
    with pytest.raises(ValueError, match=message):
        match_labels(teacher, NLI)


def test_real_gpt2_divides_by_a_line_break():
    """Its vocabulary has one, as the byte-level alphabet of every real one."""
    tokenizer = GPT2Tokenizer(vocab={"Ċ": 0, "a": 1, "b": 2, "<|endoftext|>": 3}, merges=[])
    assert encode_texts(tokenizer, ["aab"], ["ba"], 5)["input_ids"] == [[1, 1, 0, 2, 1]]
