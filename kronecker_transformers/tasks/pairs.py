"""One text, or a pair of them, as the token ids of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[str], second: Sequence[str] | None = None, length: int = 128
) -> dict[str, list[Any]]:
    """The tokenizer's columns, a row for each text or pair, cut at `length` tokens; nothing is padded.

    Of a pair the longer text is cut first, token by token, so that both keep a fair share; what divides the two is
    never cut: [SEP], or for a tokenizer without one (GPT-2) a line break, or its end of text if it knows no line break.

    Raises:
        ValueError: a text without any token.
    """
    if second is None or tokenizer.sep_token is not None:
        encoded = dict(tokenizer(list(first), list(second) if second else None, truncation=True, max_length=length))
    else:
        divider = tokenizer("\n", add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
        sides = [tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids for texts in (first, second)]
        rows = []
        for one, other in zip(*sides, strict=True):
            kept = _fair_shares(len(one), len(other), length - len(divider))
            rows.append(one[: kept[0]] + divider + other[: kept[1]])
        encoded = {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
    for text, ids in zip(first, encoded["input_ids"], strict=True):
        if not ids:
            raise ValueError(f"text {text!r} gives no token; every row needs one; remove the row or fill it")
    return encoded


def _fair_shares(one: int, other: int, room: int) -> tuple[int, int]:
    """How much of two lengths stays if the longer one is cut until both fit; the first keeps the odd token."""
    if one + other <= room:
        return one, other
    half = room // 2
    if one <= half:
        return one, room - one
    return (room - other, other) if other <= half else (room - half, half)
