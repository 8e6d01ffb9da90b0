"""SQuAD 1.1 and 2.0: questions are read, cut into windows, and answered from a model's logits.

A context longer than a model's input is read in windows that overlap. The tokens from i to j of a window answer with

    score(i, j) = start[i] + end[j],  i <= j < i + max_answer_length,

and the empty answer of version 2.0 has the score start[0] + end[0] of the window where it is least (BERT,
arXiv:1810.04805, sections 4.2 and 4.3).
"""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from numpy.lib.stride_tricks import sliding_window_view
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .squad_metric import Version, score_answer

logger = logging.getLogger(__name__)

LONGEST_QUESTION = 64
"""Tokens to which a question is cut that leaves no room for its context, as by BERT's own script."""

_Offsets = list[Any]  # for each token of a window (begin, end) in the context, None outside it

HUB_NAMES = {"v1.1": "rajpurkar/squad", "v2.0": "rajpurkar/squad_v2"}

_COLUMNS = Features(
    {name: Value("string") for name in ("id", "title", "context", "question")}
    | {"answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))}}
)


def load_squad(version: Version, data_dir: str | Path | None = None) -> DatasetDict:
    """SQuAD with the splits "train" and "validation" and the columns of `read_squad_file`.

    Args:
        data_dir: a folder with the official train-v1.1.json and dev-v1.1.json, or those of v2.0; None takes the Hub.

    Raises:
        ValueError: another version, or a malformed file.
        OSError: a file is missing, or the Hub cannot be reached.
    """
    if version not in HUB_NAMES:
        raise ValueError(f"version is {version!r}; SQuAD has the versions 'v1.1' and 'v2.0'; name one")
    if data_dir is not None:
        files = {"train": f"train-{version}.json", "validation": f"dev-{version}.json"}
        return DatasetDict({split: read_squad_file(Path(data_dir) / name) for split, name in files.items()})
    try:
        return datasets.load_dataset(HUB_NAMES[version])
    except Exception as error:
        raise OSError(
            f"data set {HUB_NAMES[version]!r} cannot be loaded from the Hub ({error}); "
            "connect, or give data_dir with the official JSON files"
        ) from error


def read_squad_file(path: str | Path) -> Dataset:
    """The questions of one JSON file in the format of SQuAD 1.1 or 2.0, in its order, whatever version it says.

    Answers whose text does not stand at their offset are dropped and counted in a warning, and with its last answer a
    question that is not impossible.

    Returns:
        Columns id, title, context, question and answers, which holds the lists text and answer_start (characters);
        both are empty where the question is impossible.

    Raises:
        ValueError: not a file in this format, no questions, or more than half of the answers not where they should be.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"file {str(path)!r} does not exist; data_dir must hold the official files, such as train-v1.1.json and "
            "dev-v1.1.json; download them there"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        found = [
            _row(article.get("title") or "", paragraph["context"], question)
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"file {str(path)!r} is not in the format of SQuAD 1.1 or 2.0 ({missing}); download or correct it"
        ) from error
    rows = [row for row, _, _ in found if row is not None]
    wrong, answers = [name for _, names, _ in found for name in names], sum(count for _, _, count in found)
    if not rows or 2 * len(wrong) > answers:
        raise ValueError(
            f"file {str(path)!r} has {len(rows)} questions to use, and {len(wrong)} of {answers} answers are not where "
            "answer_start says (in characters, not bytes); correct it"
        )
    if wrong:
        logger.warning(
            "%s: %d of %d answers are not where answer_start says and are dropped, the first in question %r; %d "
            "questions have none left and are dropped too",
            *(path, len(wrong), answers, wrong[0], len(found) - len(rows)),
        )
    return Dataset.from_list(rows, features=_COLUMNS)


def _row(title: str, context: str, question: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str], int]:
    """The row of a question, None if no answer is right; its id for each wrong answer; and how many there are."""
    name, impossible = str(question["id"]), question.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise ValueError(f"is_impossible of question {name!r} is {impossible!r}, not true or false")
    if not isinstance(context, str) or not isinstance(question["question"], str):
        raise ValueError(f"question {name!r} or its context is not a text")
    answers = [] if impossible else question["answers"]
    if not isinstance(answers, list) or not all(isinstance(answer, Mapping) for answer in answers):
        raise ValueError(f"answers of question {name!r} must be a list of objects with text and answer_start")
    if not answers and not impossible:
        raise ValueError(f"question {name!r} has no answers; only impossible ones may have none")
    right = [answer for answer in answers if _stands(context, answer["text"], answer["answer_start"])]
    row = {
        "id": name,
        "title": title,
        "context": context,
        "question": question["question"],
        "answers": {name: [answer[name] for answer in right] for name in ("text", "answer_start")},
    }
    return row if right or impossible else None, [name] * (len(answers) - len(right)), len(answers)


def _stands(context: str, text: Any, start: Any) -> bool:
    return isinstance(text, str) and isinstance(start, int) and start >= 0 and context.startswith(text, start)


def training_features(
    examples: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 384, stride: int = 128
) -> dict[str, list[Any]]:
    """The windows of some questions and the place of the first answer in each; for `Dataset.map`, batched.

    A window is the whole question, then part of the context: [CLS] question [SEP] context [SEP] for BERT. GPT-2 has no
    separator; a line break ends its question. Windows without the whole answer, and those of impossible questions,
    point at position 0: [CLS], or GPT-2's first token, which sees nothing of the context. Nothing is padded;
    `WindowCollator` does that.

    Args:
        examples: the columns question, context and answers.
        max_length: the most tokens of a window.
        stride: the tokens of the context that a window shares with the next.

    Returns:
        The tokenizer's columns, and start_positions and end_positions (tokens, both inclusive), a row for each window.

    Raises:
        TypeError: a slow tokenizer.
        ValueError: a question that leaves too little room for its context.
    """
    windows, owners, offsets = _windows(examples, tokenizer, max_length, stride)
    spans = [_answer_tokens(examples["answers"][owner], pairs) for owner, pairs in zip(owners, offsets, strict=True)]
    return {**windows, "start_positions": [i for i, _ in spans], "end_positions": [j for _, j in spans]}


def evaluation_features(
    examples: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int = 384, stride: int = 128
) -> dict[str, list[Any]]:
    """The windows of `training_features` without labels, as `answers_from_logits` needs them.

    Returns:
        The tokenizer's columns, example_id, and offset_mapping: for each token of the context its characters
        [begin, end), None for the others.
    """
    windows, owners, offsets = _windows(examples, tokenizer, max_length, stride)
    return {**windows, "example_id": [examples["id"][owner] for owner in owners], "offset_mapping": offsets}


def _windows(
    examples: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> tuple[BatchEncoding, list[int], list[_Offsets]]:
    if not tokenizer.is_fast:
        raise TypeError(f"tokenizer {type(tokenizer).__name__} is slow; windows need a fast one; use AutoTokenizer")
    line_break = "" if tokenizer.sep_token else "\n"
    questions = [question.strip() + line_break for question in examples["question"]]
    encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for i, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        if len(ids) > LONGEST_QUESTION and max_length - len(ids) - special <= stride:
            names = examples.get("id") or [""] * len(questions)
            logger.warning("question %r has %d tokens and is cut to %d", names[i], len(ids), LONGEST_QUESTION)
            questions[i] = questions[i][: offsets[LONGEST_QUESTION - 1][1]] + line_break
    kept = tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(len, kept), default=0)
    room = max_length - longest - special
    if not 0 <= stride < room:  # tokenizers would panic
        raise ValueError(
            f"stride is {stride}, and a question of {longest} tokens leaves {room} of max_length {max_length} to its "
            "context; stride must be at least 0 and less than that; lower stride or raise max_length"
        )
    windows = tokenizer(
        questions,
        list(examples["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    offsets = [
        [pair if part == 1 else None for pair, part in zip(pairs, windows.sequence_ids(i), strict=True)]
        for i, pairs in enumerate(windows.pop("offset_mapping"))
    ]
    return windows, windows.pop("overflow_to_sample_mapping"), offsets


def _context(offsets: _Offsets) -> tuple[int, int]:
    """The tokens [low, high) of a window that stand for context."""
    inside = [i for i, pair in enumerate(offsets) if pair is not None]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _answer_tokens(answers: Mapping[str, Sequence[Any]], offsets: _Offsets) -> tuple[int, int]:
    """The first and the last token of the first answer, (0, 0) unless the window holds all of it."""
    low, high = _context(offsets)
    text = next(iter(answers["text"]), "")
    if not text.strip() or low == high:
        return 0, 0
    begin = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    if offsets[low][0] > begin or offsets[high - 1][1] < end:
        return 0, 0
    first = bisect_right(offsets, begin, low, high, key=lambda pair: pair[1])
    last = bisect_left(offsets, end, low, high, key=lambda pair: pair[0]) - 1
    return first, last


@dataclass(frozen=True)
class WindowCollator:
    """Makes a batch of windows, padded on the right, where their positions count from the left.

    The tokenizer's own side may be the left, as is usual for GPT-2; columns that a model does not take are left out.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Windows as tensors, (windows, tokens); positions (windows)."""
        names = [*self.tokenizer.model_input_names, "start_positions", "end_positions"]
        kept = [{name: feature[name] for name in names if name in feature} for feature in features]
        return self.tokenizer.pad(kept, padding_side="right", return_tensors="pt")


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
        low, high = _context(offsets)
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
