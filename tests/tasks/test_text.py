import itertools
import json
import logging
import math
import re
from functools import partial

import datasets
import pytest
import tiny
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from kronecker_transformers.tasks.text import (
    WHOLE,
    Share,
    TextSource,
    TextStream,
    length_group,
    stream_seed,
    training_steps,
)

WORDS = tiny.TEXT.split()
# on a machine with one core, PyTorch warns of two workers
on_one_core = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")


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


def numbered(seed, share=WHOLE, count=50):
    return ({"number": i, "seed": seed} for i in share.of(range(count)))


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


def of_length(seed, share=WHOLE, count=50):
    """Examples of 1 to 10 tokens in an order that is not theirs, each with its number."""
    for number in share.of(range(count)):
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


@on_one_core
def test_processes_and_workers_divide_every_pass_without_overlap():
    """Three processes with two workers each; a worker makes its own examples alone."""
    made = []

    def examples(seed, share):
        made.append(share)
        return numbered(seed, share, count=60)

    shares = [TextStream(examples, seed=3).share(index, 3) for index in range(3)]
    found = [[example["number"] for example in itertools.islice(stream, 40)] for stream in shares]
    for begin in (0, 20):
        assert sorted(itertools.chain(*(part[begin : begin + 20] for part in found))) == list(range(60))
    assert made == [Share(index, 3) for index in range(3) for _ in range(2)]
    assert [Share(1, 3).divided(Share(worker, 2)) for worker in (0, 1)] == [Share(2, 6), Share(3, 6)]
    loader = DataLoader(TextStream(partial(numbered, count=60), seed=3).share(1, 3), batch_size=None, num_workers=2)
    worked = [example["number"] for example in itertools.islice(loader, 20)]
    assert sorted(worked) == sorted([*Share(2, 6).of(range(60)), *Share(3, 6).of(range(60))])


def test_groups_of_all_shares_have_similar_length_in_the_same_step():
    shares = [iter(TextStream(partial(of_length, count=2000), seed=7, group=20).share(i, 2)) for i in (0, 1)]
    seen = set()
    for _ in range(50):
        steps = [[len(next(stream)["input_ids"]) for _ in range(20)] for stream in shares]
        assert abs(max(steps[0]) - max(steps[1])) <= 1
        seen.add(max(steps[0]))
    assert len(seen) >= 5


def test_shares_of_a_text_are_all_of_it_and_have_no_document_in_common(tmp_path):
    names = (write(tmp_path / "documents.txt", "".join(f"first {i}\nsecond {i}\n\n" for i in range(200))),)
    for source in (TextSource(names), TextSource(names, fraction=0.5, skipped=0.2)):
        parts = [list(source.share(Share(index, 5)).documents()) for index in range(5)]
        assert sorted(itertools.chain(*parts)) == sorted(source.documents())
        assert min(map(len, parts)) > len(list(source.documents())) / 10


@pytest.mark.parametrize(("strategy", "group"), [("random", 1), ("group_by_length", 4)])
def test_streams_follow_the_sampling_strategy(tmp_path, strategy, group):
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, train_sampling_strategy=strategy
    )
    assert length_group(arguments) == group


@pytest.mark.parametrize(("own", "seed"), [({}, 3), ({"data_seed": 7}, 7), ({"data_seed": 0}, 0)])
def test_streams_have_the_seed_of_the_data(own, seed, tmp_path):
    assert stream_seed(TrainingArguments(str(tmp_path), use_cpu=True, seed=3, **own)) == seed


@on_one_core
def test_workers_divide_a_stream():
    loader = DataLoader(TextStream(partial(numbered, count=10)), batch_size=None, num_workers=2)
    found = [example["number"] for example in itertools.islice(loader, 10)]
    assert sorted(found) == list(range(10))


def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match="the text gives 0 examples; give more text"):
        next(iter(TextStream(lambda seed, share: [])))
    with pytest.raises(ValueError, match=r"0 examples for share 2 of 2; .*, fewer processes or workers"):
        next(iter(TextStream(partial(numbered, count=1)).share(1, 2)))


def test_training_steps(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    same = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 4, "disable_tqdm": True}
    arguments = TrainingArguments(**same, gradient_accumulation_steps=2, num_train_epochs=1.5)
    assert training_steps(arguments, numbered(0)) == math.ceil(50 * 1.5 / 8)
    assert re.search(r"50 examples in one epoch, counted in \d+ s, so 10 steps", caplog.text)
    arguments = TrainingArguments(**same, max_steps=17)
    assert training_steps(arguments, iter(lambda: pytest.fail("was read"), None)) == 17


# ---- examples ----


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


def test_half_of_a_character_is_replaced_and_two_halves_are_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "cut \ud83d off"}' + "\n" + r'{"text": "whole \ud83d\ude00"}')
    source = TextSource((str(tmp_path / "a.jsonl"),))
    assert source.lines() == ["cut \ufffd off", "whole \U0001f600"]
    assert len(source.part(0, 0.5).lines() + source.part(0.5, 1).lines()) == 2


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; name the files in it"):
        TextSource((str(tmp_path),))
