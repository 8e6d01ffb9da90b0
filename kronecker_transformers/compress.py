"""From a dense teacher to a factored student and back.

The student is the teacher with the layers of a plan replaced by their nearest sums of Kronecker products
(KroneckerBERT, section 3.4; KnGPT2, section 2), or, with calibration text, by sums that are near on that text;
everything else is copied bit by bit.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .activations import calibration_batches, weight_of
from .calibration import calibrate
from .checkpoint import save_folder
from .factorization.nearest import nearest_kronecker
from .models import DENSE_CLASSES
from .models.kronecker_layers import KroneckerEmbedding, KroneckerLinear
from .report import Report, describe
from .search import search_plan
from .sentence_modules import modules_of, refuse_code, share_modules
from .teachers import STUDENT_CLASSES, check_finite, check_teacher, model_like

DEFAULTS = {"bert": ("7.7x", 7.7), "gpt2": ("kngpt2", 1.48)}
"""By family: the plan if none is given, and its ratio, for which one is searched if there is calibration text."""


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
    teacher: str | os.PathLike[str] | PreTrainedModel,
    plan: str | Mapping[str, Any] | None = None,
    *,
    ratio: float | None = None,
    calibration: Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
) -> CompressionResult:
    """Factor a dense BERT or GPT-2.

    Args:
        teacher: a name on the Hub, a folder, or a loaded model, with any head that `STUDENT_CLASSES` lists.
        plan: name of a preset, a `FactorPlan`, or a mapping from pattern to ``(m1, n1, terms)``; default: 7.7x for
            BERT and kngpt2 for GPT-2, with calibration text the best plan of the ratio of these, 7.7 or 1.48.
        ratio: how many times smaller the base model shall be, by the best plan that `search_plan` finds for the
            calibration text, instead of a plan.
        calibration: texts on which the factors shall be near the teacher's layers; some hundred sentences like those
            that the student will meet. A tenth of them is held out and decides, layer by layer, whether the nearest
            factors are kept. Without any, all layers get their nearest factors.
        tokenizer: of a teacher that is a loaded model; needed with `calibration`, and returned.
        progress: show progress bars on standard error.

    Returns:
        The student in evaluation mode, in the teacher's dtype and on its device; the teacher is not changed.

    Raises:
        TypeError: the teacher is neither a name, a folder nor a model; or a text is not a string.
        ValueError: unsupported teacher, a plan that does not fit, or weights that are not finite; with `calibration`,
            too little text, no tokenizer, or activations that are not finite; with `ratio`, a plan too, no calibration
            text, or a ratio that cannot be met.
        OSError: the teacher cannot be read.
    """
    teacher, tokenizer = check_teacher(teacher, tokenizer)
    modules = modules_of(teacher)
    refuse_code(teacher.config.to_dict(), "config.json")
    if ratio is not None:
        if plan is not None:
            raise ValueError(f"ratio={ratio} was given beside a plan, which has its own; leave one of them out")
        if calibration is None:
            raise ValueError(f"ratio={ratio} needs calibration text, for which the best plan is searched; give some")
    default_plan, default_ratio = DEFAULTS[teacher.config.model_type]
    if plan is None and calibration is not None:
        calibration = calibration if isinstance(calibration, str) else list(calibration)
        ratio = default_ratio if ratio is None else ratio
        plan = search_plan(teacher, calibration, ratio=ratio, tokenizer=tokenizer, progress=progress).plan
    student_class: Any = STUDENT_CLASSES[type(teacher)]
    config = student_class.config_class.from_dense(teacher.config, default_plan if plan is None else plan)
    config.name_or_path = teacher.config.name_or_path
    if not _is_tied(teacher):
        config.tie_word_embeddings = False
    batches = None
    if calibration is not None:
        if tokenizer is None:
            raise ValueError("calibration needs the teacher's tokenizer; pass it as tokenizer=")
        batches = calibration_batches(calibration, tokenizer, teacher)
    with torch.device("meta"):
        student = model_like(teacher, student_class, config)

    errors: dict[str, dict[str, float]] = {}
    dense_modules = dict(teacher.named_modules())
    factored = [
        (name, m)
        for name, m in student.named_modules()
        if isinstance(m, (KroneckerLinear, KroneckerEmbedding)) and f"{name}.A" not in student.all_tied_weights_keys
    ]
    for name, module in tqdm(factored, desc="factoring", unit="layer", disable=not progress):
        dense = _plain_weight(name, dense_modules[name])
        weight = weight_of(dense_modules[name]).detach()  # (m, n)
        (m1, terms, n1), (m2, _, n2) = module.A.shape, module.B.shape
        if weight.shape != (m1 * m2, n1 * n2):
            raise ValueError(
                f"weight of {name!r} has shape {tuple(weight.shape)}, not {(m1 * m2, n1 * n2)} as in the teacher's "
                "config; make both agree first, for an embedding with resize_token_embeddings"
            )
        result = nearest_kronecker(weight, m1, n1, terms)
        _set_parameter(module, "A", result.A, dense)
        _set_parameter(module, "B", result.B, dense)
        errors[name] = {"relative_error": result.relative_error}
    _copy_rest(teacher, student)
    share_modules(modules, student)
    if batches is not None:
        for name, found in calibrate(teacher, student, batches, progress).items():
            errors[name] = {
                "relative_error": _relative_error(student.get_submodule(name), dense_modules[name]),
                "output_error": found.calibrated,
                "nearest_output_error": found.nearest,
            }
    return CompressionResult(student, tokenizer, describe(student).with_errors(errors))


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense twin of a factored model: factors multiplied out, a stock BERT or GPT-2 class.

    It gives the same outputs, runs wherever the stock model runs, and saves no space. Its output head is tied if that
    of the model is, whatever the config says of it.

    Raises:
        ValueError: the model is not one of this package's factored classes, its weights are not finite, or the twin
            gives other outputs.
    """
    if type(model) not in DENSE_CLASSES:
        raise ValueError(
            f"model of class {type(model).__module__}.{type(model).__name__} is not one of this package's factored "
            "models; import kronecker_transformers before loading it, so that its own classes are used"
        )
    check_finite(model)
    dense_class = DENSE_CLASSES[type(model)]
    config = model.config.to_dense_config()
    config.tie_word_embeddings = _is_tied(model)
    with torch.device("meta"):
        dense = model_like(model, dense_class, config)
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
    _check_outputs(model, dense)
    share_modules(modules_of(model), dense)
    return dense


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether everything that a model's class ties is one parameter; what the config says where there is nothing."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return bool(model.config.tie_word_embeddings)
    own, table = dict(head.named_parameters()), dict(embedding.named_parameters())
    predictions = getattr(getattr(model, "cls", None), "predictions", None)  # BERT's, which has the head's bias too
    same_bias = predictions is None or torch.equal(predictions.bias, head.bias)
    return same_bias and all(own.get(name) is parameter for name, parameter in table.items())


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the outputs of a dense twin, relative to their norm; 0.1 in half precision, in which its products are rounded."""


@torch.no_grad()
def _check_outputs(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Compare the outputs of both on some tokens.

    Raises:
        ValueError: they differ by more than rounding.
    """
    length = min(16, model.config.max_position_embeddings)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    ids = ids.unsqueeze(0) if "MultipleChoice" in type(model).__name__ else ids
    training = model.training
    batch = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    ours, twins = (dict(m.eval()(**batch)) for m in (model, dense))
    model.train(training)
    tolerance = _TOLERANCE.get(model.dtype, 0.1)
    for name, output in ours.items():
        if isinstance(output, torch.Tensor):
            difference = (twins[name] - output).double().norm() / output.double().norm().clamp_min(1e-30)
            if not difference <= tolerance:
                raise ValueError(
                    f"the dense twin's {name} differ from the model's by {difference:.2g} of their norm, more than "
                    f"{tolerance:g}; report this, with the model's config.json"
                )


