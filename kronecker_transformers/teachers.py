"""Which dense models can be compressed."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import load_teacher
from .models import DENSE_CLASSES

STUDENT_CLASSES = {dense: student for student, dense in DENSE_CLASSES.items()}
"""Factored class by its stock class."""


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
    if type(teacher) not in STUDENT_CLASSES:
        supported = ", ".join(sorted(dense.__name__ for dense in STUDENT_CLASSES))
        raise ValueError(f"teacher of class {type(teacher).__name__} is not supported; supported are {supported}")
    check_finite(teacher)
    return teacher, tokenizer


def model_like(source: PreTrainedModel, model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A new model of another class, with the kind of attention and the pooler of `source`, or without one."""
    config._attn_implementation = source.config._attn_implementation
    choices = {}
    if source.base_model is source and hasattr(source, "pooler"):
        choices["add_pooling_layer"] = source.pooler is not None
    return model_class(config, **choices)


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
