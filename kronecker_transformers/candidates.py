"""What each layer of a teacher may become in a plan, how near it then comes, and how much that matters.

Which shapes are worth a candidate is found in the middle layer, from estimates for every shape
(`factorization.search.error_curve`); how far alternating least squares come below the estimates is measured there too,
on text that is held out. The other layers take the same shapes. The influence of a layer is measured by giving this
layer alone an error.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .activations import CalibrationBatch, Stream, enter, groups_of, layers_of, weight_of
from .calibration import UNSEEN, group_moments, looked_up, pooler_moments, row_error
from .factorization.calibrated import RIDGE, Moments, calibrated_kronecker, weighted_kronecker
from .factorization.search import error_curve, factor_shapes, weighted_error_curve
from .models.factor_plan import FactorEntry
from .models.kronecker_layers import kronecker_embedding, kronecker_linear, multiplications
from .report import REPORT_LENGTH

SIZES = tuple(2 ** (-k / 2) for k in range(2, 15))
"""Sizes of candidates, as shares of the dense weight: from 1/2 to 1/128."""
SHORTLIST = 3
"""Shapes that are kept at each size."""
PROBE = 1 / 8
"""Size at which influences are measured."""
PROBE_TOKENS = 2048
"""Tokens on which they are measured."""
WORDS = ("embeddings.word_embeddings", "wte")
"""Of the embeddings that of the words is searched; positions beyond the calibration text would suffer."""


Shortlist = dict[tuple[int, int], float]
"""Shapes (m1, n1), and for each the error that calibration reaches over the estimate of it."""


@dataclass(frozen=True)
class Candidate:
    """What a layer may become."""

    entry: FactorEntry | None
    """None for the dense layer."""
    parameters: int
    flops: int
    """Of one sequence of `REPORT_LENGTH` tokens."""
    error: float
    """Relative error of its outputs."""


@dataclass
class MeasuredLayer:
    """What is known of a layer before the choice."""

    name: str
    weight: Tensor
    """(m, n)"""
    candidates: list[Candidate]
    probe: Callable[[Tensor], Tensor]
    """The layer with an error: from its inputs to its outputs."""
    probe_error: float


def measured_layers(
    base: Any, batches: Sequence[CalibrationBatch], presets: Mapping[str, Mapping[str, FactorEntry]]
) -> Iterator[MeasuredLayer]:
    """All layers that are searched, in the order in which they compute, with their candidates.

    Args:
        base: the base model of a teacher.
        batches: calibration text.
        presets: plans of which every entry shall be a candidate: name of a module to entry.
    """
    wanted: dict[str, list[FactorEntry]] = defaultdict(list)  # by the kind of the layer: a preset may factor some only
    for entries in presets.values():
        for name, entry in entries.items():
            wanted[_kind(name)].append(entry)
    words = [name for name in WORDS if hasattr(base, name.partition(".")[0])]
    for name, counts in looked_up(base, words, batches).items():
        yield _embedding(name, base.get_submodule(name).weight, counts, wanted[name])
    place, layers = layers_of(base)
    shortlists: dict[str, Shortlist] = {}
    streams = enter(base, batches)
    for layer in layers[: len(layers) // 2]:
        for stream in streams:
            stream.advance(layer)
    middle = len(layers) // 2
    for name, module, fit, held_out in _linear_modules(layers[middle], streams):
        shortlists[name] = _shortlist(weight_of(module), fit, held_out, wanted[_kind(f"{place}.{middle}.{name}")])
    streams = enter(base, batches)
    for index, layer in enumerate(layers):
        for name, module, fit, held_out in _linear_modules(layer, streams):
            full = f"{place}.{index}.{name}"
            presets_here = wanted[_kind(full)]
            yield _linear(full, weight_of(module), REPORT_LENGTH, fit, held_out, shortlists[name], presets_here)
        for stream in streams:
            stream.advance(layer)
    if getattr(base, "pooler", None) is not None:
        name, weight = "pooler.dense", base.pooler.dense.weight
        fit, held_out = pooler_moments(base, base, streams, streams)
        yield _linear(name, weight, 1, fit, held_out, _shortlist(weight, fit, held_out, wanted[name]), wanted[name])


def _linear_modules(layer: nn.Module, streams: list[Stream]) -> Iterator[tuple[str, nn.Module, Moments, Moments]]:
    """The linear modules of a layer that text reaches, with the moments of their inputs and outputs."""
    names = [name for name, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for group in groups_of(layer, names, streams[0]):
        fit, held_out = group_moments(layer, layer, group, streams, streams)
        start = 0
        for name in group:
            module = layer.get_submodule(name)
            rows = slice(start, start := start + weight_of(module).shape[0])
            yield name, module, fit.rows(rows), held_out.rows(rows)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _estimates(W: Tensor, fit: Moments, m1: int, n1: int) -> Tensor:
    C = fit.inputs.clone()
    C.diagonal().add_(RIDGE * C.diagonal().mean())
    return error_curve(W, C, m1, n1)


def _unit(W: Tensor, m1: int, n1: int) -> int:
    """Parameters of one term."""
    return m1 * n1 + W.numel() // (m1 * n1)


def _shortlist(W: Tensor, fit: Moments, held_out: Moments, presets: Iterable[FactorEntry]) -> Shortlist:
    """Shapes of A that are the best at some size, and the error that is reached, over the estimate."""
    found: list[list[tuple[float, tuple[int, int]]]] = [[] for _ in SIZES]
    for m1, n1 in factor_shapes(*W.shape):
        unit = _unit(W, m1, n1)
        if unit > SIZES[0] * W.numel():
            continue
        curve = _estimates(W, fit, m1, n1)
        for at_size, share in zip(found, SIZES, strict=True):
            if 1 <= (terms := int(share * W.numel() / unit)) <= len(curve):
                at_size.append((float(curve[terms - 1]), (m1, n1)))
    shapes = {(len(W), 1), *((entry.m1, entry.n1) for entry in presets)}
    shapes.update(shape for at_size in found for _, shape in sorted(at_size)[:SHORTLIST])
    reached = {}
    for m1, n1 in sorted(shapes):
        terms = max(1, int(PROBE * W.numel() / _unit(W, m1, n1)))
        factors = calibrated_kronecker(W, fit, m1, n1, terms)
        error = held_out.relative_error(factors.A, factors.B, factors.bias)
        reached[m1, n1] = error / max(float(_estimates(W, fit, m1, n1)[terms - 1]), 1e-9)
    return reached


def _linear(
    name: str, W: Tensor, tokens: int, fit: Moments, held_out: Moments, shortlist: Shortlist, presets: list[FactorEntry]
) -> MeasuredLayer:
    """A linear layer with its candidates."""
    candidates = [_candidate(W, tokens, None, 0.0)]
    for (m1, n1), correction in shortlist.items():
        curve, unit = _estimates(W, fit, m1, n1), _unit(W, m1, n1)
        counts = {int(share * W.numel() / unit) for share in SIZES}
        counts |= {entry.terms for entry in presets if (entry.m1, entry.n1) == (m1, n1)}
        for terms in sorted(counts):
            if 1 <= terms < len(curve):
                error = correction * float(curve[terms - 1])
                candidates.append(_candidate(W, tokens, FactorEntry(m1, n1, terms), error))
    found = calibrated_kronecker(W, fit, len(W), 1, max(1, int(PROBE * W.numel() / _unit(W, len(W), 1))))
    A, B, bias = (value.to(W.dtype) for value in found[:3])
    return MeasuredLayer(
        name, W, candidates, partial(kronecker_linear, A=A, B=B, bias=bias), held_out.relative_error(A, B, bias)
    )


def _embedding(name: str, W: Tensor, counts: Tensor, presets: list[FactorEntry]) -> MeasuredLayer:
    """The embedding of the words, with its candidates."""
    m, n = W.shape
    candidates = [_candidate(W, 0, None, 0.0)]
    for n1 in [d for d in range(1, n) if n % d == 0]:
        curve, unit = weighted_error_curve(W, counts + UNSEEN, n1), _unit(W, m, n1)
        terms = {int(share * W.numel() / unit) for share in SIZES}
        terms |= {entry.terms for entry in presets if (entry.m1, entry.n1) == (m, n1)}
        for count in sorted(terms):
            if 1 <= count < len(curve):
                candidates.append(_candidate(W, 0, FactorEntry(m, n1, count), float(curve[count - 1])))
    A, B = weighted_kronecker(W, counts + UNSEEN, m, 1, max(1, int(PROBE * W.numel() / _unit(W, m, 1))))
    A, B = A.to(W.dtype), B.to(W.dtype)
    return MeasuredLayer(name, W, candidates, partial(kronecker_embedding, A=A, B=B), row_error(W, A, B, counts))


def _candidate(W: Tensor, tokens: int, entry: FactorEntry | None, error: float) -> Candidate:
    m, n = W.shape
    if entry is None:
        return Candidate(None, m * n, 2 * tokens * m * n, 0.0)
    m2, n2 = entry.b_shape(m, n)
    parameters = entry.terms * (entry.m1 * entry.n1 + m2 * n2)
    flops = 2 * tokens * min(multiplications(entry.m1, entry.n1, m2, n2, entry.terms))
    return Candidate(entry, parameters, flops, error)


def influences(
    teacher: PreTrainedModel, layers: Sequence[MeasuredLayer], batches: Sequence[CalibrationBatch], progress: bool
) -> list[float]:
    """By how much the outputs that count change when one layer alone has an error, for each unit of its square.

    The change is that of the outputs on held-out text, squared, over their variance.
    """
    judged, tokens = [], 0
    for batch in batches:
        if batch.held_out and tokens < PROBE_TOKENS:
            judged.append(batch)
            tokens += int(batch.attention_mask.sum())
    wanted = [_outputs_that_count(teacher, batch) for batch in judged]
    stacked = torch.cat(wanted)
    variance = float((stacked - stacked.mean(0)).square().sum())
    found = []
    for layer in tqdm(layers, desc="influences", unit="layer", disable=not progress):
        module = teacher.base_model.get_submodule(layer.name)
        handle = module.register_forward_hook(lambda module, args, output, probe=layer.probe: probe(args[0]))
        try:
            pairs = zip(wanted, (_outputs_that_count(teacher, batch) for batch in judged), strict=True)
            change = sum(float((got - want).square().sum()) for want, got in pairs)
        finally:
            handle.remove()
        found.append(change / max(variance, 1e-30) / max(layer.probe_error, 1e-6) ** 2)
    return found


def _outputs_that_count(teacher: Any, batch: CalibrationBatch) -> Tensor:
    """What a teacher is used for, a row for each token or sequence: see `search_plan`."""
    ids, mask = batch.input_ids.to(teacher.device), batch.attention_mask.to(teacher.device)
    name = type(teacher).__name__
    if "SequenceClassification" in name:
        return teacher(ids, attention_mask=mask).logits.float()
    if "TokenClassification" in name:
        return teacher(ids, attention_mask=mask).logits.float()[mask.bool()]
    output = teacher.base_model(ids, attention_mask=mask, use_cache=False)
    if "MultipleChoice" in name or "NextSentence" in name:
        return output.pooler_output.float()
    return output.last_hidden_state.float()[mask.bool()]
