"""SQuAD 1.1 and 2.0: questions are read, and cut into windows.

A context longer than a model's input is read in windows that overlap (BERT, arXiv:1810.04805, section 4.2).
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .squad_metric import Version

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


def context_tokens(offsets: _Offsets) -> tuple[int, int]:
    """The tokens [low, high) of a window that stand for context."""
    inside = [i for i, pair in enumerate(offsets) if pair is not None]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _answer_tokens(answers: Mapping[str, Sequence[Any]], offsets: _Offsets) -> tuple[int, int]:
    """The first and the last token of the first answer, (0, 0) unless the window holds all of it."""
    low, high = context_tokens(offsets)
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
