import itertools
import json
import logging
import math
import re
from functools import partial

import datasets
import pytest
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from kronecker_transformers.tasks.language_modeling import (
    TextSource,
    TextStream,
    block_examples,
    length_group,
    masked_examples,
    sentence_examples,
    training_steps,
)

WORDS = tiny.TEXT.split()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def documents(*names, **options):
    return list(TextSource(names, **options).documents())


# ---- sources ----


@pytest.mark.parametrize(
    ("text", "expected", "has_documents"),
    [
        ("a b\nc\n\nd\n", [["a b", "c"], ["d"]], True),
        ("\n\na\n \t\n\n\n b \nc\n\n\n", [["a"], ["b", "c"]], True),
        ("a\nb\nc", [["a"], ["b"], ["c"]], False),
        ("\n\na\nb\n\n\n", [["a"], ["b"]], False),  # blank lines only before and after the text
        ("\ufeffa\r\n\r\nb\r\n", [["a"], ["b"]], True),
        ("", [], False),
    ],
)
@pytest.mark.parametrize("name", ["text.txt", "text", "text.wiki"])
def test_documents_of_a_text_file(text, expected, has_documents, name, tmp_path):
    source = TextSource((write(tmp_path / name, text),))
    assert list(source.documents()) == list(source.documents()) == expected
    assert source.has_documents() == has_documents


def test_a_blank_line_that_comes_late_does_not_make_documents(tmp_path):
    file = write(tmp_path / "late.txt", "a\n" * 10_001 + "\nb\n")
    assert not TextSource((file,)).has_documents()
    assert documents(file) == [["a"]] * 10_001 + [["b"]]


def test_several_files_have_documents_if_each_has(tmp_path):
    with_documents = write(tmp_path / "with.txt", "a\n\nb c\n")
    without = write(tmp_path / "without.txt", "d\ne\n")
    assert documents(with_documents, without) == [["a"], ["b c"], ["d"], ["e"]]
    assert TextSource((with_documents, with_documents)).has_documents()
    assert not TextSource((with_documents, without)).has_documents()


ROWS = [{"id": 1, "text": " one line \n\nand another"}, {"id": 2, "text": None}, {"id": 3, "text": "2020-01-01"}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSONL", ".csv", ".parquet"])
def test_documents_of_a_table(suffix, tmp_path):
    file = tmp_path / f"table{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(file)
    elif suffix == ".csv":
        file.write_text('id,text\n1," one line \n\nand another"\n2,\n3,2020-01-01\n')
    else:
        file.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    source = TextSource((str(file),))
    assert list(source.documents()) == [["one line", "and another"], ["2020-01-01"]]
    assert source.has_documents()
    assert documents(str(file), column="id") == [["1"], ["2"], ["3"]]
    with pytest.raises(ValueError, match=r"column 'body' is not in '.*', which has \['id', 'text'\]; name the one"):
        documents(str(file), column="body")


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = TextSource(("wikimedia/wikipedia:20231101.en",))
    assert source.has_documents()
    assert list(source.documents()) == [["one line", "and another"], ["2020-01-01"]]
    assert documents("owner/name") == list(source.documents())
    options = {"split": "train", "streaming": True}
    assert asked[0] == (("wikimedia/wikipedia", "20231101.en"), options)
    assert asked[1] == (("owner/name", None), options)
    assert TextSource(("owner/name",), split="validation").text() == "one line\nand another\n\n2020-01-01"
    assert asked[-1] == (("owner/name", None), {"split": "validation", "streaming": True})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a. b\n\nc", True), ("a\nb\n\nc", True), ("a\n\nb\n\nc", False), ("a\nb\nc", False)],
)
def test_sentences_that_follow_each_other(tmp_path, text, expected):
    source = TextSource((write(tmp_path / "text.txt", text),))
    assert source.has_following_sentences() is expected
    assert source.text() == text


def test_a_dataset_that_cannot_be_reached():
    with pytest.raises(OSError, match=r"text 'nobody/nothing' is neither .* nor a dataset .*; correct the name"):
        documents("nobody/nothing")


