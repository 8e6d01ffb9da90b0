"""What each layer of a teacher may become in a plan, how near it then comes, and how much that matters.

The error of every shape has an estimate (`estimates.error_curves`). Shapes compete in the middle layer:
those with the best estimates are tried by a few sweeps of alternating least squares, judged on held-out text, and
the best are candidates in all layers. There the estimates are scaled by what a try at one size reaches. The influence
of a layer is measured by giving this layer alone an error.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..evaluation.cost import REPORT_LENGTH
from ..models.factor_plan import FactorEntry
from ..models.kronecker_contraction import multiplications
from ..models.kronecker_family import family_of, pooler_of, projection_of
from .activations import CalibrationBatch, Stream, enter, groups_of, layers_of, weight_of
from .calibrated import RIDGE, CalibratedFactors, calibrated_kronecker, weighted_kronecker
from .calibration import layer_moments, pooler_moments, projection_moments, row_error, row_weights
from .estimates import error_curves, factor_shapes, frequent_error_curves, weighted_error_curve
from .moments import Moments, kronecker_product
from .outputs import HeldOutOutputs, has_few_outputs

SIZES = tuple(2 ** (-k / 8) for k in range(8, 57))
"""Sizes of candidates, as shares of the dense weight: from 1/2 to 1/128."""
SIZES_TRIED = SIZES[::8]
"""At which shapes compete."""
SIZES_SHARED = SIZES[::4]
"""Of what all words of an embedding share, where frequent words have a product of their own."""
FREQUENT = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16)
"""Shares of the words that may be frequent ones."""
TRIED = 2
"""Shapes that are tried in the middle layer for each size; the best one of each is kept."""
PROBE = 1 / 8
"""Size at which shapes are tried, and of the probes for influences."""
SWEEPS = 2
"""Of a try."""
NEGLIGIBLE = 1e-3
"""Relative errors below it may be nothing but rounding: the ratio of two of them says nothing."""
STEP = 1 / 4
"""How far a layer goes towards its probe where its influence is measured: small errors add up, large ones do not."""
Shape = tuple[int, int]
"""(m1, n1)"""
Try = tuple[Tensor, CalibratedFactors, float]
"""Estimates scaled by what is reached at one size; the factors with which it was reached, and their error."""


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
    milliseconds: float = 0.0
    """In a forward pass on this machine, if that is budgeted."""


@dataclass
class MeasuredLayer:
    """What is known of a layer before the choice."""

    name: str
    weight: Tensor
    """(m, n)"""
    candidates: list[Candidate]
    probe: tuple[Tensor, Tensor, Tensor | None] | None
    """Factors and bias, of a layer with an error; none for one that stays dense."""
    probe_error: float


def measured_layers(
    base: Any,
    batches: Sequence[CalibrationBatch],
    presets: Mapping[str, Mapping[str, FactorEntry]],
    names: AbstractSet[str],
    progress: bool = False,
    low_rank: bool = False,
    counts: Tensor | None = None,
) -> Iterator[MeasuredLayer]:
    """All layers in the order in which they compute, with their candidates.

    Args:
        base: the base model of a teacher.
        batches: calibration text.
        presets: plans of which every entry becomes a candidate: name of a module to entry.
        names: of the modules that may be factored; others have one candidate, the dense layer.
        progress: show a progress bar while the shapes are chosen, which takes most of the time.
        low_rank: no shapes but those of low rank.
        counts: how often each word occurs (vocabulary,), for the word embedding; default: in the text.
    """
    wanted: dict[str, list[FactorEntry]] = defaultdict(list)  # by the kind of the layer: a preset may factor some only
    for entries in presets.values():
        for name, entry in entries.items():
            wanted[_kind(name)].append(entry)
    family = family_of(base)
    tables = (family.words, family.positions)
    weights = row_weights(base, [name for name in tables if name in names], batches, counts)
    for name in tables:
        weight = base.get_submodule(name).weight
        if name not in weights:
            yield _kept(name, weight, 0)
            continue
        yield _embedding(
            name, weight, *weights[name], wanted[name], low_rank, counts is not None and name == family.words
        )
    if family.projection and projection_of(base) is not None:
        name, weight = family.projection, projection_of(base).weight
        moments = projection_moments(base, base, batches) if name in names else None
        yield _linear(name, weight, REPORT_LENGTH, moments, wanted[name], _low_rank(weight) if low_rank else None)
    place, layers = layers_of(base)
    kinds = {_kind(name) for name in names}
    tries: dict[str, dict[Shape, Try]] = {}
    streams = enter(base, batches)
    for layer in layers[: len(layers) // 2]:
        for stream in streams:
            stream.advance(layer)
    middle = len(layers) // 2
    inside = {name for name, _ in layers[middle].named_modules() if _kind(f"{place}.{middle}.{name}") in kinds}
    modules = linear_modules(layers[middle], streams, inside)
    for name, module, moments in tqdm(modules, desc="shapes", unit="layer", leave=False, disable=not progress):
        if moments is not None and low_rank:
            tries[name] = _tries(weight_of(module), *moments, _low_rank(weight_of(module)))
        elif moments is not None:
            presets_here = wanted[_kind(f"{place}.{middle}.{name}")]
            tries[name] = _shortlist(weight_of(module), *moments, presets_here)
    streams = enter(base, batches)
    for index, layer in enumerate(layers):
        inside = {name for name, _ in layer.named_modules() if f"{place}.{index}.{name}" in names}
        for name, module, moments in linear_modules(layer, streams, inside):
            full, W = f"{place}.{index}.{name}", weight_of(module)
            shapes = tries.get(name)
            found = shapes if index == middle else None
            yield _linear(full, W, REPORT_LENGTH, moments, wanted[_kind(full)], shapes, found)
    if family.pooler and pooler_of(base) is not None:
        name, weight = family.pooler, base.get_submodule(family.pooler).weight
        moments = pooler_moments(base, streams, streams) if name in names else None
        yield _linear(name, weight, 1, moments, wanted[name], _low_rank(weight) if low_rank else None)


def linear_modules(
    layer: nn.Module, streams: list[Stream], names: AbstractSet[str]
) -> Iterator[tuple[str, nn.Module, tuple[Moments, Moments] | None]]:
    """The linear modules of a layer that text reaches, with moments of inputs and outputs of those with these names.

    The streams are behind the layer then.
    """
    linear = [name for name, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    groups = groups_of(layer, linear, streams[0])
    measured = [found for group in groups if (found := [name for name in group if name in names])]
    moments_of = dict(zip(map(itemgetter(0), measured), layer_moments(layer, measured, streams), strict=True))
    for group in groups:
        both = next((moments_of[name] for name in group if name in moments_of), ())
        start = 0
        for name in group:
            module = layer.get_submodule(name)
            if name not in names:
                yield name, module, None
                continue
            rows = slice(start, start := start + weight_of(module).shape[0])
            fit, held_out = (moments.rows(rows) for moments in both)
            yield name, module, (fit, held_out)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _estimates(W: Tensor, fit: Moments, shapes: Iterable[Shape]) -> dict[Shape, Tensor]:
    C = fit.inputs.clone()
    C.diagonal().add_(RIDGE * C.diagonal().mean() or RIDGE)
    return error_curves(W, C, shapes)


def _unit(W: Tensor, m1: int, n1: int) -> int:
    """Parameters of one term."""
    return m1 * n1 + W.numel() // (m1 * n1)


def _terms(W: Tensor, m1: int, n1: int, share: float) -> int:
    """Terms of a shape that have at most this share of the parameters of W."""
    return int(share * W.numel() / _unit(W, m1, n1))


def least_parameters(W: Tensor, m1: int, n1: int) -> int:
    """Of the smallest candidate of a shape for a weight (m, n), but for those of the presets."""
    return _unit(W, m1, n1) * max(1, _terms(W, m1, n1, SIZES[-1]))


def _low_rank(W: Tensor) -> list[Shape]:
    return [(len(W), 1)]


def _shortlist(W: Tensor, fit: Moments, held_out: Moments, presets: Iterable[FactorEntry]) -> dict[Shape, Try]:
    """Tries of low rank, of the shapes of the presets, and of those that are the best at some size."""
    always = {(len(W), 1), *((entry.m1, entry.n1) for entry in presets)}
    worth = {shape for shape in factor_shapes(*W.shape) if _terms(W, *shape, SIZES[0])}
    curves = _estimates(W, fit, worth | always)
    tried = {shape: _try(W, fit, held_out, shape, curves[shape]) for shape in always | _best(W, curves, TRIED)}
    best = always | _best(W, {shape: found[0] for shape, found in tried.items()}, 1)
    return {shape: tried[shape] for shape in sorted(best)}


def _best(W: Tensor, curves: Mapping[Shape, Tensor], number: int) -> set[Shape]:
    """So many shapes at each size."""
    found: set[Shape] = set()
    for share in SIZES_TRIED:
        errors = []
        for shape, curve in curves.items():
            if 1 <= (terms := _terms(W, *shape, share)) <= len(curve):
                errors.append((float(curve[terms - 1]), shape))
        found.update(shape for _, shape in sorted(errors)[:number])
    return found


def _tries(W: Tensor, fit: Moments, held_out: Moments, shapes: Iterable[Shape]) -> dict[Shape, Try]:
    """Of each of these shapes."""
    return {shape: _try(W, fit, held_out, shape, curve) for shape, curve in _estimates(W, fit, shapes).items()}


def _try(W: Tensor, fit: Moments, held_out: Moments, shape: Shape, estimates: Tensor) -> Try:
    terms = min(max(1, _terms(W, *shape, PROBE)), len(estimates))
    found = calibrated_kronecker(W, fit, *shape, terms, sweeps=SWEEPS)
    error = held_out.relative_error(found.A, found.B, found.bias)
    return estimates * (max(error, NEGLIGIBLE) / max(float(estimates[terms - 1]), NEGLIGIBLE)), found, error


def _linear(
    name: str,
    W: Tensor,
    tokens: int,
    moments: tuple[Moments, Moments] | None,
    presets: list[FactorEntry],
    shapes: Iterable[Shape] | None,
    tries: Mapping[Shape, Try] | None = None,
) -> MeasuredLayer:
    """A linear layer with its candidates, of these shapes or of those that are the best here; without moments, kept."""
    if moments is None:
        return _kept(name, W, tokens)
    if tries is None:
        tries = _shortlist(W, *moments, presets) if shapes is None else _tries(W, *moments, shapes)
    candidates = [_candidate(W, tokens, None, 0.0)]
    for shape, (curve, _, _) in tries.items():
        counts = {_terms(W, *shape, share) for share in SIZES}
        counts |= {entry.terms for entry in presets if (entry.m1, entry.n1) == shape}
        for terms in sorted(counts):
            if 1 <= terms < len(curve):
                candidates.append(_candidate(W, tokens, FactorEntry(*shape, terms), float(curve[terms - 1])))
    _, probe, error = tries[len(W), 1]
    return MeasuredLayer(name, W, candidates, probe[:3], error)


def _kept(name: str, W: Tensor, tokens: int) -> MeasuredLayer:
    """A layer that stays dense."""
    return MeasuredLayer(name, W, [_candidate(W, tokens, None, 0.0)], None, 0.0)


def _embedding(
    name: str, W: Tensor, fit: Tensor, held_out: Tensor, presets: list[FactorEntry], low_rank: bool, counted: bool
) -> MeasuredLayer:
    """An embedding with its candidates; frequent words may have a product of their own where they were `counted`.

    All compete by relative errors of the rows then, since the states that follow are normalised, and rare words count
    for more than where factors are fitted: of several ways this chose best, on text of few subjects and of many.
    """
    m, n = W.shape
    weights = fit.sqrt() / W.double().square().sum(1).clamp_min(torch.finfo(torch.float32).tiny) if counted else fit
    candidates = [_candidate(W, 0, None, 0.0)]
    for n1 in [d for d in range(1, 2 if low_rank else n) if n % d == 0]:
        curve = weighted_error_curve(W, weights, n1)
        terms = {_terms(W, m, n1, share) for share in SIZES}
        terms |= {entry.terms for entry in presets if (entry.m1, entry.n1) == (m, n1)}
        for count in sorted(terms):
            if 1 <= count < len(curve):
                candidates.append(_candidate(W, 0, FactorEntry(m, n1, count), float(curve[count - 1])))
    A, B = weighted_kronecker(W, fit, m, 1, max(1, _terms(W, m, 1, PROBE)))
    if counted:
        candidates += _with_frequent_words(W, weights)
    return MeasuredLayer(name, W, candidates, (A, B, None), row_error(W, kronecker_product(A, B), held_out))


def _with_frequent_words(W: Tensor, weights: Tensor) -> Iterator[Candidate]:
    """Candidates of low rank with a product of its own for frequent words: of every size the best."""
    m, n = W.shape
    ranks = sorted({terms for share in SIZES_SHARED if (terms := _terms(W, m, 1, share)) >= 1})
    counts = sorted({count for share in FREQUENT if (count := int(share * m)) >= 1})
    curves = frequent_error_curves(W, weights, ranks, counts)
    best: dict[float, Candidate] = {}
    for (terms, count), curve in curves.items():
        for share in SIZES:
            own = int((share * W.numel() - terms * (m + n)) / (count + n))
            if not 1 <= own < len(curve):
                continue
            found = _candidate(W, 0, FactorEntry(m, 1, terms, count, own), float(curve[own - 1]))
            if share not in best or found.error < best[share].error:
                best[share] = found
    yield from best.values()


def _candidate(W: Tensor, tokens: int, entry: FactorEntry | None, error: float) -> Candidate:
    m, n = W.shape
    if entry is None:
        return Candidate(None, m * n, 2 * tokens * m * n, 0.0)
    flops = 2 * tokens * min(multiplications(entry.m1, entry.n1, *entry.b_shape(m, n), entry.terms))
    return Candidate(entry, entry.parameters(m, n), flops, error)


@torch.no_grad()
def influences(
    teacher: PreTrainedModel, layers: Sequence[MeasuredLayer], batches: Sequence[CalibrationBatch], progress: bool
) -> list[float]:
    """How much noise over signal the outputs that count get from that of each layer.

    Measured on held-out text, with one layer at a time on the way to its probe: the noise of the outputs comes from
    their correlation with the teacher's; several kinds of outputs, as those of a teacher for pre-training, are
    averaged. Where there are few outputs, the last hidden states count in their place, except for the pooler.
    """
    family, few = family_of(teacher), has_few_outputs(teacher)
    by_states = HeldOutOutputs(teacher, batches, keep_layers=True, states=True)
    by_outputs = HeldOutOutputs(teacher, batches, keep_layers=True) if few else by_states
    found = []
    for layer in tqdm(layers, desc="influences", unit="layer", disable=not progress):
        if layer.probe is None:
            found.append(0.0)
            continue
        with _moved(teacher.base_model.get_submodule(layer.name), *layer.probe):
            judged = by_outputs if layer.name == family.pooler else by_states
            lost = judged.lost(teacher, unchanged=_layers_before(teacher.base_model, layer.name))
        found.append(sum(map(noise_to_signal, lost)) / len(lost) / noise_to_signal(STEP * max(layer.probe_error, 1e-3)))
    return found


def _layers_before(base: Any, name: str) -> int:
    """How many layers of a base model compute before this module."""
    place, layers = layers_of(base)
    if name == family_of(base).pooler:
        return len(layers)
    return next((index for index in range(len(layers)) if name.startswith(f"{place}.{index}.")), 0)


def noise_to_signal(error: float) -> float:
    """Variance that is lost over variance that is kept, for a relative error; at most 1,000."""
    return error**2 / max(1 - error**2, error**2 / 1000, 1e-12)


@contextmanager
def _moved(module: Any, A: Tensor, B: Tensor, bias: Tensor | None) -> Iterator[None]:
    """A dense layer that is by `STEP` nearer to another weight and bias; a head that is tied to it too."""
    weight = module.weight.data
    product = kronecker_product(A, B).to(weight.dtype)
    module.weight.data = weight.lerp(product.t() if isinstance(module, Conv1D) else product, STEP)
    if bias is not None:
        old_bias = module.bias.data
        module.bias.data = old_bias.lerp(bias.to(weight.dtype), STEP)
    try:
        yield
    finally:
        module.weight.data = weight
        if bias is not None:
            module.bias.data = old_bias
