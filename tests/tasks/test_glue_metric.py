import math
import random
import tempfile

import evaluate
import numpy as np
import pytest

from kronecker_transformers.tasks.glue import GLUE_TASKS
from kronecker_transformers.tasks.glue_metric import GlueMetric, headline

# ---- plain loops over the definitions ----


def accuracy(predicted, true):
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def counts(predicted, true):
    pairs = list(zip(predicted, true, strict=True))
    return (pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0)))


def f1(predicted, true):
    hits, false_alarms, misses, _ = counts(predicted, true)
    precision, recall = hits / (hits + false_alarms), hits / (hits + misses)
    return 2 * precision * recall / (precision + recall)


def matthews(predicted, true):
    tp, fp, fn, tn = counts(predicted, true)
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def pearson(predicted, true):
    p_mean, t_mean = sum(predicted) / len(predicted), sum(true) / len(true)
    covariance = sum((p - p_mean) * (t - t_mean) for p, t in zip(predicted, true, strict=True))
    return covariance / math.sqrt(sum((p - p_mean) ** 2 for p in predicted) * sum((t - t_mean) ** 2 for t in true))


def ranks(values):
    """Of equal values, each has the mean of the ranks that they take together."""
    return [sum(other < v for other in values) + (values.count(v) + 1) / 2 for v in values]


def spearman(predicted, true):
    return pearson(ranks(predicted), ranks(true))


ORACLES = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews,
    "pearson": pearson,
    "spearmanr": spearman,
}
METRICS = {
    "cola": {"matthews_correlation"},
    "mnli": {"accuracy"},
    "mrpc": {"accuracy", "f1"},
    "qnli": {"accuracy"},
    "qqp": {"accuracy", "f1"},
    "rte": {"accuracy"},
    "sst2": {"accuracy"},
    "stsb": {"pearson", "spearmanr"},
}


def values(task, generator, count=57):
    if task == "stsb":  # few different scores, so that there are many ties
        return [generator.randint(0, 10) / 2 for _ in range(count)]
    return [generator.randrange(len(GLUE_TASKS[task].labels)) for _ in range(count)]


@pytest.mark.parametrize("task", METRICS)
def test_equals_plain_loops(task):
    generator = random.Random(task)
    metric = GlueMetric(task)
    assert isinstance(metric, evaluate.Metric)
    for _ in range(3):
        predicted, true = values(task, generator), values(task, generator)
        found = metric.compute(predictions=predicted, references=true)
        assert found == pytest.approx({name: ORACLES[name](predicted, true) for name in METRICS[task]}, abs=1e-12)
        assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("task", "predicted", "true", "expected"),
    [
        ("sst2", [1, 0, 1, 1], [1, 0, 0, 1], {"accuracy": 0.75}),
        ("mnli", [2, 0, 1, 1, 0], [2, 0, 1, 0, 2], {"accuracy": 0.6}),
        ("mrpc", [1, 1, 1, 0], [1, 1, 0, 1], {"accuracy": 0.5, "f1": 2 / 3}),
        ("qqp", [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], {"accuracy": 0.8, "f1": 2 / 3}),  # of the class 0 it were 6 / 7
        ("qqp", [0, 0], [1, 0], {"accuracy": 0.5, "f1": 0.0}),
        ("qqp", [0, 0], [0, 0], {"accuracy": 1.0, "f1": 0.0}),  # no positive at all: 0 by convention
        ("cola", [1, 1, 1, 0], [1, 1, 0, 0], {"matthews_correlation": 1 / math.sqrt(3)}),
        ("cola", [0, 1, 0], [1, 0, 1], {"matthews_correlation": -1.0}),
        ("stsb", [1, 2, 3], [1, 4, 9], {"pearson": 8 / math.sqrt(2 * 294 / 9), "spearmanr": 1.0}),
        ("stsb", [1, 2, 2], [1, 2, 3], {"pearson": math.sqrt(3) / 2, "spearmanr": math.sqrt(3) / 2}),
        # Different only beyond 32 bits, and still not a tie.
        ("stsb", [1.0, 1 + 1e-9, 2.0], [0.0, 1.0, 2.0], {"pearson": math.sqrt(3) / 2, "spearmanr": 1.0}),
    ],
)
def test_by_hand(task, predicted, true, expected):
    assert GlueMetric(task).compute(predictions=predicted, references=true) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("task", "predicted", "true"),
    [
        ("cola", [1, 1, 1], [1, 0, 1]),
        ("cola", [1, 0, 1], [1, 1, 1]),
        ("cola", [1, 1], [1, 1]),
        ("stsb", [2.5, 2.5, 2.5], [1.0, 2.0, 3.0]),
        ("stsb", [1.0, 2.0, 3.0], [2.5, 2.5, 2.5]),
        ("stsb", [1.0], [1.0]),
    ],
)
def test_correlation_with_a_constant_is_logged_and_counts_as_zero(task, predicted, true, caplog):
    found = GlueMetric(task).compute(predictions=predicted, references=true)
    assert found == dict.fromkeys(METRICS[task], 0.0)
    assert sorted(record.args[0] for record in caplog.records) == sorted(METRICS[task])
    assert "is not defined" in caplog.text


