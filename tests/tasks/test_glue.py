import json
import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from kronecker_transformers.tasks import glue
from kronecker_transformers.tasks.glue import GLUE_TASKS, load_glue, load_text_classification, write_predictions

# Files as the official download has them, with sentences of our own; a quote stands alone where quoting must be off.
# For each file: its lines, and what load_glue must give for them, without idx.
MNLI_HEADER = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
MNLI_HEADER += "sentence2_parse\tsentence1\tsentence2"
MNLI_ROW = "0\t7\t7e\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)"
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_ROW = "0\tnews\theadlines\t2016\t0012\tagency\tpaper"
OFFICIAL = {
    ("cola", "train", "CoLA/train.tsv"): (
        ["xy01\t1\t\tThe sailors sang.", 'xy01\t0\t*\t"The sailors sang loud.', "xy02\t1\t\tsentence"],
        [("The sailors sang.", 1), ('"The sailors sang loud.', 0), ("sentence", 1)],
    ),
    ("cola", "test", "CoLA/test.tsv"): (
        ["index\tsentence", "0\tWho sang?", '1\tHe said "yes.'],
        [("Who sang?", -1), ('He said "yes.', -1)],
    ),
    ("sst2", "train", "SST-2/train.tsv"): (
        ["sentence\tlabel", '"a dull film \t0', "a fine film \t1", "NA\t1"],
        [('"a dull film ', 0), ("a fine film ", 1), ("NA", 1)],
    ),
    ("mrpc", "validation", "MRPC/dev.tsv"): (
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t12\t13\t" He left .\tHe went .', "0\t1\t2\tOne\tTwo"],
        [('" He left .', "He went .", 1), ("One", "Two", 0)],
    ),
    ("mrpc", "test", "MRPC/test.tsv"): (
        ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t12\t13\tHe left .\tHe went ."],
        [("He left .", "He went .", -1)],
    ),
    ("rte", "train", "RTE/train.tsv"): (
        ["index\tsentence1\tsentence2\tlabel", "0\tIt rains.\tIt pours.\tnot_entailment", "1\tA b.\tA.\tentailment"],
        [("It rains.", "It pours.", 1), ("A b.", "A.", 0)],
    ),
    ("qnli", "validation", "QNLI/dev.tsv"): (
        ["index\tquestion\tsentence\tlabel", "0\tWho?\tThey did.\tentailment", "1\tWhere?\tAt 5.\tnot_entailment"],
        [("Who?", "They did.", 0), ("Where?", "At 5.", 1)],
    ),
    ("qqp", "train", "QQP/train.tsv"): (
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "9\t1\t2\tWhy?\tHow?\t0", "8\t3\t4\tWho?\tWhich?\t1"],
        [("Why?", "How?", 0), ("Who?", "Which?", 1)],
    ),
    ("qqp", "test", "QQP/test.tsv"): (["id\tquestion1\tquestion2", "0\tWhy?\tHow?"], [("Why?", "How?", -1)]),
    ("mnli", "train", "MNLI/train.tsv"): (
        [f"{MNLI_HEADER}\tlabel1\tgold_label", f"{MNLI_ROW}\tHe ran.\tHe moved.\tneutral\tentailment"],
        [("He ran.", "He moved.", 0)],
    ),
    ("mnli", "validation_matched", "MNLI/dev_matched.tsv"): (
        [f"{MNLI_HEADER}\tlabel1\tlabel2\tgold_label", f"{MNLI_ROW}\tHe ran.\tNo.\tneutral\tneutral\tcontradiction"],
        [("He ran.", "No.", 2)],
    ),
    ("mnli", "validation_mismatched", "MNLI/dev_mismatched.tsv"): (
        [f"{MNLI_HEADER}\tlabel1\tgold_label", f"{MNLI_ROW}\tHe ran.\tShe sat.\tentailment\tneutral"],
        [("He ran.", "She sat.", 1)],
    ),
    ("mnli", "test_matched", "MNLI/test_matched.tsv"): ([MNLI_HEADER, f"{MNLI_ROW}\tA.\tB."], [("A.", "B.", -1)]),
    ("mnli", "test_mismatched", "MNLI/test_mismatched.tsv"): ([MNLI_HEADER, f"{MNLI_ROW}\tC.\tD."], [("C.", "D.", -1)]),
    ("stsb", "train", "STS-B/train.tsv"): (
        [f"{STSB_HEADER}\tscore", f"{STSB_ROW}\tA plane.\tA bird.\t2.750", f"{STSB_ROW}\tA dog.\tA dog.\t5"],
        [("A plane.", "A bird.", 2.75), ("A dog.", "A dog.", 5.0)],
    ),
    ("stsb", "test", "STS-B/test.tsv"): ([STSB_HEADER, f"{STSB_ROW}\tA bee.\tA bird."], [("A bee.", "A bird.", -1.0)]),
    # The STS benchmark of 2017 has no header, and some rows tell their sources at the end.
    ("stsb", "validation", "STS-B/dev.tsv"): (
        ["news\theadlines\t2016\t0012\t3.500\tA cat.\tA pet.", "news\tx\t2016\t0013\t0\tIt is.\t12\tagency\tpaper"],
        [("A cat.", "A pet.", 3.5), ("It is.", "12", 0.0)],
    ),
}  # fmt: skip