def _copy_rest(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy to `target` the parameters and buffers that it shares with `source`, bit by bit, then its settings."""
    source_modules = dict(source.named_modules())
    shapes = {name: parameter.shape for name, parameter in target.named_parameters()}
    for name, module in target.named_modules():
        other = source_modules[name]
        for key, parameter in other.named_parameters(recurse=False):
            if getattr(module._parameters.get(key), "is_meta", False):
                _set_parameter(module, key, parameter.detach().clone(), parameter)
        for key, buffer in other.named_buffers(recurse=False):
            module._buffers[key] = buffer.detach().clone()
    target.tie_weights()
    for name, parameter in target.named_parameters():
        if parameter.is_meta or (name in shapes and shapes[name] != parameter.shape):
            raise ValueError(
                f"parameter {name!r} of the {type(source).__name__} does not have the shape of its config; "
                "remove parametrizations, adapters and quantization first"
            )
    if source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    target.eval()


@torch.no_grad()
def _relative_error(module: Any, dense: nn.Module) -> float:
    product, weight = module.to_dense(), weight_of(dense)
    return float((product - weight).double().norm() / weight.double().norm().clamp_min(1e-300))


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=like.requires_grad))


def _plain_weight(name: str, module: nn.Module) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"weight of {name!r} in the teacher is not a plain parameter; "
            "remove parametrizations, adapters and quantization first"
        )
    return weight
