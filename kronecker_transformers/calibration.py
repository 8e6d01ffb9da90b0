"""Calibration text, carried through teacher and student layer after layer, gives the student better factors.

Each factored layer is fitted to what the teacher's computes for the same text, given the inputs that the student's
earlier layers, fitted already, pass on (`factorization.calibrated`). The hidden states of both models are carried from
layer to layer, so nothing is computed from the start again; within a layer, modules are fitted in the order in which
they compute. A part of the text is held out: a layer whose nearest factors do better there keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .factorization.calibrated import Moments, MomentSums, calibrated_kronecker, kronecker_product, weighted_kronecker
from .models.kronecker_layers import KroneckerEmbedding, KroneckerLinear

LENGTH = 128
"""Tokens of a calibration sequence, at most."""
BATCH_TOKENS = 4096
"""Tokens that go through the models at a time, at most, padding included."""
HELD_OUT = 10
"""One sequence in so many is held out."""
UNSEEN = 0.1
"""Occurrences that every row of an embedding is taken to have beside those in the text."""


class LayerErrors(NamedTuple):
    """Relative errors of a layer's outputs on held-out text, given the student's own inputs.

    E || y - y' ||^2 / E || y - E y ||^2, its root; for an embedding, relative to E || y ||^2 and by all words of the
    text.
    """

    nearest: float
    """Of the nearest factors."""
    calibrated: float
    """Of the factors that the student has now."""


class CalibrationBatch(NamedTuple):
    """Sequences of similar length, padded on the right."""

    input_ids: Tensor
    """(batch, length)"""
    attention_mask: Tensor
    """(batch, length), 1 for what is not padding."""
    held_out: bool

    @property
    def real(self) -> Tensor:
        """Positions that are not padding, (batch, length), bool."""
        return self.attention_mask.bool()


def calibration_batches(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int = LENGTH
) -> list[CalibrationBatch]:
    """Encode calibration text for BERT, text by text, or for GPT-2, in blocks; longer texts are cut into pieces.

    Args:
        texts: sentences or documents.
        tokenizer: of the teacher.
        model: the teacher, or its student.
        length: tokens of a sequence, at most; cut to what the model can take.

    Returns:
        Batches of sequences of similar length, some of them held out.

    Raises:
        TypeError: a text is not a string, or all is one string.
        ValueError: too few texts.
    """
    if isinstance(texts, str):
        raise TypeError("calibration text is one string; give a list of strings")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"calibration text {index} is of type {type(text).__name__}; give strings")
    texts = [text for text in texts if text.strip()]
    length = min(length, model.config.max_position_embeddings)
    if model.config.model_type.endswith("gpt2"):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = list(chain.from_iterable([*row, *end] for row in tokenizer(texts)["input_ids"])) if texts else []
        rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    else:
        cut = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        rows = tokenizer(texts, **cut)["input_ids"] if texts else []
    if len(rows) < HELD_OUT:
        raise ValueError(
            f"calibration text of {len(texts)} texts gives {len(rows)} sequences of at most {length} tokens; at least "
            f"{HELD_OUT} are needed, and some hundred sentences do well"
        )
    rows.sort(key=len)
    held_out = rows[HELD_OUT // 2 :: HELD_OUT]
    del rows[HELD_OUT // 2 :: HELD_OUT]
    return [*_batches(rows, False), *_batches(held_out, True)]


def _batches(rows: list[list[int]], held_out: bool) -> Iterator[CalibrationBatch]:
    """Batches of sorted rows; padded with 0, since the mask hides what stands there."""
    while rows:
        size = next((n for n in range(1, len(rows)) if (n + 1) * len(rows[n]) > BATCH_TOKENS), len(rows))
        batch, rows = rows[:size], rows[size:]
        ids, mask = torch.zeros(2, size, len(batch[-1]), dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        yield CalibrationBatch(ids, mask, held_out)


@dataclass
class _Stream:
    """A batch on its way through one model: what its next layer is called with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def through(self, layer: nn.Module) -> Tensor:
        output = layer(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


@dataclass
class _Batch:
    """A batch on its way through both models."""

    real: Tensor
    """Positions that are not padding, (batch, length)."""
    held_out: bool
    teacher: _Stream
    student: _Stream


class _Seen(Exception):  # noqa: N818 - not an error
    """All that was wanted has been seen; the rest of the forward pass is not needed."""


@contextmanager
def _seeing(modules: Mapping[str, nn.Module], outputs: bool = False) -> Iterator[dict[str, Any]]:
    """Run something in this block until all modules were called: their (args, kwargs), or their outputs, by name."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            found[name] = output if outputs else (args, kwargs)
            if len(found) == len(modules):
                raise _Seen

        return hook

    register = nn.Module.register_forward_hook if outputs else nn.Module.register_forward_pre_hook
    handles = [register(module, keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with suppress(_Seen):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[CalibrationBatch], progress: bool = False
) -> dict[str, LayerErrors]:
    """Give a student, in place, the factors and biases that suit calibration text. Deterministic.

    Modules that text alone does not reach, those of cross-attention, keep their nearest factors.

    Args:
        teacher: a dense model; it is not changed.
        student: factored from it, with nearest factors; it is left in evaluation mode.
        batches: from `calibration_batches`.
        progress: show a progress bar on standard error.

    Returns:
        Errors of the factored layers, by their names in `student`.

    Raises:
        ValueError: less text than the largest layer needs, a feed-forward layer that computes in chunks, or activations
            that are not finite; the student is then not fit for use.
    """
    if chunk := getattr(teacher.config, "chunk_size_feed_forward", 0):
        raise ValueError(
            f"chunk_size_feed_forward={chunk} must be 0 for calibration; set it so in the teacher's config"
        )
    training = teacher.training
    try:
        errors = _calibrate(teacher.eval().base_model, student.eval().base_model, batches, progress)
    finally:
        teacher.train(training)
    prefix = "" if student.base_model is student else f"{student.base_model_prefix}."
    return {prefix + name: found for name, found in errors.items()}


def _calibrate(
    dense: Any, factored: Any, batches: Sequence[CalibrationBatch], progress: bool
) -> dict[str, LayerErrors]:
    """The same for base models."""
    names = [name for name, module in factored.named_modules() if _is_factored(module)]
    _check_amount(batches, factored)
    errors: dict[str, LayerErrors] = {}
    with tqdm(desc="calibrating", total=len(names), unit="layer", disable=not progress) as bar:

        def note(name: str, found: LayerErrors) -> None:
            errors[name] = found
            bar.update()

        for name, counts in _looked_up(dense, names, batches).items():
            note(name, _fit_embedding(factored.get_submodule(name), dense.get_submodule(name), counts))
        flow = _enter(dense, factored, batches)
        place, layers = _layers(dense)
        for index, (layer, student_layer) in enumerate(zip(layers, _layers(factored)[1], strict=True)):
            for group in _groups(student_layer, flow[0].student):
                for name, found in _fit_group(layer, student_layer, group, flow):
                    note(f"{place}.{index}.{name}", found)
            for batch in flow:
                batch.teacher.hidden = batch.teacher.through(layer)
                batch.student.hidden = batch.student.through(student_layer)
        if "pooler.dense" in names:
            note("pooler.dense", _fit_pooler(dense, factored, flow))
    return {name: errors[name] for name in names if name in errors}


def _is_factored(module: nn.Module) -> bool:
    return isinstance(module, (KroneckerLinear, KroneckerEmbedding))


def _check_amount(batches: Sequence[CalibrationBatch], student: nn.Module) -> None:
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    needed = max((m.A.shape[2] * m.B.shape[2] for m in student.modules() if isinstance(m, KroneckerLinear)), default=1)
    if tokens < needed:
        raise ValueError(
            f"calibration text of {tokens:,} tokens is too little: the largest layer has {needed:,} inputs, and at "
            f"least as many tokens are needed; give at least {-(-needed // tokens)} times as much, better more"
        )


def _layers(base: Any) -> tuple[str, nn.ModuleList]:
    """Name and modules of the stack of layers of a base model."""
    return ("encoder.layer", base.encoder.layer) if hasattr(base, "encoder") else ("h", base.h)


def _enter(dense: Any, factored: Any, batches: Sequence[CalibrationBatch]) -> list[_Batch]:
    """All batches before the first layer of both models."""
    flow = []
    for batch in batches:
        ids, mask = batch.input_ids.to(dense.device), batch.attention_mask.to(dense.device)
        streams = []
        for model in (dense, factored):
            with _seeing({"first": _layers(model)[1][0]}) as seen:
                model(ids, attention_mask=mask, use_cache=False)
            (hidden, *args), kwargs = seen["first"]
            streams.append(_Stream(hidden, tuple(args), kwargs))
        flow.append(_Batch(mask.bool(), batch.held_out, *streams))
    return flow


def _groups(layer: nn.Module, stream: _Stream) -> list[list[str]]:
    """The factored modules of a layer in the order in which they compute; those that share their input together."""
    modules = {name: module for name, module in layer.named_modules() if _is_factored(module)}
    if not modules:
        return []
    with _seeing(modules) as seen:
        stream.through(layer)
    groups: list[list[str]] = []
    last = None
    for name, ((x, *_), _) in seen.items():
        if x is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return groups


def _fit_group(
    layer: nn.Module, student_layer: nn.Module, group: list[str], flow: Sequence[_Batch]
) -> Iterator[tuple[str, LayerErrors]]:
    """Fit modules of one layer that share their input."""
    sums = {held_out: MomentSums() for held_out in (False, True)}
    for batch in flow:
        with _seeing({name: layer.get_submodule(name) for name in group}, outputs=True) as outputs:
            batch.teacher.through(layer)
        with _seeing({"x": student_layer.get_submodule(group[0])}) as inputs:
            batch.student.through(student_layer)
        y = torch.cat([outputs[name][batch.real] for name in group], -1)
        sums[batch.held_out].add(inputs["x"][0][0][batch.real], y)
    try:
        fit, held_out = sums[False].finish(), sums[True].finish()
    except ValueError as error:
        raise ValueError(f"layer {group[0]!r}: {error}") from error
    start = 0
    for name in group:
        module: Any = student_layer.get_submodule(name)
        rows = slice(start, start := start + module.out_features)
        yield name, _fit(module, layer.get_submodule(name), fit.rows(rows), held_out.rows(rows))


def _fit_pooler(dense: Any, factored: Any, flow: Sequence[_Batch]) -> LayerErrors:
    """Fit BERT's pooler, which sees the first token only."""
    sums = {held_out: MomentSums() for held_out in (False, True)}
    for batch in flow:
        y = dense.pooler.dense(batch.teacher.hidden[:, 0])
        sums[batch.held_out].add(batch.student.hidden[:, 0], y)
    return _fit(factored.pooler.dense, dense.pooler.dense, sums[False].finish(), sums[True].finish())


def _fit(module: KroneckerLinear, dense: nn.Module, fit: Moments, held_out: Moments) -> LayerErrors:
    """Calibrated factors and bias for one module, if they are better than those it has on text that is held out."""
    weight: Any = dense.weight
    bias: Any = module.bias  # all layers of BERT and GPT-2 that a plan may name have one
    m1, terms, n1 = module.A.shape
    found = calibrated_kronecker(weight.t() if isinstance(dense, Conv1D) else weight, fit, m1, n1, terms)
    nearest = held_out.relative_error(module.A, module.B, bias)
    calibrated = held_out.relative_error(found.A, found.B, found.bias)
    if calibrated >= nearest:
        return LayerErrors(nearest, nearest)
    module.A.copy_(found.A)
    module.B.copy_(found.B)
    bias.copy_(found.bias)
    return LayerErrors(nearest, calibrated)


def _looked_up(dense: Any, names: Sequence[str], batches: Sequence[CalibrationBatch]) -> dict[str, Tensor]:
    """How often the text looks up each row of the embeddings among these modules."""
    modules = {name: dense.get_submodule(name) for name in names}
    modules = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    counts = {
        name: module.weight.new_zeros(len(module.weight), dtype=torch.float64) for name, module in modules.items()
    }
    for batch in batches if modules else ():
        mask = batch.attention_mask.to(dense.device)
        with _seeing(modules) as seen:
            dense(batch.input_ids.to(dense.device), attention_mask=mask, use_cache=False)
        for name, ((rows, *_), _) in seen.items():
            counts[name] += torch.bincount(rows.expand(mask.shape)[mask.bool()], minlength=len(counts[name]))
    return counts


def _fit_embedding(module: KroneckerEmbedding, dense: nn.Module, counts: Tensor) -> LayerErrors:
    """Factors that are nearest for the rows that the text looks up."""
    W: Any = dense.weight
    m1, terms, n1 = module.A.shape
    nearest = _row_error(W, module.A, module.B, counts)
    A, B = weighted_kronecker(W, counts + UNSEEN, m1, n1, terms)
    module.A.copy_(A)
    module.B.copy_(B)
    return LayerErrors(nearest, _row_error(W, A, B, counts))


def _row_error(W: Tensor, A: Tensor, B: Tensor, counts: Tensor) -> float:
    squared = (W - kronecker_product(A, B)).square().sum(1) @ counts
    return float((squared / (W.double().square().sum(1) @ counts)).sqrt())
