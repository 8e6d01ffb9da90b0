"""Single layers as graphs for ONNX Runtime, made as `export_onnx` makes those of whole models; to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .onnx import OPSET, quietly, require_packages, to_int8


class _SideBySide(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


@torch.no_grad()
def layer_graphs(layers: Sequence[nn.Module], x: Tensor, int8: bool) -> list[bytes]:
    """One graph of each layer, for inputs of the shape of x, under the name "x".

    Args:
        layers: at least one, as `products` makes them; all take x.
        x: an input. The layers are exported together, which takes a tenth of the time of one by one.
        int8: in 8 bits.

    Raises:
        ImportError: as `export_onnx`.
    """
    require_packages()
    import onnx_ir as ir
    from onnx.utils import Extractor

    with quietly():
        program: Any = torch.onnx.export(
            _SideBySide(layers).eval(), (x,), dynamo=True, opset_version=OPSET, verbose=False
        )
        proto = ir.to_proto(program.model)
        if int8:
            proto = ir.to_proto(to_int8(proto))
        parts = Extractor(proto)
        return [parts.extract_model(["x"], [value.name]).SerializeToString() for value in proto.graph.output]
