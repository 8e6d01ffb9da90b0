"""What the layers of a plan cost in time on this machine: measured candidates for `search_plan`."""

from __future__ import annotations

import math
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
from ..models.kronecker_layers import KroneckerEmbedding, kronecker_linear
from .candidates import Candidate, MeasuredLayer

ENGINES = ("torch", "onnxruntime")
"""What can be timed."""
ROUNDS = 7
"""Of a measurement, after one to warm up."""
STEP = 4
"""Every fourth of the candidates of a shape is measured, and the largest; in between, time is linear in the terms.

Each is measured alone, with its weights in the cache; what that hides, the time of the whole plan shows.
"""


@dataclass(frozen=True)
class Runtime:
    """What is timed: one forward pass.

    In PyTorch it is eager, without gradients, on the teacher's device and in its dtype; in ONNX Runtime it is that of
    the exported graph on the CPU.

    Raises:
        ValueError: fewer than 1 sequence or token, an unknown engine, or 8 bits in PyTorch.
    """

    batch: int = 1
    """Sequences."""
    length: int = 128
    """Tokens of each."""
    engine: str = "torch"
    """One of `ENGINES`."""
    int8: bool = False
    """In ONNX Runtime, with weights and products of 8 bits."""

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("length", self.length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1; give a larger number")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is not known; choose from {', '.join(ENGINES)}")
        if self.int8 and self.engine == "torch":
            raise ValueError("int8 is timed in ONNX Runtime; take that as engine, or leave int8 out")

    def __str__(self) -> str:
        how = "eager" if self.engine == "torch" else f"ONNX Runtime, {'int8' if self.int8 else 'fp32'}"
        return f"{self.batch} x {self.length} tokens, {how}"


class LatencyTable:
    """Milliseconds of layers, measured when they are first asked for.

    Args:
        teacher: gives device and dtype.
        runtime: what is timed; in PyTorch an encoder on a CPU sees a large batch in blocks (`kronecker_blocks`).
    """

    def __init__(self, teacher: PreTrainedModel, runtime: Runtime) -> None:
        self._options: dict[str, Any] = {"device": teacher.device, "dtype": teacher.dtype}
        self.runtime = runtime
        rows = runtime.batch
        self._family = family_of(teacher)
        causal = self._family.causal or getattr(teacher.config, "is_decoder", False)
        if runtime.engine == "torch" and not causal and teacher.device.type == "cpu":  # in blocks
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
            entry = candidate.entry
            shapes[entry and (entry.m1, entry.n1, bool(entry.frequent))].append(candidate)
        for group in shapes.values():
            group.sort(key=lambda c: c.parameters)
        sparse = {shape: (*group[::STEP], group[-1]) for shape, group in shapes.items()}
        # what the dense embedding takes is part of the rest
        dense = [None] if self._is_embedding(layer) else []
        known = self._measured(layer, [*dense, *(c.entry for group in sparse.values() for c in group)])
        found = []
        for shape, group in shapes.items():
            measured = {c.parameters: known[c.entry] for c in sparse[shape]}
            times = np.interp([c.parameters for c in group], list(measured), list(measured.values()))
            if dense:
                times = np.maximum(times - known[None], 0)
            found += [replace(c, milliseconds=float(t)) for c, t in zip(group, times, strict=True)]
        return found

    def _is_embedding(self, layer: MeasuredLayer) -> bool:
        return layer.name in (self._family.words, self._family.positions)

    def _input_shape(self, layer: MeasuredLayer) -> tuple[int, int]:
        """Sequences and tokens that the layer sees at once."""
        if layer.name == self._family.pooler:
            return self._rows, 1
        return (1 if layer.name == self._family.positions else self._rows), self._length

    def _measured(self, layer: MeasuredLayer, entries: Sequence[FactorEntry | None]) -> dict[FactorEntry | None, float]:
        """Milliseconds of the layer with each of these entries, None for the dense layer."""
        place = (*layer.weight.shape, self._is_embedding(layer), self._input_shape(layer))
        missing = [entry for entry in dict.fromkeys(entries) if (*place, entry) not in self._known]
        for entry, time in zip(missing, self._milliseconds(layer, missing), strict=True):
            self._known[*place, entry] = time
        return {entry: self._known[*place, entry] for entry in entries}

    def _milliseconds(self, layer: MeasuredLayer, entries: Sequence[FactorEntry | None]) -> list[float]:
        m, n = layer.weight.shape
        tokens = math.prod(self._input_shape(layer))
        is_embedding = self._is_embedding(layer)
        found = []
        for entry in entries:
            factors = [torch.randn(m, n, **self._options)]
            if entry is not None and not is_embedding:
                m2, n2 = entry.b_shape(m, n)
                sizes = ((entry.m1, entry.terms, entry.n1), (m2, entry.terms, n2))
                factors = [torch.randn(size, **self._options) for size in sizes]
            if is_embedding:
                x = torch.randint(m, (tokens,), device=self._options["device"])
                layer_function: Callable[..., Tensor] = embedding
                if entry is not None:
                    layer_function = KroneckerEmbedding(
                        m, n, m, entry.n1, entry.terms, **self._options, frequent=entry.frequent,
                        frequent_terms=entry.frequent_terms,
                    )  # fmt: skip
                    factors = []
            else:
                x = torch.randn(tokens, n, **self._options)
                factors.append(torch.randn(m, **self._options))  # the bias
                layer_function = linear if entry is None else kronecker_linear
            found.append(self._blocks * _milliseconds(partial(layer_function, x, *factors), x.device))
        return found

    def rest(self, base: PreTrainedModel) -> float:
        """Milliseconds of all that is not a linear layer in a forward pass of a dense base model."""
        with without_linear_layers(base):
            return self._blocks * _milliseconds(forward_pass(base, self._rows, self._length), base.device)

    def whole(self, student: PreTrainedModel, dense: PreTrainedModel) -> tuple[float, float]:
        """Milliseconds of a forward pass of each, in turn."""
        runtime = self.runtime
        passes = {name: forward_pass(model, runtime.batch, runtime.length) for name, model in
                  (("student", student), ("dense", dense))}  # fmt: skip
        seconds = in_turn(passes, ROUNDS, device=dense.device)
        return 1e3 * statistics.median(seconds["student"]), 1e3 * statistics.median(seconds["dense"])


def _milliseconds(work: Callable[[], object], device: torch.device) -> float:
    return 1e3 * statistics.median(in_turn({"": work}, ROUNDS, warmup=1, device=device)[""])


def latency_table(teacher: PreTrainedModel, runtime: Runtime) -> LatencyTable:
    """The table of a runtime's engine.

    Raises:
        ImportError: what ONNX Runtime needs is missing, as for `export_onnx`.
    """
    if runtime.engine == "torch":
        return LatencyTable(teacher, runtime)
    from .session_latency import SessionTable

    return SessionTable(teacher, runtime)
