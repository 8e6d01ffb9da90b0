"""Calibration text, carried through teacher and student layer after layer, gives the student better factors.

Each factored layer is fitted to what the teacher's computes for the same text, given the inputs that the student's
earlier layers, fitted already, pass on (`calibrated`). The hidden states of both models are carried from
layer to layer, so nothing is computed from the start again; within a layer, modules are fitted in the order in which
they compute. A part of the text is held out: a layer whose nearest factors do better there keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.kronecker_family import family_of, projection_of
from ..models.kronecker_layers import KroneckerEmbedding, KroneckerLinear, farthest_rows
from ..modes import evaluating
from .activations import CalibrationBatch, Stream, enter, groups_of, layers_of, recording, seeing, weight_of
from .calibrated import calibrated_kronecker, weighted_kronecker
from .moments import Moments, SplitSums, kronecker_product
from .outputs import HeldOutOutputs, check_held_out

logger = logging.getLogger(__name__)

UNSEEN = 1.0
"""Occurrences that every row of an embedding is taken to have beside those in the text (Laplace smoothing)."""
TOKENS_PER_INPUT = 8
"""Tokens of calibration text for each input of the largest layer: with fewer, factors fit their own text alone
(benchmarks/calibration_texts.py).
"""
EVENED = 2 / 3
"""Power of these numbers by which words count that were counted in more text: rare ones say more than common ones."""


class LayerErrors(NamedTuple):
    """Relative errors of a layer's outputs on held-out text, given the student's own inputs.

    E || y - y' ||^2 / E || y - E y ||^2, its root; for an embedding, relative to E || y ||^2.
    """

    nearest: float
    """Of the nearest factors."""
    calibrated: float
    """Of the factors that the student has now."""


@torch.no_grad()
def calibrate(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    progress: bool = False,
    counts: Tensor | None = None,
) -> dict[str, LayerErrors]:
    """Give a student, in place, the factors and biases that suit calibration text. Deterministic.

    Modules that text alone does not reach, those of cross-attention, keep their nearest factors. What is best layer by
    layer need not be best for the model: where its outputs on held-out text, of a classifier its last hidden states, do
    not come nearer to the teacher's, all layers get their nearest factors back, with a warning.

    Args:
        teacher: a dense model; it is not changed.
        student: factored from it, with nearest factors; it is left in evaluation mode.
        batches: from `calibration_batches`.
        progress: show a progress bar on standard error.
        counts: how often each word occurs (vocabulary,), for the word embedding; default: in the batches.

    Returns:
        Errors of the factored layers, by their names in `student`.

    Raises:
        ValueError: activations that are not finite; the student is then not fit for use.
    """
    student.eval()
    factored = [module for module in student.modules() if _is_factored(module)]
    nearest = {t: t.detach().clone() for module in factored for t in (*module.parameters(), *module.buffers())}
    with evaluating(teacher):
        judged = HeldOutOutputs(teacher, batches, states=True)
        before = judged.lost(student)
        errors = _calibrate(teacher.base_model, student.base_model, batches, progress, counts)
        after = judged.lost(student)
        if sum(after) >= sum(before):
            logger.warning(
                "the calibrated student is no nearer to its teacher on held-out text than the nearest factors (errors "
                "of its outputs: %s, nearest: %s), so it keeps these; use a plan that is searched, or more text",
                *(", ".join(f"{value:.3f}" for value in values) for values in (after, before)),
            )
            for parameter, value in nearest.items():
                parameter.copy_(value)
            errors = _calibrate(teacher.base_model, student.base_model, batches, progress, counts, fit=False)
    prefix = "" if student.base_model is student else f"{student.base_model_prefix}."
    return {prefix + name: found for name, found in errors.items()}


def _calibrate(
    dense: Any,
    factored: Any,
    batches: Sequence[CalibrationBatch],
    progress: bool,
    counts: Tensor | None = None,
    fit: bool = True,
) -> dict[str, LayerErrors]:
    """The same for base models, layer by layer alone; without `fit` the factors are measured and kept."""
    names = [name for name, module in factored.named_modules() if _is_factored(module)]
    check_amount(batches, factored.modules())
    errors: dict[str, LayerErrors] = {}
    with tqdm(desc="calibrating", total=len(names), unit="layer", disable=not progress) as bar:

        def note(name: str, found: LayerErrors) -> None:
            errors[name] = found
            bar.update()

        for name, weights in row_weights(dense, names, batches, counts).items():
            note(name, _fit_embedding(factored.get_submodule(name), dense.get_submodule(name), *weights, fit))
        projection = family_of(factored).projection
        if projection and projection in names:
            moments = projection_moments(dense, factored, batches)
            note(projection, _fit(projection_of(factored), projection_of(dense), *moments, fit))
        streams, student_streams = enter(dense, batches), enter(factored, batches)
        place, layers = layers_of(dense)
        for index, (layer, student_layer) in enumerate(zip(layers, layers_of(factored)[1], strict=True)):
            inner = [name for name, module in student_layer.named_modules() if _is_factored(module)]
            for group in groups_of(student_layer, inner, student_streams[0]):
                for name, found in _fit_group(layer, student_layer, group, streams, student_streams, fit):
                    note(f"{place}.{index}.{name}", found)
            for stream, student_stream in zip(streams, student_streams, strict=True):
                stream.advance(layer)
                student_stream.advance(student_layer)
        pooler = family_of(factored).pooler
        if pooler and pooler in names:
            moments = pooler_moments(dense, streams, student_streams)
            note(pooler, _fit(factored.get_submodule(pooler), dense.get_submodule(pooler), *moments, fit))
    return {name: errors[name] for name in names if name in errors}


def _is_factored(module: nn.Module) -> bool:
    return isinstance(module, (KroneckerLinear, KroneckerEmbedding))


def check_text(teacher: PreTrainedModel, batches: Sequence[CalibrationBatch], modules: Iterable[nn.Module]) -> None:
    """Refuse, before long work, what `calibrate` would refuse for these layers of a student.

    Raises:
        ValueError: too little text, a model without layers, or a feed-forward layer that computes in chunks.
    """
    if not teacher.config.num_hidden_layers:
        raise ValueError("num_hidden_layers=0 of the teacher leaves no layer to calibrate; leave calibration out")
    if chunk := getattr(teacher.config, "chunk_size_feed_forward", 0):
        raise ValueError(
            f"chunk_size_feed_forward={chunk} must be 0 for calibration; set it so in the teacher's config and load "
            "the teacher again"
        )
    check_amount(batches, modules)
    check_held_out(teacher, batches)


def warn_of_little_text(batches: Sequence[CalibrationBatch], modules: Iterable[nn.Module]) -> None:
    """Say so where layers will fit the text, and not what it is a sample of; a tenth less is none the worse."""
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    wanted = TOKENS_PER_INPUT * largest_inputs(modules)
    if tokens < 0.9 * wanted:
        logger.warning(
            "calibration text of %s tokens is little: %s are better, %d for each input of the largest layer, or the "
            "factors fit this text better than any other; give %.1f times as much",
            f"{tokens:,}", f"{wanted:,}", TOKENS_PER_INPUT, wanted / tokens,
        )  # fmt: skip


def check_amount(batches: Sequence[CalibrationBatch], modules: Iterable[nn.Module]) -> None:
    """Refuse less text than the largest of some linear layers, dense or factored, needs.

    Raises:
        ValueError: with how much is needed.
    """
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    needed = largest_inputs(modules)
    if tokens < needed:
        raise ValueError(
            f"calibration text of {tokens:,} tokens is too little: the largest layer has {needed:,} inputs, and at "
            f"least as many tokens are needed; give at least {-(-needed // tokens)} times as much, better more"
        )


def largest_inputs(modules: Iterable[nn.Module]) -> int:
    """Inputs of the largest linear layer among them, dense or factored."""
    return max(map(_inputs, modules), default=1)


def _inputs(module: Any) -> int:
    """Of a linear layer; 1 of other modules, for which any text will do."""
    if isinstance(module, KroneckerLinear):
        return module.in_features
    return weight_of(module).shape[1] if isinstance(module, (nn.Linear, Conv1D)) else 1


def _fit_group(
    layer: nn.Module,
    student_layer: nn.Module,
    group: list[str],
    streams: list[Stream],
    student_streams: list[Stream],
    fit: bool,
) -> Iterator[tuple[str, LayerErrors]]:
    """Fit modules of one layer that share their input."""
    text, held_out = group_moments(layer, student_layer, group, streams, student_streams)
    start = 0
    for name in group:
        module: Any = student_layer.get_submodule(name)
        rows = slice(start, start := start + module.out_features)
        yield name, _fit(module, layer.get_submodule(name), text.rows(rows), held_out.rows(rows), fit)


def group_moments(
    layer: nn.Module, student_layer: nn.Module, group: list[str], streams: list[Stream], student_streams: list[Stream]
) -> tuple[Moments, Moments]:
    """Moments of modules of one layer that share their input, their outputs one after the other: to fit, and held out.

    Raises:
        ValueError: activations that are not finite.
    """
    sums = SplitSums(f"layer {group[0]!r}")
    for stream, student_stream in zip(streams, student_streams, strict=True):
        with seeing({name: layer.get_submodule(name) for name in group}, outputs=True) as outputs:
            stream.through(layer)
        with seeing({"x": student_layer.get_submodule(group[0])}) as inputs:
            student_stream.through(student_layer)
        y = torch.cat([outputs[name][stream.real] for name in group], -1)
        sums.add(stream.held_out, inputs["x"][0][0][stream.real], y)
    return sums.finish()


def layer_moments(
    layer: nn.Module, groups: Sequence[Sequence[str]], streams: list[Stream]
) -> list[tuple[Moments, Moments]]:
    """The same for all groups of a layer of the teacher, with its own inputs, in one pass that streams go through.

    Raises:
        ValueError: activations that are not finite.
    """
    sums = [SplitSums(f"layer {group[0]!r}") for group in groups]
    modules = {name: layer.get_submodule(name) for group in groups for name in group}
    for stream in streams:
        with recording(modules) as seen:
            stream.advance(layer)
        for group, both in zip(groups, sums, strict=True):
            x, _ = seen[group[0]]
            both.add(stream.held_out, x[stream.real], torch.cat([seen[name][1][stream.real] for name in group], -1))
    return [both.finish() for both in sums]


def projection_moments(dense: Any, factored: Any, batches: Sequence[CalibrationBatch]) -> tuple[Moments, Moments]:
    """The same for the projection after the embedding."""
    sums = SplitSums("the projection of the embedding")
    for batch in batches:
        inputs = batch.inputs(dense.device)
        real = inputs["attention_mask"].bool()
        with seeing({"y": projection_of(dense)}, outputs=True) as outputs:
            dense(**inputs)
        with seeing({"x": projection_of(factored)}) as seen:
            factored(**inputs)
        sums.add(batch.held_out, seen["x"][0][0][real], outputs["y"][real])
    return sums.finish()


def pooler_moments(dense: Any, streams: list[Stream], student_streams: list[Stream]) -> tuple[Moments, Moments]:
    """The same for the pooler, which sees the first token only; streams are at the end of the last layer."""
    sums = SplitSums("the pooler")
    pooler = dense.get_submodule(family_of(dense).pooler)
    for stream, student_stream in zip(streams, student_streams, strict=True):
        sums.add(stream.held_out, student_stream.hidden[:, 0], pooler(stream.hidden[:, 0]))
    return sums.finish()


def _fit(module: KroneckerLinear, dense: nn.Module, text: Moments, held_out: Moments, fit: bool) -> LayerErrors:
    """Calibrated factors and bias for one module, if they are better than those it has on text that is held out."""
    bias: Any = module.bias  # all layers of the families that a plan may name have one
    m1, terms, n1 = module.A.shape
    nearest = held_out.relative_error(module.A, module.B, bias)
    if not fit:
        return LayerErrors(nearest, nearest)
    found = calibrated_kronecker(weight_of(dense), text, m1, n1, terms)
    calibrated = held_out.relative_error(found.A, found.B, found.bias)
    if calibrated >= nearest:
        return LayerErrors(nearest, nearest)
    module.A.copy_(found.A)
    module.B.copy_(found.B)
    bias.copy_(found.bias)
    return LayerErrors(nearest, calibrated)


def row_weights(
    dense: Any, names: Sequence[str], batches: Sequence[CalibrationBatch], more: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """How much each row of the embeddings among these modules counts: to fit, and to judge on held-out text; (m,) each.

    Words count as often as the text has them, positions and distances all the same, for later text may be longer. To
    fit, `more` (vocabulary,) may say how often words occur in more text; they count by a power of that then.
    """
    family = family_of(dense)
    modules = {name: dense.get_submodule(name) for name in names}
    modules = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    counts = {
        held_out: {name: torch.zeros(len(m.weight), dtype=torch.float64) for name, m in modules.items()}
        for held_out in (False, True)
    }
    counted = {name: module for name, module in modules.items() if name not in (family.positions, family.position_bias)}
    for batch in batches if counted else ():
        with seeing(counted) as seen:
            inputs = batch.inputs(dense.device)
            dense(**inputs, use_cache=False)
        real = inputs["attention_mask"].bool()
        for name, ((rows, *_), _) in seen.items():
            found = counts[batch.held_out][name]
            found += torch.bincount(rows.expand(real.shape)[real], minlength=len(found)).cpu()
    weights = {}
    for name, module in modules.items():
        fit, held_out = counts[False][name], counts[True][name]
        fit = fit + UNSEEN if more is None or name != family.words else (more + UNSEEN) ** EVENED
        if name not in counted:
            fit = held_out = torch.ones_like(fit)
        weights[name] = fit.to(module.weight.device), held_out.to(module.weight.device)
    return weights


def _fit_embedding(
    module: KroneckerEmbedding, dense: nn.Module, text: Tensor, held_out: Tensor, fit: bool
) -> LayerErrors:
    """Factors that suit the rows by their weights, if they are better than those it has on text that is held out."""
    W: Any = dense.weight
    m1, terms, n1 = module.A.shape
    nearest = row_error(W, module.to_dense(), held_out)
    if not fit:
        return LayerErrors(nearest, nearest)
    before = [tensor.clone() for tensor in module.state_dict().values()]
    A, B = weighted_kronecker(W, text, m1, n1, terms)
    module.A.copy_(A)
    module.B.copy_(B)
    if (own := module.frequent) is not None:
        rest = W - kronecker_product(A, B)
        words = farthest_rows(rest, own.m1, text)
        A, B = weighted_kronecker(rest[words], text[words], own.m1, own.n1, own.terms)
        own.words.copy_(words)
        own.A.copy_(A)
        own.B.copy_(B)
    calibrated = row_error(W, module.to_dense(), held_out)
    if calibrated >= nearest:
        for tensor, value in zip(module.state_dict().values(), before, strict=True):
            tensor.copy_(value)
        return LayerErrors(nearest, nearest)
    return LayerErrors(nearest, calibrated)


def row_error(W: Tensor, found: Tensor, weights: Tensor) -> float:
    """Relative error of the rows of an embedding (m, n), weighted (m,)."""
    squared = (W - found).double().square().sum(1) @ weights
    return float((squared / (W.double().square().sum(1) @ weights)).sqrt())
