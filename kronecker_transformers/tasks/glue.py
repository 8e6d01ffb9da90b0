"""The GLUE tasks of the papers (Wang et al., 2019, https://gluebenchmark.com), and a user's own files of the same kind.

Rows come from the Hub or from the folders of the official download; both give the same columns.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from .tables import read_table

logger = logging.getLogger(__name__)

_HUB_NAME = "nyu-mll/glue"
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text1", "text2"),
)
_SERVER_SUFFIXES = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}


@dataclass(frozen=True)
class GlueTask:
    """One task, as the Hub, the official files and the GLUE server know it.

    Attributes:
        name: configuration of `nyu-mll/glue` on the Hub.
        folder: folder of the official download, and stem of the file for the server.
        text_columns: one or two, named as on the Hub.
        labels: names of the classes in the order of their ids; empty for a regression.
        metrics: their names; tables of results show the first one.
        source_columns: the texts and then the label, named as in the official files.
        bare_columns: all columns of official files that come without a header.
        evaluation_splits: splits with labels that are not for training.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    source_columns: tuple[str, ...]
    bare_columns: tuple[str, ...] = ()
    evaluation_splits: tuple[str, ...] = ("validation",)

    @property
    def headline(self) -> str:
        """Name of the metric that tables of results show; `glue_metric.headline` says why."""
        return self.metrics[0]

    @property
    def files(self) -> dict[str, str]:
        """File of each split within the official folder; the last ones are the tests."""
        tests = (split.replace("validation", "test") for split in self.evaluation_splits)
        return {s: f"{s.replace('validation', 'dev')}.tsv" for s in ("train", *self.evaluation_splits, *tests)}

    @property
    def server_files(self) -> dict[str, str]:
        """File that the GLUE server expects for each test split."""
        return {split: f"{self.folder}{_SERVER_SUFFIXES[split]}.tsv" for split in self.files if "test" in split}

    @property
    def features(self) -> Features:
        """Columns and types, as on the Hub."""
        return _features(self.text_columns, self.labels, idx=Value("int32"))

    def checked(self, name: str, values: Sequence[float]) -> np.ndarray:
        """Ids of classes, or scores, as an array of shape (rows,).

        Raises:
            ValueError: none at all, or a value that is neither; the message begins with `name`.
        """
        array = np.asarray(values, dtype=float)
        allowed = np.isin(array, range(len(self.labels))) if self.labels else np.isfinite(array)
        if array.ndim != 1 or not len(array) or not allowed.all():
            rule = f"class ids from 0 to {len(self.labels) - 1}" if self.labels else "finite numbers"
            raise ValueError(
                f"{name} for {self.name}, of shape {array.shape}, hold {array[~allowed][:1].tolist()}; "
                f"they must be {rule}; give one for each row that has a label"
            )
        return array.astype(int) if self.labels else array


def _features(text_columns: Iterable[str], labels: Sequence[str], **more: Any) -> Features:
    label = ClassLabel(names=list(labels)) if labels else Value("float32")
    return Features({**{column: Value("string") for column in text_columns}, "label": label, **more})


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")

# fmt: off
GLUE_TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",),
                 ("sentence", "label"), bare_columns=("source", "label", "mark", "sentence")),
        GlueTask("mnli", "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",),
                 (*_PAIR, "gold_label"), evaluation_splits=("validation_matched", "validation_mismatched")),
        GlueTask("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"),
                 ("#1 String", "#2 String", "Quality")),
        GlueTask("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",),
                 ("question", "sentence", "label")),
        GlueTask("qqp", "QQP", _QUESTIONS, ("not_duplicate", "duplicate"), ("accuracy", "f1"),
                 (*_QUESTIONS, "is_duplicate")),
        GlueTask("rte", "RTE", _PAIR, _ENTAILMENT, ("accuracy",), (*_PAIR, "label")),
        GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",), ("sentence", "label")),
        GlueTask("stsb", "STS-B", _PAIR, (), ("spearmanr", "pearson"),
                 (*_PAIR, "score"), bare_columns=("genre", "filename", "year", "old_index", "score", *_PAIR)),
    )
}
# fmt: on
"""The eight tasks, by the names of the Hub."""


