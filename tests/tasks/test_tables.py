import csv
import json
import os
import tempfile

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from kronecker_transformers.tasks.tables import read_table

# Each is changed or dropped by the loaders of datasets: a quote, a date, a word for "missing", a line separator.
TEXTS = ['She said "no', "2020-01-01", "NA", "one\u2028line"]


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


ROWS = [{"text": text, "label": i, "score": i + 0.5} for i, text in enumerate(TEXTS)]
CONTENTS = {
    "a.tsv": "text\tlabel\tscore\n" + "".join(f"{r['text']}\t{r['label']}\t{r['score']}\n" for r in ROWS),
    "a.csv": "text,label,score\r\n"
    + "".join(f'"{r["text"]}",{r["label"]},{r["score"]}\r\n' for r in ROWS).replace('said "no', 'said ""no'),
    "a.json": json.dumps(ROWS),
    "data.json": json.dumps({"version": "1.1", "data": ROWS}),
    "a.jsonl": as_lines(ROWS) + "\n\n",
    "A.JSONL": "\ufeff" + as_lines(ROWS),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_values_of_the_file(tmp_path, name):
    table = read_table(write(tmp_path / name, CONTENTS[name]))
    assert table.to_list() == ROWS
    assert table.features == Features({"text": Value("string"), "label": Value("int64"), "score": Value("float64")})


def test_parquet_keeps_its_features(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    whole = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    whole.to_parquet(tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert table.features == features
    assert table.to_list() == whole.to_list()


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (["1", "-20", "0"], [1, -20, 0]),
        (["1", "2.50", "-1e-3"], [1.0, 2.5, -0.001]),
        (["1", "2", "three"], ["1", "2", "three"]),
        (["007", "8", "9"], ["007", "8", "9"]),  # as a number it would lose its zeros
        (["1_000", "+2", "3"], ["1_000", "+2", "3"]),
        (["12345678901234567890", "1", "2"], ["12345678901234567890", "1", "2"]),
        (["1", "", "2"], ["1", "", "2"]),
        (["nan", "inf", "1.0"], ["nan", "inf", "1.0"]),
    ],
)
def test_numbers_are_read_where_nothing_is_lost(tmp_path, column, values):
    file = write(tmp_path / "a.tsv", "text\tvalue\n" + "".join(f"x\t{value}\n" for value in column))
    found = read_table(file)["value"][:]
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


def test_a_document_may_be_long(tmp_path):
    file, text = tmp_path / "long.csv", "word " * 40_000
    file.write_text(f"text,label\n{text},1\n")
    assert read_table(file)["text"][:] == [text]
    assert csv.field_size_limit() == 131_072


def test_a_field_that_an_object_lacks_is_none(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"a": "x"}\n{"a": "y", "b": [3]}\n')
    assert read_table(file).to_list() == [{"a": "x", "b": None}, {"a": "y", "b": [3]}]


def test_blank_lines_are_passed_over_and_quoted_ones_kept(tmp_path):
    file = write(tmp_path / "a.csv", 'text,label\n\n"two\r\n\nlines",3\n\n')
    assert read_table(file).to_list() == [{"text": "two\r\n\nlines", "label": 3}]


def test_nothing_is_cached_printed_or_left_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    file = tmp_path / "a.csv"
    for text in ("old", "new"):
        write(file, f"text\n{text}\n")
        os.utime(file, (1, 1))  # neither the size nor the time tells that the file has changed
        table = read_table(file)
        assert table["text"][:] == [text]
        assert not table.cache_files
    assert list(tmp_path.iterdir()) == [file]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text\nx\n", r"a\.txt' has the extension '\.txt'; supported are \.tsv, \.csv.*convert or rename"),
        ("plain", "text\nx\n", "has the extension ''; supported are"),
        ("a.tsv", "", r"a\.tsv' has 0 rows; at least one is needed; give a file"),
        ("a.csv", "text,label\n", "has 0 rows"),
        ("a.json", "[]", "has 0 rows"),
        ("a.json", '{"data": []}', "has 0 rows"),
        ("a.jsonl", "\n", "has 0 rows"),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", r"line 3 has 1 values, the header 2\); mend or replace"),
        ("a.tsv", "text\tlabel\nx\t1\t2\n", "line 2 has 3 values, the header 2"),
        ("a.csv", 'text,label\n"two\nlines",1\nz\n', "line 4 has 1 values, the header 2"),
        ("a.csv", "text,text\nx,y\n", r"the header \['text', 'text'\] names a column twice"),
        ("a.csv", 'text,label\n"x,1\n', "unexpected end of data"),
        ("a.tsv", b"text\n\xff\xfe\n", "cannot be read as a whole .tsv file .*utf-8"),
        ("a.json", '[{"text": "x"', r"cannot be read as a whole \.json file \(Expecting"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', "Extra data"),
        ("a.json", '{"rows": [{"text": "x"}]}', "objects are needed, in a list"),
        ("a.json", '{"data": {"text": "x"}}', "objects are needed, in a list"),
        ("a.json", '["x", "y"]', "objects are needed, in a list"),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', "one on each line"),
        ("a.jsonl", '{"text": "x"}\n{"text"', "Expecting ':' delimiter"),
        ("a.jsonl", '{"label": 1}\n{"label": "x"}\n', "Could not convert 'x'"),
        ("a.parquet", "no parquet", r"cannot be read as a whole \.parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"^table '.*{message}"):
        read_table(file)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"table '.*none\.csv' does not exist; give an existing file"):
        read_table(tmp_path / "none.csv")


TEXTS = ['He said "hi"', "plain", 'a "b" c', "with\ttab", "two\nlines", '"']


def test_a_table_that_pandas_has_quoted(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": TEXTS, "label": range(len(TEXTS))})
    table.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert read_table(tmp_path / "a.tsv").to_list() == table.to_dict("records")


@pytest.mark.parametrize("text", ['"hello"', 'he said "x"', '"half', 'He said ""hi""', '"a" and "b"'])
def test_quotes_of_a_plain_table_are_characters(text, tmp_path):
    file = write(tmp_path / "a.tsv", f"text\tlabel\n{text}\t1\nplain\t0\n")
    assert read_table(file)["text"][:] == [text, "plain"]


def test_json_that_needs_another_form_says_which(tmp_path):
    for content, message in (
        ('{"text": {"0": "x"}}', 'pandas writes them with orient="records"'),
        ('{"text": "x"}\n{"text": "y"}', r"it is a \.jsonl file: rename it"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(write(tmp_path / "a.json", content))
