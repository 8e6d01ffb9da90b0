"""From a dense teacher to a factored student and back.

The student is the teacher with the layers of a plan replaced by their nearest sums of Kronecker products
(KroneckerBERT, section 3.4; KnGPT2, section 2); everything else is copied bit by bit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from . import models
from .checkpoint import load_teacher, save_folder
from .factorization.nearest import nearest_kronecker
from .models.kronecker_layers import KroneckerEmbedding, KroneckerLinear
from .report import Report, describe

DENSE_CLASSES: dict[str, type[PreTrainedModel]] = {
    name: getattr(transformers, name.removeprefix("Kronecker"))
    for name in models.__all__
    if isinstance(getattr(models, name), type) and issubclass(getattr(models, name), PreTrainedModel)
}
"""Stock class by the name of its factored class."""
STUDENT_CLASSES = {dense: getattr(models, name) for name, dense in DENSE_CLASSES.items()}
"""Factored class by its stock class."""


@dataclass(frozen=True)
class CompressionResult:
    """A student, its tokenizer (None where the teacher came without one) and what was lost."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    report: Report

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a checkpoint that loads anywhere; `folder` must not exist yet or be empty.

        Raises:
            FileExistsError: the folder holds something.
            OSError: it cannot be written; nothing is left behind.
        """
        return save_folder(folder, self.model, self.tokenizer, self.report)


def compress(
    teacher: str | os.PathLike[str] | PreTrainedModel, plan: str | Mapping[str, Any] = "7.7x", *, progress: bool = False
) -> CompressionResult:
    """Factor a dense BERT or GPT-2.

    Args:
        teacher: a name on the Hub, a folder, or a loaded model, with any head that `STUDENT_CLASSES` lists.
        plan: name of a preset, a `FactorPlan`, or a mapping from pattern to ``(m1, n1, terms)``.
        progress: show a progress bar on standard error.

    Returns:
        The student in evaluation mode, in the teacher's dtype and on its device; the teacher is not changed.

    Raises:
        ValueError: unsupported teacher, a plan that does not fit, or weights that are not finite.
        OSError: the teacher cannot be read.
    """
    tokenizer = None
    if not isinstance(teacher, PreTrainedModel):
        teacher, tokenizer = load_teacher(teacher, {dense.__name__: dense for dense in STUDENT_CLASSES})
    if type(teacher) not in STUDENT_CLASSES:
        supported = ", ".join(sorted(dense.__name__ for dense in STUDENT_CLASSES))
        raise ValueError(f"teacher of class {type(teacher).__name__} is not supported; supported are {supported}")
    student_class = STUDENT_CLASSES[type(teacher)]
    config = student_class.config_class.from_dense(teacher.config, plan)
    config.name_or_path = teacher.config.name_or_path
    head = teacher.get_output_embeddings()
    if head is not None and head.weight is not teacher.get_input_embeddings().weight:
        config.tie_word_embeddings = False
    student = _empty_like(student_class, config, teacher)

    _check_finite(teacher)
    errors: dict[str, float] = {}
    dense_modules = dict(teacher.named_modules())
    factored = [
        (name, m)
        for name, m in student.named_modules()
        if isinstance(m, (KroneckerLinear, KroneckerEmbedding)) and f"{name}.A" not in student.all_tied_weights_keys
    ]
    for name, module in tqdm(factored, desc="factoring", unit="layer", disable=not progress):
        weight = _weight(dense_modules[name])
        m1, terms, n1 = module.A.shape
        try:
            result = nearest_kronecker(weight, m1, n1, terms)
        except ValueError as error:
            raise ValueError(f"layer {name!r} with weight {tuple(weight.shape)}: {error}") from error
        _set_parameter(module, "A", result.A, dense_modules[name].weight)
        _set_parameter(module, "B", result.B, dense_modules[name].weight)
        errors[name] = result.relative_error
    _copy_rest(teacher, student)
    return CompressionResult(student, tokenizer, describe(student, errors))


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense twin of a factored model: factors multiplied out, a stock BERT or GPT-2 class.

    It gives the same outputs, runs wherever the stock model runs, and saves no space.

    Raises:
        ValueError: the model is not one of the factored classes.
    """
    dense_class = DENSE_CLASSES.get(type(model).__name__)
    if dense_class is None:
        raise ValueError(
            f"model of class {type(model).__name__} has no dense twin; supported are {', '.join(DENSE_CLASSES)}"
        )
    dense = _empty_like(dense_class, model.config.to_dense_config(), model)
    factored_modules = dict(model.named_modules())
    for name, module in dense.named_modules():
        source = factored_modules[name]
        tied = f"{name}.weight" in dense.all_tied_weights_keys
        if isinstance(source, (KroneckerLinear, KroneckerEmbedding)) and not tied:
            weight = source.to_dense().detach()
            _set_parameter(
                module, "weight", weight.t().contiguous() if isinstance(module, Conv1D) else weight, source.A
            )
    _copy_rest(model, dense)
    return dense


def _empty_like(model_class: type[PreTrainedModel], config: Any, source: PreTrainedModel) -> PreTrainedModel:
    """A model of another class, with the attention and the pooler of `source`, without memory for its weights."""
    config._attn_implementation = source.config._attn_implementation
    choices = {}
    if source.base_model is source and hasattr(source, "pooler"):
        choices["add_pooling_layer"] = source.pooler is not None
    with torch.device("meta"):
        return model_class(config, **choices)


def _copy_rest(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy to `target` the parameters and buffers that it shares with `source`, bit by bit, then its settings."""
    source_modules = dict(source.named_modules())
    for name, module in target.named_modules():
        other = source_modules[name]
        for key, parameter in other.named_parameters(recurse=False):
            if getattr(module._parameters.get(key), "is_meta", False):
                _set_parameter(module, key, parameter.detach().clone(), parameter)
        for key, buffer in other.named_buffers(recurse=False):
            module._buffers[key] = buffer.detach().clone()
    target.tie_weights()
    if source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    target.eval()


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor, like: nn.Parameter) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=like.requires_grad))


def _weight(module: nn.Module) -> torch.Tensor:
    """The weight (m outputs, n inputs) of a dense layer; Conv1D stores its transpose."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def _check_finite(teacher: PreTrainedModel) -> None:
    for name, parameter in teacher.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"parameter {name!r} of the teacher holds NaN or infinite values; repair or reload the teacher first"
            )
