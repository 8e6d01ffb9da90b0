"""What the records of a checkpoint say, for its card: of its training, its quality and its time."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..evaluation.cost import describe
from .files import BENCHMARK_FILE, read_object, without_folders

_SIZE_AND_SPEED = ("megabytes", "examples per second")
"""Rows of a record, of the factored model and not of its dense twin."""
_DATA_FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
"""Endings that no name on the Hub has."""
_SPLIT = re.compile(r"(.+?)(_(?:mis)?matched)?")
"""A score, and which of MNLI's two validation sets it is of."""


@contextmanager
def as_recorded(path: Path) -> Iterator[None]:
    """Refuse a file of a common name that holds something else, while it is read in the block.

    Raises:
        ValueError: it has another shape.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no record of this package ({type(error).__name__}: {error}); rename or remove it"
        ) from error


def told(record: Mapping[str, Any], is_twin: bool) -> dict[str, Any]:
    """What the record of a training says, for the template; `results` and `datasets` are for the metadata."""
    options = record.get("options", {})
    if is_twin:  # it has the same quality, but not the size and the speed of the factored model
        rows = {name: row for name, row in record.get("rows", {}).items() if name not in _SIZE_AND_SPEED}
        record = {**record, "rows": rows}
    quality, models = _quality(record)
    return {
        "results": _eval_results(record, options),
        "datasets": _datasets(options),
        "has_rate": "examples per second" in record.get("rows", {}),
        "quality": quality,
        "quality_models": models,
        "protocol": record.get("protocol"),
        "data": _data(options),
        "training": _training(record.get("training", {})),
        "dense_training": _dense_training(record.get("dense_training", {})),
        **_depth(record),
        "environment": record.get("environment"),
        "command": _command(options.get("command")),
    }


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file; empty where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    return read_object(path, "write it again or remove it") if path.is_file() else {}


def is_hub_name(source: str | None) -> bool:
    """Whether it may be a name on the Hub, perhaps with a configuration after a colon."""
    if not source or os.path.exists(source):
        return False
    name, suffix = source.partition(":")[0], Path(source).suffix.lower()
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return suffix not in _DATA_FILES and len(name) > 1  # a single letter is a drive


def speed(folder: Path, published: Any) -> str | None:
    """How fast the model in a folder is, in one sentence; None where that was not measured.

    Raises:
        ValueError: another model was measured.
    """
    found = read_record(folder / BENCHMARK_FILE)
    if not found:
        return None
    model, against = found["model"], found["against"]
    if model["parameters"] != (own := describe(published).factored.parameters):
        raise ValueError(
            f"{BENCHMARK_FILE} is of a model of {model['parameters']:,} parameters, and {str(folder)!r} has {own:,}; "
            f"run `kronecker-transformers benchmark {folder} --against ...` again, or remove it"
        )
    return (
        f"{model['milliseconds']:.1f} ms for {found['batch']} x {found['length']} tokens in {found['dtype']} on "
        f"{found['device']}{_engine(found)}, {found['speedup']:.2f} times as fast as {Path(against['name']).name} with "
        f"{against['milliseconds']:.1f} ms ({found['environment']})."
    )


def _engine(found: Mapping[str, Any]) -> str:
    """What computed a benchmark, where it was not PyTorch as it is."""
    runtime = found.get("runtime", "torch")
    return f" with {runtime}" if runtime != "torch" else " with torch.compile" if found.get("compiled") else ""


def _quality(record: Mapping[str, Any]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Rows of the table of quality, and the models it compares."""
    rows, models = record.get("rows", {}), record.get("models", [])
    shown = [
        (label, ["-" if value is None else f"{value:.4g}" for value in values[: len(models)]])
        for label, values in rows.items() if label != "parameters"
    ]  # fmt: skip
    return shown, models


