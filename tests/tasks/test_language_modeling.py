import itertools
import json
import math

import pytest
import tiny
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import BertTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from kronecker_transformers.tasks.language_modeling import block_examples, masked_examples, sentence_examples
from kronecker_transformers.tasks.text import WHOLE, Share, TextSource

WORDS = tiny.TEXT.split()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def bert_tokenizer(tmp_path):
    return tiny.bert_tokenizer(tmp_path)


@pytest.fixture
def gpt2_tokenizer(tmp_path):
    return tiny.gpt2_tokenizer(tmp_path)


def test_sentence_examples(bert_tokenizer, tmp_path):
    source = TextSource((write(tmp_path / "text.txt", "the quick fox\n\n" + "dog " * 20 + "\nfox\n"),))
    found = list(sentence_examples(source, bert_tokenizer, 6))
    assert [bert_tokenizer.decode(example["input_ids"]) for example in found] == [
        "[CLS] the quick fox [SEP]", "[CLS] dog dog dog dog [SEP]", "[CLS] fox [SEP]",
    ]  # fmt: skip


@pytest.mark.parametrize("length", [5, 8, 33])
@pytest.mark.parametrize("blank", [True, False])
def test_blocks_hold_every_token_in_order(length, blank, gpt2_tokenizer, tmp_path):
    parts = [["the quick brown fox", "a lazy dog"], ["what a model"], [" ".join(WORDS)] * 5, ["the dog knows"]]
    text = ("\n\n" if blank else "\n").join("\n".join(part) for part in parts)
    source = TextSource((write(tmp_path / "text.txt", text),))
    found = list(block_examples(source, gpt2_tokenizer, length))
    expected = []
    if blank:
        for part in parts:
            expected += [*gpt2_tokenizer("\n".join(part)).input_ids, gpt2_tokenizer.eos_token_id]
    else:  # one running text
        expected = gpt2_tokenizer(text + "\n").input_ids
    assert expected.count(gpt2_tokenizer.eos_token_id) >= 4 * blank
    assert (
        list(itertools.chain.from_iterable(block["input_ids"] for block in found))
        == (expected[: len(expected) // length * length])
    )
    assert len(found) == len(expected) // length > 1
    for block in found:
        assert block["labels"] == block["input_ids"]
        assert block["labels"] is not block["input_ids"]
        assert block["attention_mask"] == [1] * length


@pytest.mark.parametrize(
    "lines", [["the fox jumps. the lazy dog! a model?"], ["the fox jumps.", "the lazy dog!", "a model?"]]
)
def test_sentences_keep_the_space_before_them(lines, tmp_path):
    words = Tokenizer(BPE())
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    words.train_from_iterator(lines, BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, cls_token="<s>", sep_token="</s>")
    source = TextSource((write(tmp_path / "text.txt", "\n".join([*lines, "", "a dog"])),))
    found = list(masked_examples(source, tokenizer, 12, next_sentence=False, short=0))
    ids = itertools.chain.from_iterable(example["input_ids"] for example in found)
    assert tokenizer.decode(list(ids), skip_special_tokens=True) == "the fox jumps. the lazy dog! a model?a dog"


DOCUMENTS, LINES = 40, 12


@pytest.fixture
def marked(tmp_path):
    """A tokenizer and documents in which every word is unique: word ``d<document>x<place>``."""
    texts, words, generator = [], [], torch.Generator().manual_seed(3)
    for d in range(DOCUMENTS):
        sizes = torch.randint(1, 9, (LINES,), generator=generator).tolist()
        sizes[4] = 60 if d % 5 == 0 else sizes[4]  # longer than a whole example
        names = iter([f"d{d}x{place}" for place in range(sum(sizes))])
        lines = [" ".join(itertools.islice(names, size)) for size in sizes]
        words += " ".join(lines).split()
        texts.append("\n".join(lines))
    vocabulary = write(tmp_path / "words.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizer(vocabulary), TextSource((write(tmp_path / "marked.txt", "\n\n".join(texts)),)), words


def segments(example, tokenizer):
    """The words of each segment, after a check of everything beside them."""
    ids = example["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    ends = [place for place, token in enumerate(tokens) if token == "[SEP]"]
    parts = [tokens[start + 1 : end] for start, end in itertools.pairwise([0, *ends])]
    expected = [0] * (ends[0] + 1) + [1] * (len(tokens) - ends[0] - 1)
    assert example["token_type_ids"] == expected
    assert example["attention_mask"] == [1] * len(ids)
    assert example["special_tokens_mask"] == [int(token in ("[CLS]", "[SEP]")) for token in tokens]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == example["special_tokens_mask"]
    assert all(parts)
    return parts


def placed(word):
    document, _, place = word[1:].partition("x")
    return int(document), int(place)


def assert_follow_each_other(words):
    found = list(map(placed, words))
    assert found == [(found[0][0], found[0][1] + i) for i in range(len(found))]


@pytest.mark.parametrize(("length", "short"), [(8, 0.0), (32, 0.1), (32, 1.0), (47, 0.0)])
def test_next_sentences_are_what_their_label_says(length, short, marked):
    tokenizer, source, words = marked
    labels, seen = [], []
    for example in masked_examples(source, tokenizer, length, True, short=short):
        assert len(example["input_ids"]) <= length
        first, second = segments(example, tokenizer)
        assert_follow_each_other(first)
        assert_follow_each_other(second)
        seen += first
        labels.append(example["next_sentence_label"])
        if labels[-1]:
            assert placed(first[0])[0] != placed(second[0])[0]
        else:
            assert_follow_each_other([*first, *second])
            seen += second
    assert len(labels) > 60
    assert abs(sum(labels) / len(labels) - 0.5) < 4 * 0.5 / math.sqrt(len(labels))
    assert labels[:20].count(1) > 2  # from the first document on
    missed = set(words) - set(seen)
    assert len(seen) == len(set(seen))  # nothing comes twice, but as a false next sentence
    assert len(missed) <= DOCUMENTS * 3  # only single words at the end of something


def test_examples_without_next_sentences_hold_every_word_in_order(marked):
    tokenizer, source, words = marked
    few = {}
    for short in (0.0, 1.0):
        found, lengths = [], []
        for example in masked_examples(source, tokenizer, 32, False, short=short):
            assert "next_sentence_label" not in example
            (first,) = segments(example, tokenizer)
            assert_follow_each_other(first)
            found += first
            lengths.append(len(example["input_ids"]))
        assert found == words
        assert max(lengths) in (31, 32)
        few[short] = sum(length < 14 for length in lengths)
    assert few[1.0] > 2 * few[0.0]


def test_long_lines_are_divided_at_the_ends_of_sentences(bert_tokenizer, tmp_path):
    line = "the fox jumps over. the dog knows? a model learns what a model knows and jumps"
    source = TextSource((write(tmp_path / "text.txt", line),))
    found = [bert_tokenizer.decode(e["input_ids"]) for e in masked_examples(source, bert_tokenizer, 14, False, short=0)]
    assert found == [
        "[CLS] the fox jumps over [UNK] the dog knows [UNK] [SEP]",
        "[CLS] a model learns what a model knows and jumps [SEP]",
    ]


def test_shares_of_blocks(gpt2_tokenizer, tmp_path):
    """Of a running text, every share has its own blocks of the whole; of documents, the blocks of its own documents."""
    lines = [f"line {i} of the text" for i in range(60)]
    running, documents = tmp_path / "running.txt", tmp_path / "documents.txt"
    running.write_text("\n".join(lines))
    documents.write_text("\n\n".join(lines))

    def blocks(path, share=WHOLE):
        return [example["input_ids"] for example in block_examples(TextSource((str(path),)), gpt2_tokenizer, 8, share)]

    parts = [blocks(running, Share(index, 3)) for index in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(blocks(running))
    for index in range(3):
        share = Share(index, 3)
        own = TextSource((str(documents),)).share(share).documents()
        whole = []
        for (text,) in own:
            whole += [*gpt2_tokenizer(text).input_ids, gpt2_tokenizer.eos_token_id]
        assert blocks(documents, share) == [whole[i : i + 8] for i in range(0, len(whole) // 8 * 8, 8)]


def test_masked_examples_repeat_with_their_seed(marked):
    tokenizer, source, _ = marked
    one, again, other = (list(masked_examples(source, tokenizer, 32, True, seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_lines_without_documents_are_examples_by_themselves(bert_tokenizer, tmp_path):
    source = TextSource((write(tmp_path / "text.txt", "the quick fox\na dog\n"),))
    found = [bert_tokenizer.decode(e["input_ids"]) for e in masked_examples(source, bert_tokenizer, 16, False)]
    assert found == ["[CLS] the quick fox [SEP]", "[CLS] a dog [SEP]"]


def test_masked_examples_refuse(bert_tokenizer, tmp_path):
    lines = TextSource((write(tmp_path / "lines.txt", "the fox\na dog\n"),))
    one = TextSource((write(tmp_path / "one.jsonl", json.dumps({"text": "the fox\na dog"})),))
    cases = [
        (lines, 16, 0.1, r"text '.*lines.txt' has no documents, so .*; separate documents by a blank line"),
        (one, 16, 0.1, r"only 1 document, so no false next sentences; set next_sentence=False"),
        (one, 7, 0.1, r"length=7 must be at least 8 tokens"),
        (one, 16, 1.1, r"short=1.1 is a share, from 0 to 1"),
    ]
    for source, length, short, message in cases:
        with pytest.raises(ValueError, match=message):
            list(masked_examples(source, bert_tokenizer, length, True, short=short))


def test_the_collator_masks_words_and_keeps_the_rest(marked):
    tokenizer, source, _ = marked
    examples = list(masked_examples(source, tokenizer, 32, True))
    collator = DataCollatorForLanguageModeling(tokenizer)
    batch, again = collator(examples), collator(examples)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "next_sentence_label", "labels"}
    replaced = masked = kept = total = 0
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert batch["next_sentence_label"][row] == example["next_sentence_label"]
        assert batch["token_type_ids"][row].tolist() == example["token_type_ids"] + [0] * (len(ids) - size)
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (len(ids) - size)
        for place, (original, special) in enumerate(
            zip(example["input_ids"], example["special_tokens_mask"], strict=True)
        ):
            if labels[place] == -100:
                assert ids[place] == original
            else:
                assert not special
                assert labels[place] == original
                masked += int(ids[place] == tokenizer.mask_token_id)
                kept += int(ids[place] == original)
                replaced += int(ids[place] not in (original, tokenizer.mask_token_id))
        assert (labels[size:] == -100).all()
        total += size - sum(example["special_tokens_mask"])
    chosen = masked + kept + replaced
    assert chosen / total == pytest.approx(0.15, abs=0.04)
    assert masked / chosen == pytest.approx(0.8, abs=0.12)
    assert kept > 0
    assert replaced > 0
    assert not torch.equal(batch["labels"], again["labels"])
