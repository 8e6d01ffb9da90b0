"""What the layers of a plan cost in time on this machine: measured candidates for `search_plan`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from tqdm import tqdm
from transformers import PreTrainedModel

from ..evaluation.timing import forward_pass, in_turn, without_linear_layers
from ..models.factor_plan import FactorEntry
from ..models.kronecker_blocks import BLOCK
from ..models.kronecker_family import family_of
from ..models.kronecker_layers import kronecker_embedding, kronecker_linear
from .candidates import Candidate, MeasuredLayer

ROUNDS = 7
"""Of a measurement, after one to warm up."""
STEP = 4
"""Every fourth of the candidates of a shape is measured, and the largest; in between, time is linear in the terms.

Each is measured alone, with its weights in the cache; what that hides, the time of the whole plan shows.
"""


@dataclass(frozen=True)
class Runtime:
    """What is timed: one forward pass, eager, without gradients, on the teacher's device and in its dtype."""

    batch: int = 1
    """Sequences."""
    length: int = 128
    """Tokens of each."""

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("length", self.length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1; give a larger number")

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} tokens, eager"


class LatencyTable:
    """Milliseconds of layers, measured when they are first asked for.

    Args:
        teacher: gives device and dtype.
        runtime: what is timed; an encoder on a CPU sees a large batch in blocks (`kronecker_blocks`).
    """

    def __init__(self, teacher: PreTrainedModel, runtime: Runtime) -> None:
        self._options: dict[str, Any] = {"device": teacher.device, "dtype": teacher.dtype}
        rows = runtime.batch
        self._family = family_of(teacher)
        if not self._family.causal and teacher.device.type == "cpu":
            rows = min(rows, max(1, BLOCK // (runtime.length * teacher.config.hidden_size)))
        self._rows, self._length, self._blocks = rows, runtime.length, runtime.batch / rows
        self._known: dict[tuple[Any, ...], float] = {}

    def timed(self, layers: Sequence[MeasuredLayer], progress: bool = False) -> list[list[Candidate]]:
        """The candidates of all layers with their times."""
        bar = tqdm(layers, desc="timing candidates", unit="layer", disable=not progress)
        with torch.random.fork_rng(devices=[]):
            return [self._candidates(layer) for layer in bar]

    def _candidates(self, layer: MeasuredLayer) -> list[Candidate]:
        shapes = defaultdict(list)
        for candidate in layer.candidates:
            shapes[candidate.entry and (candidate.entry.m1, candidate.entry.n1)].append(candidate)
        found = []
        for group in shapes.values():
            group.sort(key=lambda c: c.parameters)
            measured = {c.parameters: self._milliseconds(layer, c.entry) for c in (*group[::STEP], group[-1])}
            times = np.interp([c.parameters for c in group], list(measured), list(measured.values()))
            if self._is_embedding(layer):  # what the dense one takes is part of the rest
                times = np.maximum(times - self._milliseconds(layer, None), 0)
            found += [replace(c, milliseconds=float(t)) for c, t in zip(group, times, strict=True)]
        return found

    def _is_embedding(self, layer: MeasuredLayer) -> bool:
        return layer.name in (self._family.words, self._family.positions)

    def _milliseconds(self, layer: MeasuredLayer, entry: FactorEntry | None) -> float:
        m, n = layer.weight.shape
        is_embedding = self._is_embedding(layer)
        tokens = self._rows * self._length
        if layer.name == self._family.pooler:
            tokens = self._rows
        elif layer.name == self._family.positions:
            tokens = self._length
        key = (m, n, entry, is_embedding, tokens)
        if key not in self._known:
            factors = [torch.randn(m, n, **self._options)]
            if entry is not None:
                m2, n2 = entry.b_shape(m, n)
                sizes = ((entry.m1, entry.terms, entry.n1), (m2, entry.terms, n2))
                factors = [torch.randn(size, **self._options) for size in sizes]
            if is_embedding:
                x = torch.randint(m, (tokens,), device=self._options["device"])
                layer_function: Callable[..., Tensor] = embedding if entry is None else kronecker_embedding
            else:
                x = torch.randn(tokens, n, **self._options)
                factors.append(torch.randn(m, **self._options))  # the bias
                layer_function = linear if entry is None else kronecker_linear
            self._known[key] = self._blocks * _milliseconds(partial(layer_function, x, *factors), x.device)
        return self._known[key]

    def rest(self, base: PreTrainedModel) -> float:
        """Milliseconds of all that is not a linear layer in a forward pass of a dense base model."""
        with without_linear_layers(base):
            return self._blocks * _milliseconds(forward_pass(base, self._rows, self._length), base.device)


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    return 1e3 * statistics.median(in_turn({"": work}, ROUNDS, warmup=1, device=device)[""])


def measured_passes(student: PreTrainedModel, dense: PreTrainedModel, runtime: Runtime) -> tuple[float, float]:
    """Milliseconds of a forward pass of each, in turn."""
    passes = {name: forward_pass(model, runtime.batch, runtime.length) for name, model in
              (("student", student), ("dense", dense))}  # fmt: skip
    seconds = in_turn(passes, ROUNDS, device=dense.device)
    return 1e3 * statistics.median(seconds["student"]), 1e3 * statistics.median(seconds["dense"])
