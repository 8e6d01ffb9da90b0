"""Exact match and F1 on SQuAD 1.1 (arXiv:1606.05250) and 2.0 (arXiv:1806.03822), by the rules of the official scripts.

Answers are compared as lists of words, in lower case, without ASCII punctuation and without the articles a, an and the.
A prediction of p words that shares c of them, repetitions counted, with a gold answer of g words has

    precision = c / p,  recall = c / g,  F1 = 2 precision recall / (precision + recall) = 2 c / (p + g),

and the best of a question's gold answers counts. The two scripts differ:

- In 2.0 a question without gold answers has the gold answer "". In 1.1 there is no such question.
- In 2.0 gold answers without words, such as "The", are dropped; a question that has no other expects the empty answer,
  yet still counts among those with an answer (HasAns). In 1.1 they stay.
- Where both sides have no words, F1 is 1 in 2.0, but 0 in 1.1, although the match is exact.
- A question without a prediction counts 0 in 1.1 and is left out in 2.0. Here it is an error in both.
"""

from __future__ import annotations

import re
import string
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import evaluate
from datasets import Features, List, Value

Version = Literal["v1.1", "v2.0"]
_Rows = Sequence[Mapping[str, Any]]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Score(NamedTuple):
    """How well one prediction answers one question; both are from 0 to 1."""

    exact: float
    f1: float


def answer_words(text: str) -> list[str]:
    """The words of an answer that are compared: no case, no punctuation, no articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def score_answer(prediction: str, gold_answers: Sequence[str], version: Version) -> Score:
    """The best score of a prediction over the gold answers of its question; of v2.0 they may be none.

    Raises:
        ValueError: no gold answers in v1.1.
    """
    predicted, golds = answer_words(prediction), [answer_words(gold) for gold in gold_answers]
    if version == "v2.0":
        golds = [gold for gold in golds if gold] or [[]]
    elif not golds:
        raise ValueError("gold_answers is empty; a question of v1.1 has at least one; score it as v2.0")
    exact = max(float(predicted == gold) for gold in golds)
    return Score(exact, max(_f1(predicted, gold, version) for gold in golds))


def _f1(predicted: list[str], gold: list[str], version: Version) -> float:
    if not predicted or not gold:
        return float(version == "v2.0" and predicted == gold)
    return 2 * (Counter(predicted) & Counter(gold)).total() / (len(predicted) + len(gold))


class SquadMetric(evaluate.Metric):
    """Scores of SQuAD in per cent, 0 to 100.

    `compute(predictions=[{"id", "prediction_text"}], references=[{"id", "answers"}])`, each in any order, gives
    exact_match and f1 for v1.1. For v2.0 it gives exact, f1 and total, the number of questions, and the same three with
    the prefix HasAns_ for the questions with an answer and NoAns_ for those without, where there are any.

    Predictions and references are kept in memory until `compute`, in one process; nothing is downloaded.

    Raises:
        ValueError: another version; no questions, or one without a prediction; in `compute`.
    """

    def __init__(self, config_name: Version = "v1.1") -> None:
        if config_name not in ("v1.1", "v2.0"):
            raise ValueError(f"config_name is {config_name!r}; SQuAD has the versions 'v1.1' and 'v2.0'; name one")
        with tempfile.TemporaryDirectory() as unused:  # the base class makes its folder even if it writes nothing there
            super().__init__(config_name, keep_in_memory=True, cache_dir=unused)

    def _info(self) -> evaluate.MetricInfo:
        answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
        features = {
            "predictions": {"id": Value("string"), "prediction_text": Value("string")},
            "references": {"id": Value("string"), "answers": answers},
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="Rajpurkar et al., SQuAD, EMNLP 2016; Rajpurkar et al., Know What You Don't Know, ACL 2018",
            features=Features(features),
        )

    def compute(self, *, predictions: _Rows | None = None, references: _Rows | None = None, **more: Any) -> Any:
        """The scores of all that was added, and of these."""
        if predictions is not None and references is not None:
            _pairs(predictions, references)  # the base class would only say that their numbers differ
        return super().compute(predictions=predictions, references=references, **more)

    def _compute(self, predictions: _Rows, references: _Rows) -> dict[str, float]:
        version: Version = self.config_name
        pairs = _pairs(predictions, references)
        scores = [score_answer(prediction, golds, version) for prediction, golds in pairs]
        if version == "v1.1":
            return _percent(scores, "exact_match", "f1")
        answered = [score for score, (_, golds) in zip(scores, pairs, strict=True) if golds]
        unanswered = [score for score, (_, golds) in zip(scores, pairs, strict=True) if not golds]
        results: dict[str, float] = {}
        for prefix, group in (("", scores), ("HasAns_", answered), ("NoAns_", unanswered)):
            if group:
                results |= _percent(group, f"{prefix}exact", f"{prefix}f1") | {f"{prefix}total": len(group)}
        return results


def _pairs(predictions: _Rows, references: _Rows) -> list[tuple[str, list[str]]]:
    """The prediction and the gold answers of each question."""
    predicted = {row["id"]: row["prediction_text"] for row in predictions}
    golds = {row["id"]: row["answers"]["text"] for row in references}
    if not golds or len(golds) < len(references) or len(predicted) < len(predictions):
        raise ValueError(
            f"{len(references)} references have {len(golds)} ids and {len(predictions)} predictions {len(predicted)}; "
            "there must be one or more, each with an id of its own; remove the others"
        )
    for name, one, other in (("prediction", golds, predicted), ("reference", predicted, golds)):
        if missing := sorted(one.keys() - other.keys()):
            raise ValueError(
                f"{len(missing)} of {len(one)} questions have no {name}, {missing[0]!r} first; each needs one; "
                'add it, a prediction of "" for no answer'
            )
    return [(predicted[name], golds[name]) for name in golds]


def _percent(scores: list[Score], exact: str, f1: str) -> dict[str, float]:
    return {
        name: 100 * sum(column) / len(scores)
        for name, column in zip((exact, f1), zip(*scores, strict=True), strict=True)
    }