def _benchmark(options: Mapping[str, Any]) -> dict[str, Any]:
    """The public task that an example was run on, as `EvalResult` wants it; empty where the data were others."""
    if options.get("train_file") or options.get("validation_file"):
        return {}
    if task := options.get("task_name"):
        return {"task_type": "text-classification", "dataset_type": "nyu-mll/glue", "dataset_name": f"GLUE {task}",
                "dataset_config": task}  # fmt: skip
    if version := options.get("version"):
        name = "rajpurkar/squad_v2" if version == "v2.0" else "rajpurkar/squad"
        return {"task_type": "question-answering", "dataset_type": name, "dataset_name": f"SQuAD {version}"}
    return {}


def _eval_results(record: Mapping[str, Any], options: Mapping[str, Any]) -> list[EvalResult]:
    """The student's scores on GLUE or SQuAD, as the Hub wants them; none of a part of the dev set."""
    where = _benchmark(options)
    if not where or options.get("max_eval_samples"):
        return []
    scores = record.get("metrics", {}).get("student", {})
    found = []
    for name, value in scores.items():
        metric, split = _SPLIT.fullmatch(name).groups()  # type: ignore[union-attr]  # of any name
        if "total" not in name:
            found.append(
                EvalResult(metric_type=metric, metric_value=value, dataset_split=f"validation{split or ''}", **where)
            )
    return found


def _texts(options: Mapping[str, Any]) -> list[str]:
    """What an example was trained on: files, or names of datasets on the Hub."""
    return [*(options.get("train_text") or []), *filter(None, [options.get("train_file")])]


def _datasets(options: Mapping[str, Any]) -> list[str]:
    """Those on the Hub."""
    task = _benchmark(options).get("dataset_type")
    names = {name.partition(":")[0] for name in _texts(options) if is_hub_name(name)}  # without a configuration
    return sorted({*names, *([task] if task else [])})


def _data(options: Mapping[str, Any]) -> str | None:
    """What it was trained on."""
    names = [name if is_hub_name(name) else Path(name).name for name in _texts(options)]
    known = options.get("data") or ", ".join(names) or _benchmark(options).get("dataset_name")
    fraction, samples = options.get("fraction"), options.get("max_train_samples")
    parts = [f"{100 * fraction:.3g}% of it"] if fraction and fraction != 1 else []
    parts += [f"{samples:,} examples of it"] if samples else []
    return known and ", ".join([known, *parts])


def _training(training: Mapping[str, Any]) -> str | None:
    """One sentence."""
    if not training:
        return None
    terms = ", ".join(f"{weight:g} {name}" for name, weight in training["objective"].items())
    optimizer = f" ({training['optimizer']})" if "optimizer" in training else ""
    tokens = f"{training['tokens']:,} tokens, " if training["tokens"] is not None else ""
    return (
        f"{training['steps']:,} steps of {training['batch']} samples ({training['samples']:,} samples, "
        f"{tokens}{training['seconds'] / 60:.1f} minutes), learning rate "
        f"{training['learning_rate']:g}{optimizer}, {training['precision']}, seed {training['seed']}; "
        f"objective: {terms}"
    )


def _depth(record: Mapping[str, Any]) -> dict[str, Any]:
    """How many layers a student keeps that has fewer than its teacher, and how many times smaller than that it is."""
    layers, parameters = record.get("dense_training", {}).get("layers"), record.get("rows", {}).get("parameters")
    known = layers and parameters
    return {"kept": len(layers), "whole": parameters[0] / parameters[-1]} if known else {"kept": 0, "whole": 0}


def _dense_training(training: Mapping[str, Any]) -> str | None:
    """The same for the dense student that was factored."""
    if not training:
        return None
    layers = ", ".join(map(str, training["layers"]))
    return f"layers {layers} of the teacher, counted from 0; {_training(training)}"


def _command(command: list[str] | None) -> str | None:
    """For a shell; of local paths only the last part."""
    if not command:
        return None
    parts = (Path(part).name if part.startswith("/") else without_folders(part) for part in command)
    return f"`{shlex.join(parts)}`"