def test_fraction_is_stable_and_about_right(tmp_path):
    lines = [f"sentence number {i}" for i in range(3000)]
    file = write(tmp_path / "text.txt", "\n".join(lines))
    tenth, half = documents(file, fraction=0.1), documents(file, fraction=0.5)
    assert tenth == documents(file, fraction=0.1)
    assert 240 < len(tenth) < 360
    assert 1400 < len(half) < 1600
    assert {line for (line,) in tenth} < {line for (line,) in half} < set(lines)
    moved = write(tmp_path / "moved.txt", "\n".join(["something new", *reversed(lines)]))
    assert set(map(tuple, documents(moved, fraction=0.1))) - {("something new",)} == set(map(tuple, tenth))
    assert len(documents(file, fraction=1)) == 3000


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        ((), {}, ValueError, "no text was given; name a file"),
        (("a",), {"fraction": 0}, ValueError, "fraction=0 must be above 0 and at most 1; use 1"),
        (("a",), {"fraction": 1.5}, ValueError, "fraction=1.5 must be above 0"),
        (("missing.txt",), {}, FileNotFoundError, "text file 'missing.txt' does not exist; give existing files or one"),
        (("missing.parquet",), {}, FileNotFoundError, "'missing.parquet' does not exist"),
        (("./missing",), {}, FileNotFoundError, "'./missing' does not exist"),
        (("owner/name", "owner/other"), {}, FileNotFoundError, "'owner/name' does not exist"),
    ],
)
def test_refuses_bad_sources(names, options, error, message):
    with pytest.raises(error, match=message):
        TextSource(names, **options)


def test_broken_files(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text file '.*latin.txt' is not UTF-8 .*; convert it"):
        documents(str(latin))
    with pytest.raises(ValueError, match=r"line 2 of '.*broken.jsonl' is not JSON .*; mend the file"):
        documents(write(tmp_path / "broken.jsonl", '{"text": "a"}\n{"text": \n'))


# ---- streams and steps ----


def numbered(seed, count=50):
    return ({"number": i, "seed": seed} for i in range(count))


def test_a_stream_repeats_without_end_and_shuffles():
    stream = TextStream(numbered, seed=7, buffer=20)
    found = list(itertools.islice(stream, 150))
    first, second, third = found[:50], found[50:100], found[100:]
    orders = [[example["number"] for example in part] for part in (first, second, third)]
    for place, part in enumerate((first, second, third)):
        assert {example["seed"] for example in part} == {7 + place}
        assert sorted(orders[place]) == list(range(50))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != list(range(50))
    assert all(number < 20 + place for place, number in enumerate(orders[0]))  # nothing beyond the buffer

    def order(seed):
        return [example["number"] for example in itertools.islice(TextStream(numbered, seed, 20), 80)]

    assert order(7) == order(7) != order(8)


def of_length(seed, count=50):
    """Examples of 1 to 10 tokens in an order that is not theirs, each with its number."""
    for number in range(count):
        yield {"number": number, "input_ids": [1] * (1 + 7 * number % 10)}


def test_groups_of_a_stream_have_similar_length_and_nothing_is_lost():
    found = list(itertools.islice(TextStream(of_length, seed=7, group=5), 250))  # five passes, sorted at once
    assert sorted(example["number"] for example in found) == sorted(5 * list(range(50)))
    lengths = [[len(example["input_ids"]) for example in found[start : start + 5]] for start in range(0, 250, 5)]
    assert all(len(set(group)) == 1 for group in lengths)  # 25 examples of each length
    assert lengths != sorted(lengths)
    again = list(itertools.islice(TextStream(of_length, seed=7, group=5), 250))
    other = list(itertools.islice(TextStream(of_length, seed=8, group=5), 250))
    assert found == again != other


@pytest.mark.parametrize(("strategy", "group"), [("random", 1), ("group_by_length", 4)])
def test_streams_follow_the_sampling_strategy(tmp_path, strategy, group):
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, train_sampling_strategy=strategy
    )
    assert length_group(arguments) == group


def test_workers_divide_a_stream():
    loader = DataLoader(TextStream(partial(numbered, count=10)), batch_size=None, num_workers=2)
    found = [example["number"] for example in itertools.islice(loader, 10)]
    assert sorted(found) == list(range(10))


def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match="the text gives 0 examples; give more text"):
        next(iter(TextStream(lambda seed: [])))


def test_training_steps(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    same = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 4, "disable_tqdm": True}
    arguments = TrainingArguments(**same, gradient_accumulation_steps=2, num_train_epochs=1.5)
    assert training_steps(arguments, numbered(0)) == math.ceil(50 * 1.5 / 8)
    assert re.search(r"50 examples in one pass, counted in \d+ s, so 10 steps", caplog.text)
    arguments = TrainingArguments(**same, max_steps=17)
    assert training_steps(arguments, iter(lambda: pytest.fail("was read"), None)) == 17


# ---- examples ----


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text".encode("utf-16-le"), "is binary or UTF-16; convert it to UTF-8"),
        ("a.jsonl", b'{"text": ["a", "b"]}', r"column 'text' of .* holds \['a', 'b'\], which is no text"),
        ("a.jsonl", b'{"text": NaN}', "holds nan, which is no text"),
        ("a.jsonl", b'"abc text"', "line 1 of .* holds no object"),
    ],
)
def test_what_is_no_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextSource((str(tmp_path / name),)).lines()


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; name the files in it"):
        TextSource((str(tmp_path),))
