"""Which dense models can be compressed."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.kronecker_family import FACTORED_CLASSES, family_of, heads_of, supported_classes
from .convert import model_like
from .load import load_teacher, remember_truncation


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
    remember_truncation(tokenizer)
    if type(teacher) not in FACTORED_CLASSES:
        name = type(teacher).__name__
        raise ValueError(f"teacher of class {name} is not supported; supported are {supported_classes()}")
    layers: Any = teacher.base_model.get_submodule(family_of(teacher).layers)
    depth = len(layers)
    if depth != teacher.config.num_hidden_layers:
        raise ValueError(
            f"teacher has {depth} layers, and its config says num_hidden_layers={teacher.config.num_hidden_layers}; "
            "make both agree first"
        )
    _check_parameters(teacher)
    check_finite(teacher)
    return teacher, tokenizer


def _check_parameters(teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose modules are not those of its class and config."""
    with torch.device("meta"):
        stock = model_like(teacher, type(teacher), copy.deepcopy(teacher.config))
    found = {name: tuple(p.shape) for name, p in teacher.named_parameters(remove_duplicate=False)}
    for name, parameter in stock.named_parameters(remove_duplicate=False):
        if found.get(name) != (wanted := tuple(parameter.shape)):
            own = f"has shape {found[name]}" if name in found else "is missing or no parameter"
            raise ValueError(
                f"{name!r} of the {type(teacher).__name__} {own}, and its config says {wanted}; make both agree (for "
                "an embedding by resize_token_embeddings), and remove parametrizations, adapters and quantization first"
            )


def needs_pad_token(model: PreTrainedModel) -> bool:
    """Whether a model can classify only one text at a time, since it does not know which tokens are padding."""
    heads = heads_of(model)
    is_classifier = bool(heads) and heads[0].kind == "sequence" and family_of(model).causal
    return is_classifier and model.config.pad_token_id is None


def check_pad_token(model: PreTrainedModel) -> None:
    """Refuse such a model.

    Raises:
        ValueError: with the remedy.
    """
    if needs_pad_token(model):
        raise ValueError(
            f"the {type(model).__name__} has no pad_token_id in its config, so it cannot read several texts at once; "
            "set model.config.pad_token_id, for instance to its eos_token_id, and save the model"
        )


def check_vocabulary(model: PreTrainedModel, token: int) -> None:
    """Refuse a token, the largest of a text, that the embedding does not have.

    Raises:
        ValueError: with the remedy.
    """
    embedding: Any = model.get_input_embeddings()
    if token >= embedding.num_embeddings:
        raise ValueError(
            f"the tokenizer gives token {token}, but the model's embedding has {embedding.num_embeddings} rows; use "
            "its own"
        )


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