def glue_task(name: str) -> GlueTask:
    """The task of this name.

    Raises:
        ValueError: no such task.
    """
    if name not in GLUE_TASKS:
        raise ValueError(f"task {name!r} is not a GLUE task of the papers; choose one of {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[name]


def load_glue(
    task: str, data_dir: str | os.PathLike[str] | None = None, splits: Sequence[str] | None = None
) -> DatasetDict:
    """A GLUE task with the Hub's columns: texts, `label` and `idx`.

    A label is the id of a class or a score from 0 to 5; it is -1 in tests without labels.

    The official files are read as the official readers read them: one row on each line, quotes are characters like any
    other, and columns beyond those that are named are passed over (STS-B has some). A line of too few columns, which
    the official readers drop without a word, is dropped and counted in a warning; in a test, whose rows must stay
    numbered as the server numbers them, it is an error. `idx` is the number of the row in its file.

    Args:
        task: a name in `GLUE_TASKS`.
        data_dir: folder of the official download, with the folders CoLA, MNLI ... in it; None for the Hub.
        splits: those wanted; by default all of them, the tests only where they are there.

    Raises:
        ValueError: an unknown task or split, or a file in another format.
        FileNotFoundError: a file of the folder is missing.
        OSError: the Hub cannot be reached.
    """
    spec = glue_task(task)
    for split in splits or ():
        if split not in spec.files:
            raise ValueError(f"split {split!r} is not in the task {task}; choose from {', '.join(spec.files)}")
    if data_dir is None:
        try:
            hub = load_dataset(_HUB_NAME, task)
        except Exception as error:
            raise OSError(
                f"GLUE task {task!r} cannot be loaded from {_HUB_NAME!r} on the Hub ({error}); connect to the network, "
                "or name the folder of the official download as data_dir"
            ) from error
        return DatasetDict({split: hub[split] for split in splits or spec.files})
    loaded = DatasetDict()
    for split in splits or spec.files:
        file = Path(data_dir) / spec.folder / spec.files[split]
        if not splits and split in spec.server_files and not file.exists():
            continue
        try:
            loaded[split] = _read_official(spec, split, file)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"split {split!r} of the task {task} must be in {str(file)!r}, which does not exist; "
                "give the folder that holds the folders of the official GLUE download"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} is not UTF-8 text ({error}); download it again") from error
    return loaded


def _read_official(task: GlueTask, split: str, file: Path) -> Dataset:
    *texts, label = task.source_columns
    is_test = split in task.server_files
    # the files of MRPC begin with a mark; a carriage return within a text ends no line
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        rows = (line.rstrip("\r\n").split("\t") for line in lines if line.strip("\r\n"))
        first = next(rows, [])
        has_header = set(texts) <= set(first)
        header = first if has_header else list(task.bare_columns)
        has_labels = label in header
        if not set(texts) <= set(header) or not (has_labels or is_test):
            raise ValueError(
                f"{str(file)!r} begins with {first}; it must have the columns {', '.join(task.source_columns)}; "
                "use the file of the official GLUE download"
            )
        used = [header.index(name) for name in (task.source_columns if has_labels else texts)]
        whole, broken = {}, 0
        for i, row in enumerate(rows if has_header else chain([first], rows)):
            if len(row) > max(used):
                whole[i] = [row[position] for position in used]
            else:
                broken += 1
    found = f"{str(file)!r} has {len(whole)} whole rows, and {broken} of fewer than {max(used) + 1} columns"
    if not whole or (broken and is_test):
        raise ValueError(f"{found}; every row is needed; use the file of the official GLUE download")
    if broken:
        logger.warning("%s, which are dropped, as the official readers do", found)
    ids = {name: i for i, name in enumerate(task.labels)}
    ids |= {str(i): i for i in ids.values()}  # the files of some tasks have names, of others numbers
    columns: dict[str, list[Any]] = {
        name: [row[i] for row in whole.values()] for i, name in enumerate(task.text_columns)
    }
    columns["label"] = [_label(row[-1], ids, file) if has_labels else -1 for row in whole.values()]
    columns["idx"] = list(whole)
    return Dataset.from_dict(columns, features=task.features)


def _label(value: Any, ids: Mapping[str, int], file: str | Path) -> int | float:
    """The id of a class, or a score where there are no classes."""
    try:
        if ids:
            return ids[str(value)]
        if math.isfinite(score := float(value)):
            return score
    except (KeyError, TypeError, ValueError):
        pass
    rule = f"one of {', '.join(ids)}" if ids else "a finite number"
    raise ValueError(f"label {value!r} in {str(file)!r} must be {rule}; mend or replace the file")


