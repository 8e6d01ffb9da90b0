"""Which dense models can be compressed."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.kronecker_family import FACTORED_CLASSES, supported_classes
from .load import load_teacher


def check_teacher(
    teacher: str | os.PathLike[str] | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A teacher that can be compressed, loaded if it is not, and its tokenizer.

    Raises:
        TypeError, ValueError, OSError: as `compress.compress`.
    """
    if not isinstance(teacher, (PreTrainedModel, str, os.PathLike)):
        raise TypeError(f"teacher of type {type(teacher).__name__} must be a name, a folder or a loaded model")
    if not isinstance(teacher, PreTrainedModel):
        teacher, own_tokenizer = load_teacher(teacher)
        tokenizer = tokenizer or own_tokenizer
    if type(teacher) not in FACTORED_CLASSES:
        name = type(teacher).__name__
        raise ValueError(f"teacher of class {name} is not supported; supported are {supported_classes()}")
    check_finite(teacher)
    return teacher, tokenizer


@torch.no_grad()
def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ValueError: a parameter is NaN, infinite or on the meta device; the message names it.
    """
    for name, parameter in model.named_parameters():
        where = f"parameter {name!r} of the {type(model).__name__}"
        if parameter.is_meta:
            raise ValueError(f"{where} is on the meta device; load its weights first")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{where} holds NaN or infinite values; repair or reload it first")
