"""Answers to the questions of SQuAD, from a model's logits for their windows.

The tokens from i to j of a window answer with

    score(i, j) = start[i] + end[j],  i <= j < i + max_answer_length,

and the empty answer of version 2.0 has the score start[0] + end[0] of the window where it is least (BERT,
arXiv:1810.04805, sections 4.2 and 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.lib.stride_tricks import sliding_window_view

from .squad import context_tokens
from .squad_metric import score_answer


class Candidate(NamedTuple):
    """A possible answer, its score (a sum of two logits), and its probability among the candidates of its question."""

    text: str
    score: float
    probability: float


class Answers(NamedTuple):
    """What a model answers, by the id of the question.

    null_odds is the score of the empty answer less that of the best other one, inf where there is no other.
    """

    predictions: dict[str, str]
    n_best: dict[str, list[Candidate]]
    null_odds: dict[str, float]


def answers_from_logits(
    examples: Dataset | Sequence[Mapping[str, Any]],
    features: Dataset | Sequence[Mapping[str, Any]],
    start_logits: np.ndarray | Sequence[Any],
    end_logits: np.ndarray | Sequence[Any],
    n_best: int = 20,
    max_answer_length: int = 30,
    no_answer_threshold: float | None = 0.0,
) -> Answers:
    """The best answers over all windows of each question.

    The candidates are the n_best spans of every window; spans of the same text count once, with the best score. With
    a threshold the empty answer is a candidate too, beyond n_best.

    Args:
        examples: the columns id and context.
        features: what `evaluation_features` made of them.
        start_logits: (windows, tokens); rows may be longer than their window, what follows it is not read.
        end_logits: likewise.
        max_answer_length: in tokens, at least 1.
        no_answer_threshold: null_odds above it make the answer empty; inf only where there is no other; None, for
            version 1.1, likewise, and the empty answer is no candidate.

    Raises:
        ValueError: inputs that do not fit together, logits that are not finite, or a number below 1.
    """
    for name, value in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1; 20 and 30 are usual")
    if not len(features) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"features has {len(features)} windows, start_logits {len(start_logits)} and end_logits {len(end_logits)} "
            "rows; they must be as many; predict exactly these features"
        )
    contexts = {row["id"]: row["context"] for row in _columns(examples, "id", "context")}
    if len(contexts) < len(examples):
        raise ValueError(f"{len(examples)} examples have {len(contexts)} ids; ids must be unique; remove the others")
    scores: dict[str, dict[str, float]] = {name: {} for name in contexts}
    null = dict.fromkeys(contexts, math.inf)
    windows = zip(_columns(features, "example_id", "offset_mapping"), start_logits, end_logits, strict=True)
    for feature, *logits in windows:
        name, offsets = feature["example_id"], feature["offset_mapping"]
        if name not in contexts:
            raise ValueError(f"example_id {name!r} of features is not in examples; give those they were made of")
        start, end = (np.asarray(row, dtype=np.float64)[: len(offsets)] for row in logits)
        if not len(start) == len(end) == len(offsets) or not np.isfinite([start, end]).all():
            raise ValueError(
                f"logits of question {name!r} are {len(start)} and {len(end)} for {len(offsets)} tokens, or are not "
                "finite; each token needs two finite ones; predict these features with a sound model"
            )
        null[name] = min(null[name], start[0] + end[0])
        low, high = context_tokens(offsets)
        for score, i, j in _best_spans(start[low:high], end[low:high], n_best, max_answer_length):
            text = contexts[name][offsets[low + i][0] : offsets[low + j][1]].strip()
            if text:
                scores[name][text] = max(score, scores[name].get(text, -math.inf))
    if missing := [name for name, score in null.items() if score == math.inf]:
        raise ValueError(
            f"{len(missing)} of {len(null)} questions have no window in features, {missing[0]!r} first; "
            "each needs one or more; make features of all these examples"
        )
    answers = Answers({}, {}, {})
    for name, texts in scores.items():
        ranked = sorted(texts.items(), key=lambda item: -item[1])[:n_best]
        answer, score = ranked[0] if ranked else ("", -math.inf)
        odds = null[name] - score
        if no_answer_threshold is not None:
            ranked = sorted([*ranked, ("", null[name])], key=lambda item: -item[1])
        answers.n_best[name] = _candidates(ranked)
        answers.null_odds[name] = odds
        answers.predictions[name] = "" if no_answer_threshold is not None and odds > no_answer_threshold else answer
    return answers


def _columns(rows: Dataset | Sequence[Mapping[str, Any]], *names: str) -> Any:
    return rows.select_columns(list(names)) if isinstance(rows, Dataset) else rows  # the others are slow to read


def _best_spans(start: np.ndarray, end: np.ndarray, count: int, longest: int) -> Iterator[tuple[float, int, int]]:
    """The highest start[i] + end[j] with i <= j < i + longest, in no order, as (score, i, j)."""
    longest = min(longest, len(start))
    if not longest:
        return
    ends = sliding_window_view(np.pad(end, (0, longest - 1), constant_values=-np.inf), longest)
    scores = (start[:, None] + ends).ravel()  # (T * longest,): score(i, i + k) at i * longest + k
    best = np.argpartition(scores, -min(count, scores.size))[-count:]
    for index in best[np.isfinite(scores[best])]:
        i, k = divmod(int(index), longest)
        yield float(scores[index]), i, i + k


def _candidates(ranked: list[tuple[str, float]]) -> list[Candidate]:
    weights = [math.exp(score - ranked[0][1]) for _, score in ranked]
    return [
        Candidate(text, score, weight / sum(weights)) for (text, score), weight in zip(ranked, weights, strict=True)
    ]


class Thresholds(NamedTuple):
    """The highest "exact" and "f1" of `SquadMetric("v2.0")`, in per cent, and the no-answer thresholds that give them.

    A threshold of -inf leaves every question without an answer.
    """

    exact: float
    exact_threshold: float
    f1: float
    f1_threshold: float


def best_threshold(
    n_best: Mapping[str, Sequence[Candidate]],
    null_odds: Mapping[str, float],
    examples: Dataset | Sequence[Mapping[str, Any]],
) -> Thresholds:
    """The thresholds for `answers_from_logits` that score best on questions with known answers.

    As in the official script the least one is taken of those that are equally good. Unlike there, questions of the
    same odds are answered together, as they must be, and without any answer the threshold is -inf, not 0.

    Args:
        n_best: from `answers_from_logits`, with any threshold.
        null_odds: likewise.
        examples: the columns id and answers.
    """
    names, gains, base = [], [], np.zeros(2)
    for row in _columns(examples, "id", "answers"):
        answer = next((candidate.text for candidate in n_best[row["id"]] if candidate.text), "")
        empty, given = (np.array(score_answer(text, row["answers"]["text"], "v2.0")) for text in ("", answer))
        names.append(row["id"])
        gains.append(given - empty)
        base += empty
    odds = np.array([null_odds[name] for name in names])
    order = np.argsort(odds)
    thresholds = np.concatenate([[-np.inf], odds[order]])
    totals = np.vstack([base, base + np.cumsum(np.array(gains)[order], axis=0)])  # (1 + questions, 2)
    reached = np.append(thresholds[1:] > thresholds[:-1], True)
    thresholds, totals = thresholds[reached], 100 * totals[reached] / len(names)
    exact, f1 = totals.argmax(axis=0)
    return Thresholds(float(totals[exact, 0]), float(thresholds[exact]), float(totals[f1, 1]), float(thresholds[f1]))