def load_text_classification(
    train_file: str | os.PathLike[str],
    validation_file: str | os.PathLike[str] | None = None,
    test_file: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[DatasetDict, tuple[str, ...], tuple[str, ...]]:
    """A user's own classification or regression of sentences or pairs of sentences.

    Files are read by `read_table`. Texts stand in `sentence` or `text`, or in `sentence1` and `sentence2`, `premise`
    and `hypothesis`, `question` and `sentence`, `question1` and `question2`, or `text1` and `text2`. The column `label`
    holds scores (floats: a regression) or classes (integers or names); a test may lack it, or hold -1.

    Args:
        train_file: decides the columns and the classes.
        validation_file: optional.
        test_file: optional.
        labels: names of the classes in the order of their ids; the files hold either. By default the sorted labels of
            the training file.

    Returns:
        The splits with texts and `label` (-1 where a test has none), the text columns, and the names of the classes,
        which are empty for a regression.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, a column is missing or of another type, or a label is unknown.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    tables = {split: read_table(file) for split, file in files.items() if file is not None}
    train = tables["train"]
    layouts = (*_PAIRS, ("sentence",), ("text",))
    text_columns = next((names for names in layouts if set(names) <= set(train.column_names)), None)
    if text_columns is None or "label" not in train.column_names:
        raise ValueError(
            f"{str(train_file)!r} has the columns {', '.join(train.column_names)}; it must have label and one of "
            f"{', '.join(' + '.join(names) for names in layouts)}; rename its columns"
        )
    numbered = {split: isinstance(table.features.get("label"), ClassLabel) for split, table in tables.items()}
    if labels is None and numbered["train"]:  # as a table from the Hub may have it
        labels = train.features["label"].names
    found = train.unique("label")
    is_regression = labels is None and any(isinstance(label, float) for label in found)
    if wrong := [label for label in found if isinstance(label, (list, dict))]:
        raise ValueError(f"{str(train_file)!r} has the label {wrong[0]!r}; every row needs one class or score")
    empty = [label for label in found if _is_missing(label, found)]
    if empty or len(found) < 2:
        raise ValueError(
            f"{str(train_file)!r} has {len(found)} different labels, {len(empty)} of them empty; every row needs "
            "a label, and a task two different ones; mend the file"
        )
    spellings = Counter(str(label).strip().casefold() for label in found)
    if double := [label for label in map(str, found) if spellings[label.strip().casefold()] > 1]:
        raise ValueError(
            f"{str(train_file)!r} has the labels {', '.join(map(repr, double))}, which differ in case or spaces alone; "
            "write each class in one way"
        )
    if is_regression and all(float(label).is_integer() for label in found):
        logger.warning(
            "the labels of %s, such as %s, are whole but written as decimals, and taken as scores of a regression; "
            "write them as integers if they are classes",
            *(train_file, found[0]),
        )
    names = () if is_regression else tuple(map(str, labels or sorted(found)))
    are_ids = not set(map(str, found)) <= set(names) and all(isinstance(label, int) for label in found)
    features = _features(text_columns, names)
    loaded = DatasetDict()
    for split, table in tables.items():
        file = str(files[split])
        columns = {name: table[name][:] for name in features if name in table.column_names}
        required = text_columns if split == "test" else (*text_columns, "label")
        if missing := [name for name in required if name not in columns]:
            raise ValueError(f"{file!r} has no column {missing[0]!r}; the training file has one; rename its columns")
        for name in text_columns:
            if wrong := [text for text in columns[name] if not isinstance(text, str)]:
                raise ValueError(
                    f"column {name!r} of {file!r} holds {wrong[0]!r}; every row needs a text; mend the file"
                )
        ids = {str(i) if are_ids or numbered[split] else name: i for i, name in enumerate(names)}
        known = {"-1": -1, **ids} if ids and split == "test" else ids
        given = [_label(value, known, file) for value in columns.pop("label", [])] or [-1] * len(table)
        loaded[split] = Dataset.from_dict({**columns, "label": given}, features=features)
    return loaded, text_columns, names


def _is_missing(label: Any, others: Sequence[Any]) -> bool:
    """Whether a label is none: empty, or a word for a missing or infinite number among numbers."""
    if label is None or not str(label).strip() or (isinstance(label, float) and not math.isfinite(label)):
        return True
    words = ("nan", "null", "none", "na", "n/a", "inf", "-inf")
    is_word = str(label).strip().casefold() in words
    return is_word and any(re.fullmatch(r"-?[\d.]+", str(other)) for other in others)


def write_predictions(task: str, split: str, predictions: Sequence[float], folder: str | os.PathLike[str]) -> Path:
    """Write the predictions for a test split as the GLUE server reads them; the file is whole or not there at all.

    Args:
        task: a name in `GLUE_TASKS`.
        split: a test split.
        predictions: of every row, in order: ids of classes, or scores, which are clipped to 0 to 5.
        folder: made if it does not exist; a file of the same name in it is replaced.

    Returns:
        The file, with the server's name.

    Raises:
        ValueError: another split, or a prediction that is not a class or a number.
    """
    spec = glue_task(task)
    if split not in spec.server_files:
        raise ValueError(
            f"split {split!r} of the task {task} is not a test; choose from {', '.join(spec.server_files)}"
        )
    values = spec.checked("predictions", predictions).tolist()
    if not spec.labels:
        cells = [f"{min(max(score, 0.0), 5.0):.3f}" for score in values]
    else:
        has_names = "entailment" in spec.labels  # the server wants the other tasks' classes as numbers
        cells = [spec.labels[i] if has_names else str(i) for i in values]
    target = Path(folder) / spec.server_files[split]
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        rows = (f"{index}\t{cell}\n" for index, cell in enumerate(cells))
        draft.write_text("index\tprediction\n" + "".join(rows), encoding="utf-8", newline="\n")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target