def test_values_that_are_all_but_constant_raise_no_warning():
    near = [1.0, 1.0 + 2**-52, 1.0 + 2**-51]
    found = GlueMetric("stsb").compute(predictions=near, references=[1.0, 2.0, 3.0])
    assert found["spearmanr"] == pytest.approx(1.0)
    assert math.isfinite(found["pearson"])


def test_batches_of_any_kind_add_up_and_are_forgotten_after_compute():
    metric = GlueMetric("mrpc")
    for _ in range(2):
        metric.add_batch(predictions=np.array([1, 1]), references=np.array([1, 1]))
        metric.add_batch(predictions=[1], references=(0,))
        metric.add(prediction=0, reference=1)
        assert metric.compute() == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    metric = GlueMetric("qnli")
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.5}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "predicted", "true", "message"),
    [
        ("rte", [0, 1], [-1, -1], r"references for rte.* hold \[-1\.0\]; they must be class ids from 0 to 1; give one"),
        ("rte", [0.7, 1], [0, 1], r"predictions for rte.* hold \[0\.7\]; they must be class ids from 0 to 1"),
        ("mnli", [3, 1], [0, 1], r"predictions for mnli.* hold \[3\.0\]; they must be class ids from 0 to 2"),
        ("stsb", [math.nan, 1], [0, 1], r"predictions for stsb.* hold \[nan\]; they must be finite numbers"),
        ("stsb", [], [], r"predictions for stsb, of shape \(0,\), hold \[\]"),
        ("rte", [1], [1, 0], "Mismatch in the number of predictions"),
    ],
)
def test_bad_values(task, predicted, true, message):
    metric = GlueMetric(task)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predicted, references=true)
    again = values(task, random.Random(0))
    assert set(metric.compute(predictions=again, references=again).values()) == {1.0}  # it is as good as new


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("cola", "matthews_correlation"),
        ("mnli", "accuracy"),
        ("mrpc", "accuracy"),
        ("qnli", "accuracy"),
        ("qqp", "accuracy"),
        ("rte", "accuracy"),
        ("sst2", "accuracy"),
        ("stsb", "spearmanr"),
    ],
)
def test_headline(task, name):
    metrics = {metric: 0.25 + len(metric) for metric in METRICS[task]}
    assert headline(task, metrics) == (name, metrics[name])
    assert GLUE_TASKS[task].headline == name


def test_unknown_names():
    with pytest.raises(ValueError, match="task 'wnli' is not a GLUE task of the papers; choose one of cola, mnli"):
        GlueMetric("wnli")
    with pytest.raises(ValueError, match="task 'glue' is not"):
        headline("glue", {})
    with pytest.raises(ValueError, match=r"metrics \['f1'\] lack 'spearmanr', the headline of stsb; give those of"):
        headline("stsb", {"f1": 0.5})