def put(folder, name, lines, end="\n"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((end.join(lines) + end).encode())
    return file


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(("task", "split", "name"), OFFICIAL)
def test_official_files(tmp_path, task, split, name, end):
    lines, rows = OFFICIAL[task, split, name]
    put(tmp_path, name, lines, end)
    dataset = load_glue(task, tmp_path, [split])
    assert list(dataset) == [split]
    columns = [*GLUE_TASKS[task].text_columns, "label"]
    assert dataset[split].column_names == [*columns, "idx"]
    expected = [{**dict(zip(columns, row, strict=True)), "idx": i} for i, row in enumerate(rows)]
    assert dataset[split].to_list() == expected
    assert dataset[split].features == GLUE_TASKS[task].features


def test_columns_and_classes_are_those_of_the_hub():
    features = {name: task.features for name, task in GLUE_TASKS.items()}
    assert features["qnli"] == Features(
        {
            "question": Value("string"),
            "sentence": Value("string"),
            "label": ClassLabel(names=["entailment", "not_entailment"]),
            "idx": Value("int32"),
        }
    )
    assert features["mnli"]["label"].names == ["entailment", "neutral", "contradiction"]
    assert features["stsb"]["label"] == Value("float32")
    assert [list(task)[:-2] for task in features.values()] == [
        ["sentence"],
        ["premise", "hypothesis"],
        ["sentence1", "sentence2"],
        ["question", "sentence"],
        ["question1", "question2"],
        ["sentence1", "sentence2"],
        ["sentence"],
        ["sentence1", "sentence2"],
    ]


def test_splits_by_default_are_those_with_labels_and_the_tests_that_are_there(tmp_path):
    for (task, _, name), (lines, _) in OFFICIAL.items():
        if task in ("mnli", "stsb"):
            put(tmp_path, name, lines)
    everything = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    assert list(load_glue("mnli", tmp_path)) == everything
    (tmp_path / "MNLI/test_matched.tsv").unlink()
    everything.remove("test_matched")
    assert list(load_glue("mnli", str(tmp_path))) == everything
    assert list(load_glue("stsb", tmp_path)) == ["train", "validation", "test"]


def test_broken_rows_are_dropped_with_a_count_and_keep_their_numbers(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = ["0\t1\t2\tWhy?\tHow", "is it?\t1", "1\t3\t4\tWho?\tWhich?\t1\tmore", "", "2\t5\t6\t\tWhat?\t0"]
    file = put(tmp_path, "QQP/train.tsv", [header, *rows])
    dataset = load_glue("qqp", tmp_path, ["train"])["train"]
    assert dataset.to_list() == [
        {"question1": "Who?", "question2": "Which?", "label": 1, "idx": 2},
        {"question1": "", "question2": "What?", "label": 0, "idx": 3},
    ]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"'{file}' has 2 whole rows, and 2 of fewer than 6 columns, which are dropped" in caplog.text


@pytest.mark.parametrize(
    ("task", "split", "name", "lines", "message"),
    [
        ("cola", "train", "CoLA/train.tsv", ["xy\tA."], r"has 0 whole rows, and 1 of fewer than 4 columns; every row"),
        ("cola", "train", "CoLA/train.tsv", ["xy\tyes\t\tA."], "label 'yes' in .* must be one of unacceptable, .*0, 1"),
        ("cola", "train", "CoLA/train.tsv", ["index\tsentence", "0\tA."], "begins with .*; it must have the columns"),
        ("cola", "validation", "CoLA/dev.tsv", [""], "has 0 whole rows"),
        ("rte", "train", "RTE/train.tsv", [""], r"begins with \[\]; it must have the columns sentence1, sentence2, "),
        ("rte", "train", "RTE/train.tsv", ["index\tsentence1\tsentence2\tlabel"], "has 0 whole rows"),
        ("rte", "train", "RTE/train.tsv", ["index\tsentence1\tlabel", "0\tA.\t1"], "use the file of the official"),
        ("rte", "train", "RTE/train.tsv", ["sentence1\tsentence2\tlabel", "A.\tB.\t2"], "label '2' in .*; mend or"),
        ("rte", "test", "RTE/test.tsv", ["sentence1\tsentence2", "A.\tB.", "C."], "1 whole rows, and 1 of .*; every"),
        ("stsb", "train", "STS-B/train.tsv", ["g\tf\t1\t2\tbad\tA.\tB."], "label 'bad' in .* must be a finite number"),
        ("stsb", "train", "STS-B/train.tsv", ["g\tf\t1\t2\tnan\tA.\tB."], "label 'nan' in .* must be a finite number"),
    ],
)  # fmt: skip
def test_bad_official_files(tmp_path, task, split, name, lines, message):
    put(tmp_path, name, lines)
    with pytest.raises(ValueError, match=message):
        load_glue(task, tmp_path, [split])


def test_files_that_are_not_text_or_not_there(tmp_path):
    put(tmp_path, "SST-2/train.tsv", ["sentence\tlabel"]).write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv' is not UTF-8 text .*; download it again"):
        load_glue("sst2", tmp_path)
    put(tmp_path, "SST-2/train.tsv", ["sentence\tlabel", "fine\t1"])
    missing = r"'{}' of the task sst2 must be in .*{}', which does not exist; give the folder that holds"
    with pytest.raises(FileNotFoundError, match=missing.format("validation", r"dev\.tsv")):
        load_glue("sst2", tmp_path)
    with pytest.raises(FileNotFoundError, match=missing.format("test", r"test\.tsv")):
        load_glue("sst2", tmp_path, ["train", "test"])


def test_unknown_task_and_split(tmp_path):
    with pytest.raises(
        ValueError, match="task 'wnli' is not a GLUE task of the papers; choose one of cola, mnli, mrpc"
    ):
        load_glue("wnli", tmp_path)
    with pytest.raises(ValueError, match="split 'validation' is not in the task mnli; choose from train, validation_m"):
        load_glue("mnli", tmp_path, ["validation"])


def test_without_a_folder_the_hub_is_asked(monkeypatch):
    rows = Dataset.from_dict({"sentence": ["a"], "label": [0], "idx": [0]})
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return DatasetDict({"test": rows, "validation": rows, "train": rows})

    monkeypatch.setattr(glue, "load_dataset", load_dataset)
    assert list(load_glue("sst2")) == ["train", "validation", "test"]
    assert list(load_glue("cola", splits=("validation",))) == ["validation"]
    assert asked == [("nyu-mll/glue", "sst2"), ("nyu-mll/glue", "cola")]


def test_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*arguments):
        raise ConnectionError("offline")

    monkeypatch.setattr(glue, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"'rte' cannot be loaded from 'nyu-mll/glue' .*\(offline\); connect .* data_dir"):
        load_glue("rte")


# ---- a user's own files ----


def table(folder, name, **columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


NAMES = [("sentence",), ("text",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")]
NAMES += [("question1", "question2"), ("text1", "text2")]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_text_columns_are_recognised(tmp_path, names):
    texts = {name: [f"{name} one", f"{name} two", f"{name} three"] for name in names}
    train = table(tmp_path, "train", label=[2, 0, 1], note=["x", "y", "z"], **texts)
    splits, text_columns, labels = load_text_classification(train)
    assert (list(splits), text_columns, labels) == (["train"], names, ("0", "1", "2"))
    assert splits["train"].to_dict() == {**texts, "label": [2, 0, 1]}


@pytest.mark.parametrize(
    ("train", "validation", "given", "names", "train_ids", "validation_ids"),
    [
        (["no", "yes", "maybe"], ["yes", "no"], None, ("maybe", "no", "yes"), [1, 2, 0], [2, 1]),
        (["no", "yes", "no"], ["yes", "no"], ["yes", "no", "maybe"], ("yes", "no", "maybe"), [1, 0, 1], [0, 1]),
        ([0, 2, 1], [2, 0], None, ("0", "1", "2"), [0, 2, 1], [2, 0]),
        ([1, 10, 5], [10, 5], None, ("1", "5", "10"), [0, 2, 1], [2, 1]),
        ([-1, 1, 1], [1, -1], None, ("-1", "1"), [0, 1, 1], [1, 0]),
        ([False, True, True], [True, False], None, ("False", "True"), [0, 1, 1], [1, 0]),
        ([1, 0, 1], [0, 1], ["bad", "good"], ("bad", "good"), [1, 0, 1], [0, 1]),
        ([1, 3, 2], [3, 1], ["1", "2", "3"], ("1", "2", "3"), [0, 2, 1], [2, 0]),
        ([0.5, 2.0, 4.75], [1, 3], None, (), [0.5, 2.0, 4.75], [1.0, 3.0]),
    ],
)
def test_labels(tmp_path, train, validation, given, names, train_ids, validation_ids):
    train = table(tmp_path, "train", text=["a", "b", "c"], label=train)
    validation = table(tmp_path, "validation", text=["d", "e"], label=validation)
    splits, _, labels = load_text_classification(train, validation, labels=given)
    assert labels == names
    assert splits["train"]["label"][:] == train_ids
    assert splits["validation"]["label"][:] == validation_ids
    for split in splits.values():
        assert split.features["label"] == (ClassLabel(names=list(names)) if names else Value("float32"))


@pytest.mark.parametrize("labels", [["no", "yes"], [0.5, 1.5], [0, 1], [-1, 1]])
def test_a_test_may_lack_labels(tmp_path, labels):
    train = table(tmp_path, "train", text=["a", "b"], label=labels)
    bare = table(tmp_path, "bare", text=["c", "d", "e"])
    marked = table(tmp_path, "marked", text=["c", "d"], label=[-1, -1])
    assert load_text_classification(train, None, bare)[0]["test"]["label"][:] == [-1, -1, -1]
    expected = 0 if labels == [-1, 1] else -1  # where -1 is a class, it is one in the test too
    assert load_text_classification(train, test_file=marked)[0]["test"]["label"][:] == [expected, expected]


def test_other_formats_and_class_names_from_parquet(tmp_path):
    (tmp_path / "train.csv").write_text('text,label\n"a, b",1.5\nc,2\n')
    (tmp_path / "dev.tsv").write_text('label\ttext\n3\t"c\n')
    splits, _, labels = load_text_classification(tmp_path / "train.csv", tmp_path / "dev.tsv")
    assert labels == ()
    assert splits["train"].to_dict() == {"text": ["a, b", "c"], "label": [1.5, 2.0]}
    assert splits["validation"].to_dict() == {"text": ['"c'], "label": [3.0]}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(tmp_path / "train.parquet")
    splits, _, labels = load_text_classification(tmp_path / "train.parquet")
    assert labels == ("yes", "no")
    assert splits["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("train", "validation", "given", "message"),
    [
        ({"words": ["a", "b"], "label": [0, 1]}, None, None, r"has the columns words, label; it must have label and "
         r"one of sentence1 \+ sentence2, .*, sentence, text; rename its columns"),
        ({"text": ["a", "b"], "class": [0, 1]}, None, None, "has the columns text, class; it must have label"),
        ({"text": ["a", "b"], "label": [1, 1]}, None, None, "1 different labels, 0 of them empty; every row needs"),
        ({"text": ["a", "b"], "label": ["x", None]}, None, None, "2 different labels, 1 of them empty; every row"),
        ({"text": list("abc"), "label": ["0", " ", "1"]}, None, None, "3 different labels, 1 of them empty; every"),
        ({"text": ["a", "b"], "label": [0, 1]}, None, ["one"], "label 1 in .* must be one of 0; mend"),
        ({"text": ["a", "b"], "label": ["x", "z"]}, None, ["x", "y"], r"label 'z' in .*train\.jsonl' must be one of x"),
        ({"text": ["a", "b"], "label": [0, 2]}, None, ["x", "y"], r"label 2 in .*train\.jsonl' must be one of 0, 1"),
        ({"text": ["a", "b"], "label": [0.0, 1.0]}, None, ["x", "y"], r"label 0\.0 in .* must be one of x, y"),
        ({"text": ["a", "b"], "label": [0.5, float("nan")]}, None, None, "2 different labels, 1 of them empty"),
        ({"text": ["a", 3], "label": [0, 1]}, None, None, "cannot be read as a whole"),
        ({"text": [4, 3], "label": [0, 1]}, None, None, r"column 'text' of .*train\.jsonl' holds 4; every row needs"),
        ({"text": ["a", None], "label": [0, 1]}, None, None, "holds None; every row needs a text; mend the file"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text": ["c"], "label": [2]}, None,
         r"label 2 in .*validation\.jsonl' must be one of 0, 1; mend or replace"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text": ["c"], "label": [-1]}, None, "label -1 in .*validation"),
        ({"text": ["a", "b"], "label": [0.5, 1]}, {"text": ["c"], "label": ["x"]}, None, "label 'x' in .* finite"),
        ({"text": ["a", "b"], "label": [0.5, 1]}, {"text": ["c"], "label": [None]}, None, "label None in .* finite"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"text": ["c"]}, None,
         r"validation\.jsonl' has no column 'label'; the training file has one; rename its columns"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"sentence": ["c"], "label": [1]}, None, "has no column 'text'"),
    ],
)  # fmt: skip
def test_bad_files_of_the_user(tmp_path, train, validation, given, message):
    train = table(tmp_path, "train", **train)
    validation = table(tmp_path, "validation", **validation) if validation else None
    with pytest.raises(ValueError, match=message):
        load_text_classification(train, validation, labels=given)


# ---- files for the server ----


@pytest.mark.parametrize(
    ("task", "split", "predictions", "name", "cells"),
    [
        ("cola", "test", [0, 1, 1], "CoLA.tsv", ["0", "1", "1"]),
        ("mnli", "test_matched", [0, 2, 1], "MNLI-m.tsv", ["entailment", "contradiction", "neutral"]),
        ("mnli", "test_mismatched", np.array([1, 0]), "MNLI-mm.tsv", ["neutral", "entailment"]),
        ("mrpc", "test", (1, 0), "MRPC.tsv", ["1", "0"]),
        ("qnli", "test", [1, 0], "QNLI.tsv", ["not_entailment", "entailment"]),
        ("qqp", "test", np.array([0, 1], dtype=np.int8), "QQP.tsv", ["0", "1"]),
        ("rte", "test", [0, 1], "RTE.tsv", ["entailment", "not_entailment"]),
        ("sst2", "test", [1, 0], "SST-2.tsv", ["1", "0"]),
        ("stsb", "test", [-0.5, 5.25, 2.34567, 3], "STS-B.tsv", ["0.000", "5.000", "2.346", "3.000"]),
    ],
)
def test_files_for_the_server(tmp_path, task, split, predictions, name, cells):
    folder = tmp_path / "to" / "send"
    for _ in range(2):  # the second time, the file is replaced
        file = write_predictions(task, split, predictions, folder)
        assert file == folder / name
        assert list(folder.iterdir()) == [file]
        rows = "".join(f"{i}\t{cell}\n" for i, cell in enumerate(cells))
        assert file.read_bytes() == f"index\tprediction\n{rows}".encode()


@pytest.mark.parametrize(
    ("task", "split", "predictions", "message"),
    [
        ("rte", "validation", [0], "split 'validation' of the task rte is not a test; choose from test$"),
        ("mnli", "test", [0], "split 'test' of the task mnli is not a test; choose from test_matched, test_mismatched"),
        ("rte", "test", [0, 2], r"predictions for rte, of shape \(2,\), hold \[2\.0\]; they must be class ids from 0"),
        ("rte", "test", [0.5], r"hold \[0\.5\]; they must be class ids from 0 to 1; give one for each row"),
        ("rte", "test", [[0.1, 0.9]], r"of shape \(1, 2\), hold \[0\.1\]; they must be class ids"),
        ("rte", "test", [], r"of shape \(0,\), hold \[\]; they must be class ids"),
        ("stsb", "test", [1.0, float("inf")], r"hold \[inf\]; they must be finite numbers"),
        ("wnli", "test", [0], "task 'wnli' is not"),
    ],
)  # fmt: skip
def test_bad_predictions(tmp_path, task, split, predictions, message):
    with pytest.raises(ValueError, match=message):
        write_predictions(task, split, predictions, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_file_for_the_server_is_whole_or_not_there(tmp_path, monkeypatch):
    def replace(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(glue.Path, "replace", replace)
    with pytest.raises(OSError, match="no space left"):
        write_predictions("rte", "test", [0, 1], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "NaN", "1"], "3 different labels, 1 of them empty"),
        (["inf", "1.5", "2"], "1 of them empty"),
        (["very good", "very good ", "bad"], "differ in case or spaces alone; write each class in one way"),
        (["Positive", "positive", "negative"], "the labels 'Positive', 'positive', which differ in case or spaces"),
    ],
)
def test_labels_that_are_none_or_the_same_are_refused(labels, message, tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("text\tlabel\n" + "".join(f"x{i}\t{label}\n" for i, label in enumerate(labels)))
    with pytest.raises(ValueError, match=message):
        load_text_classification(file)


def test_whole_numbers_written_as_decimals_are_scores_with_a_word(tmp_path, caplog):
    file = tmp_path / "train.tsv"
    file.write_text("text\tlabel\nx\t0.0\ny\t1.0\n")
    assert load_text_classification(file)[2] == ()
    assert "are whole but written as decimals, and taken as scores of a regression" in caplog.text


def test_a_carriage_return_within_a_text_ends_no_line(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    (folder / "dev.tsv").write_bytes(b"sentence\tlabel\r\na\rb\t0\r\nc\t1\r\n")
    found = load_glue("sst2", tmp_path, ["validation"])["validation"]
    assert found["sentence"][:] == ["a\rb", "c"]
    assert found["label"][:] == [0, 1]


def test_a_class_label_holds_ids_whatever_its_names_are(tmp_path):
    """Names that are numbers themselves, in another order; a text file beside it holds the names."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "0"])})
    train = tmp_path / "train.parquet"
    Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features).to_parquet(train)
    validation = tmp_path / "validation.csv"
    validation.write_text("text,label\ngood,1\nbad,0\n")
    splits, _, names = load_text_classification(train, validation)
    assert names == ("1", "0")
    assert splits["train"]["label"][:] == splits["validation"]["label"][:] == [0, 1]
