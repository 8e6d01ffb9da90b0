"""What the layers of a plan cost in time in ONNX Runtime on this machine."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..evaluation.sessions import session_pass, share_of_products
from ..evaluation.timing import in_turn
from ..export.layer_graphs import layer_graphs
from ..export.onnx import require_packages, write_graphs
from ..export.parity import FORMS
from ..export.products import linear_of, product_embedding, product_linear
from ..export.runtimes import open_session
from ..models.factor_plan import FactorEntry
from ..models.kronecker_layers import KroneckerEmbedding, KroneckerLinear
from .candidates import MeasuredLayer
from .latency import ROUNDS, LatencyTable, Runtime

ROWS = 4096
"""Of the tables with which embeddings are timed: a look-up takes what it takes, however many rows there are."""


class SessionTable(LatencyTable):
    """As `LatencyTable`, of the graphs that `export_onnx` writes.

    The candidates of a layer are exported together, and take turns.

    Raises:
        ImportError: as `export_onnx`.
    """

    def __init__(self, teacher: PreTrainedModel, runtime: Runtime) -> None:
        require_packages()
        super().__init__(teacher, runtime)
        self._form = "int8" if runtime.int8 else "fp32"

    def _milliseconds(self, layer: MeasuredLayer, entries: Sequence[FactorEntry | None]) -> list[float]:
        if not entries:
            return []
        m, n = layer.weight.shape
        shape = self._input_shape(layer)
        if self._is_embedding(layer):
            x = torch.randint(min(m, ROWS), shape)
            modules = [_embedding(min(m, ROWS), n, entry) for entry in entries]
        else:
            x = torch.randn(*shape, n)
            modules = [_linear(m, n, entry) for entry in entries]
        sessions = [open_session(graph) for graph in layer_graphs(modules, x, self.runtime.int8)]
        passes = {str(i): partial(session.run, None, {"x": x.numpy()}) for i, session in enumerate(sessions)}
        return [1e3 * statistics.median(times) for times in in_turn(passes, ROUNDS, warmup=1).values()]

    def rest(self, base: PreTrainedModel) -> float:
        """Milliseconds of all that is not a linear layer, or the quantization of its input, in the dense graph."""
        shape, words = (self.runtime.batch, self.runtime.length), base.config.vocab_size
        with tempfile.TemporaryDirectory() as scratch:
            path = self._exported(base, Path(scratch) / "dense")
            forward = session_pass(open_session(path), *shape, words=words)
            whole = statistics.median(in_turn({"": forward}, ROUNDS)[""])
            return 1e3 * whole * (1 - share_of_products(path, *shape, words=words, also=("DynamicQuantizeLinear",)))

    def whole(self, student: PreTrainedModel, dense: PreTrainedModel) -> tuple[float, float]:
        """Milliseconds of a forward pass of each, in turn."""
        with tempfile.TemporaryDirectory() as scratch:
            passes = {}
            for name, model in (("student", student), ("dense", dense)):
                session = open_session(self._exported(model, Path(scratch) / name))
                words = model.config.vocab_size
                passes[name] = session_pass(session, self.runtime.batch, self.runtime.length, words=words)
            seconds = in_turn(passes, ROUNDS)
        return 1e3 * statistics.median(seconds["student"]), 1e3 * statistics.median(seconds["dense"])

    def _exported(self, model: PreTrainedModel, folder: Path) -> Path:
        folder.mkdir()
        fp32 = copy.deepcopy(model).cpu().float().eval()
        write_graphs(fp32, folder, dict.fromkeys(("fp32", self._form)))
        return folder / FORMS[self._form]


def _linear(m: int, n: int, entry: FactorEntry | None) -> nn.Module:
    """A linear layer with random weights, as it is exported."""
    if entry is None:
        return linear_of(torch.randn(m, n), torch.randn(m))
    layer = KroneckerLinear(n, m, entry.m1, entry.n1, entry.terms)
    layer.bias = nn.Parameter(torch.randn(m))  # the graph would leave one of 0 out
    return product_linear(layer)


def _embedding(m: int, n: int, entry: FactorEntry | None) -> nn.Module:
    """A table with random weights, as it is exported."""
    if entry is None:
        return nn.Embedding(m, n)
    frequent = min(m, entry.frequent)
    return product_embedding(
        KroneckerEmbedding(m, n, m, entry.n1, entry.terms, frequent=frequent, frequent_terms=entry.frequent_terms)
    )
