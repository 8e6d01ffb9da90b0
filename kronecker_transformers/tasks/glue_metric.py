"""The official metrics of GLUE (Wang et al., 2019, table 1) as a local `evaluate` metric: nothing is downloaded."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import evaluate
import numpy as np
from datasets import Features, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .glue import glue_task

logger = logging.getLogger(__name__)

_Measure = Callable[[np.ndarray, np.ndarray], float]


class GlueMetric(evaluate.Metric):
    """The metrics of one GLUE task, as fractions of 1.

    CoLA: matthews_correlation. MRPC and QQP: accuracy, and f1 of the class 1. STS-B: pearson and spearmanr. All others:
    accuracy. A correlation with a constant is not defined; it is logged and counts as 0.

    Predictions and references are ids of classes, or scores. They are kept in memory until `compute`, in one process.

    Args:
        config_name: a name in `GLUE_TASKS`.

    Raises:
        ValueError: an unknown task.
    """

    def __init__(self, config_name: str) -> None:
        self.task = glue_task(config_name)
        with tempfile.TemporaryDirectory() as unused:  # the base class makes its folder even if it writes nothing there
            super().__init__(config_name, keep_in_memory=True, cache_dir=unused)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019",
            # Not integers even for classes: `evaluate` would cut off the fractions of scores without a word. And as
            # lists: its arrays have 32 bits, which makes ties where there are none.
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        predicted = self.task.checked("predictions", predictions)
        true = self.task.checked("references", references)
        return {name: float(_MEASURES[name](true, predicted)) for name in self.task.metrics}


def headline(task: str, metrics: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the one metric of a task that a table of results shows.

    It is the one of the papers' tables on the development sets: matthews_correlation for CoLA, spearmanr for STS-B, and
    accuracy for all others. For MRPC and QQP, tables of the GLUE server show f1 as well; it stays in `metrics`.

    Raises:
        ValueError: an unknown task, or metrics of another task.
    """
    name = glue_task(task).headline
    if name not in metrics:
        raise ValueError(
            f"metrics {sorted(metrics)} lack {name!r}, the headline of {task}; give those of GlueMetric({task!r})"
        )
    return name, metrics[name]


def _correlation(name: str, measure: _Measure, true: np.ndarray, predicted: np.ndarray) -> float:
    """A correlation, or 0 where it is not defined."""
    if true.min() < true.max() and predicted.min() < predicted.max():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are all but constant
            value = float(measure(true, predicted))
        if math.isfinite(value):
            return value
    logger.warning("%s is not defined, as all predictions or all references are the same; it counts as 0", name)
    return 0.0


_MEASURES: dict[str, _Measure] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0.0),
    "matthews_correlation": partial(_correlation, "matthews_correlation", matthews_corrcoef),
    "pearson": partial(_correlation, "pearson", lambda true, predicted: pearsonr(true, predicted).statistic),
    "spearmanr": partial(_correlation, "spearmanr", lambda true, predicted: spearmanr(true, predicted).statistic),
}
