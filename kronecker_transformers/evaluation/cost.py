"""What a factored model costs and what was lost, layer by layer, beside its dense twin."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.load import REPORT_FILE
from ..models import DENSE_CLASSES
from ..models.kronecker_contraction import multiplications
from ..models.kronecker_family import has_choices, longest_sequence
from ..models.kronecker_layers import FrequentWords, KroneckerEmbedding, KroneckerLinear
from ..modes import evaluating

logger = logging.getLogger(__name__)

REPORT_LENGTH = 128
"""Tokens of the sequence for which FLOPs are reported, as in KroneckerBERT, Table 1."""

ERRORS = ("relative_error", "output_error", "nearest_output_error")
"""What may be known of the errors of a layer."""


@dataclass(frozen=True)
class LayerReport:
    """One factored layer: shapes of W, A_r and B_r, number of terms, and what is known of its errors."""

    name: str
    weight: tuple[int, int]
    A: tuple[int, int]
    B: tuple[int, int]
    terms: int
    relative_error: float | None = None
    """|| W - sum of A_r (x) B_r ||_F / || W ||_F"""
    output_error: float | None = None
    """Relative error of its outputs on held-out calibration text, given the student's own inputs."""
    nearest_output_error: float | None = None
    """The same for the nearest factors, which calibration has replaced."""

    def errors(self) -> dict[str, float]:
        """The errors that are known, by their names."""
        return {name: getattr(self, name) for name in ERRORS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    A FLOP is an addition or a multiplication. `linear_flops` counts the linear layers only, as KroneckerBERT does;
    `total_flops` adds the products Q K^T and (attention) V. Softmax, activations, norms and look-ups are not counted.
    """

    parameters: int
    """Parameters; a tied one counts once."""
    bytes: int
    """Bytes of the parameters."""
    linear_flops: int
    """FLOPs of the linear layers for one sequence."""
    total_flops: int
    """FLOPs of linear layers and attention products for one sequence."""


@dataclass(frozen=True)
class Report:
    """A factored model beside its dense twin."""

    layers: tuple[LayerReport, ...]
    dense: Cost
    factored: Cost
    length: int
    """Tokens in the sequence for which FLOPs are counted."""
    factors_sha256: str
    """SHA-256 of all factors in the order of the layers: the errors are true of these and of no others."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def with_errors(self, errors: Mapping[str, Mapping[str, Any]]) -> Report:
        """The same report with the errors of each layer, as `LayerReport.errors` gives them, by its name."""
        return replace(self, layers=tuple(replace(layer, **errors.get(layer.name, {})) for layer in self.layers))


def describe(model: PreTrainedModel, length: int = REPORT_LENGTH) -> Report:
    """Count the costs of a model, factored or dense, and of its dense twin.

    FLOPs come from one forward pass over `length` tokens that records what each linear layer is applied to.

    Args:
        length: tokens in the sequence; cut to what the model can take.

    Raises:
        ValueError: a factored model that was loaded with remote code instead of this package's classes.
    """
    if type(model).__name__.startswith("Kronecker") and type(model) not in DENSE_CLASSES:
        raise ValueError(
            f"model of class {type(model).__module__}.{type(model).__name__} came with code of its own; "
            "import kronecker_transformers before loading it, so that this package's classes are used"
        )
    length = min(length, longest_sequence(model))
    layers, dense_extra, seen, digest = [], 0, set(), hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding, FrequentWords)) and id(module.A) not in seen:
            seen.add(id(module.A))  # a tied head is no layer of its own
            (m1, terms, n1), (m2, _, n2) = module.A.shape, module.B.shape
            layers.append(LayerReport(name, (m1 * m2, n1 * n2), (m1, n1), (m2, n2), terms))
            beside = isinstance(module, FrequentWords)  # another product for rows of a weight that counts already
            dense_extra += (0 if beside else m1 * m2 * n1 * n2) - module.A.numel() - module.B.numel()
            for factor in (module.A, module.B):
                values = factor.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
                digest.update(values.view(torch.uint8).numpy().data)

    parameters = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    linear, dense_linear = _linear_flops(model, length)
    attention = model.config.num_hidden_layers * 4 * length**2 * model.config.hidden_size
    dense_size = size + dense_extra * model.dtype.itemsize
    return Report(
        tuple(layers),
        Cost(parameters + dense_extra, dense_size, dense_linear, dense_linear + attention),
        Cost(parameters, size, linear, linear + attention),
        length,
        digest.hexdigest(),
    )


@torch.no_grad()
def _linear_flops(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """FLOPs of all linear layers for one sequence: as they are, and as if they were dense."""
    counts = [0, 0]

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        n, m = inputs[0].shape[-1], output.shape[-1]
        tokens = output.numel() // m
        per_token = m * n
        if isinstance(module, KroneckerLinear):
            (m1, terms, n1), (m2, _, n2) = module.A.shape, module.B.shape
            per_token = min(multiplications(m1, n1, m2, n2, terms))
            if module.tied is not None and (own := module.tied[0].frequent) is not None:
                per_token += own.terms * (own.m1 + n)
        counts[0] += 2 * tokens * per_token
        counts[1] += 2 * tokens * m * n

    linear = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D, KroneckerLinear))]
    handles = [module.register_forward_hook(record) for module in linear]
    try:
        shape = (1, 1, length) if has_choices(model) else (1, length)
        ones = torch.ones(shape, dtype=torch.long, device=model.device)
        with evaluating(model):
            model(ones, attention_mask=ones)
    finally:
        for handle in handles:
            handle.remove()
    return counts[0], counts[1]


def recorded_errors(folder: str | os.PathLike[str], factors_sha256: str) -> dict[str, dict[str, float]]:
    """The errors of each layer as recorded at compression; empty without a record of exactly these factors."""
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["factors_sha256"] != factors_sha256:
            return {}
        return {
            layer["name"]: {name: float(value) for name, value in layer.items() if name in ERRORS and value is not None}
            for layer in record["layers"]
        }
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is not a record of a compression and is passed over: %r", path, error)
        return {}
