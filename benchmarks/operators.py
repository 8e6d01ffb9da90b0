"""Operators of ONNX Runtime that do the same, between which `export/graph.py` and `export/onnx.py` choose.

The section operators of `device.py`: milliseconds for 8 x 128 tokens of BERT-base, one thread.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from kronecker_transformers.evaluation.timing import in_turn, median_and_spread
from kronecker_transformers.export.runtimes import open_session

MS = "com.microsoft"


def operators() -> None:
    """Time all, in turn."""
    batch, length, hidden, heads = 8, 128, 768, 12
    generator = np.random.default_rng(0)
    scale, shift, bias = generator.standard_normal((3, hidden)).astype(np.float32)
    wide = generator.standard_normal(4 * hidden).astype(np.float32)
    by_heads, merged = np.array([0, 0, heads, hidden // heads]), np.array([0, 0, hidden])
    x, r = ("x", hidden), ("r", hidden)
    states = [(name, hidden) for name in "qkv"]

    def split(name: str, perm: list[int]) -> list[tuple]:
        return [("Reshape", [name, by_heads], {}), ("Transpose", [-1], {"perm": perm})]

    graphs: dict[str, tuple[list[tuple[str, int]], list[tuple]]] = {
        "SkipLayerNormalization": (
            [x, r],
            [("SkipLayerNormalization", ["x", "r", scale, shift, bias], {"domain": MS})],
        ),
        "Add, Sum, LayerNormalization": (
            [x, r],
            [("Add", ["x", bias], {}), ("Sum", [-1, "r"], {}), ("LayerNormalization", [-1, scale, shift], {})],
        ),
        "BiasGelu": ([("x", 4 * hidden)], [("BiasGelu", ["x", wide], {"domain": MS})]),
        "Gelu": ([("x", 4 * hidden)], [("Gelu", ["x"], {})]),
        "MultiHeadAttention": (states, [("MultiHeadAttention", list("qkv"), {"domain": MS, "num_heads": heads})]),
        "Attention": (states, [("Attention", list("qkv"), {"q_num_heads": heads, "kv_num_heads": heads})]),
        "MatMul, Softmax, MatMul": (
            states,
            [
                *split("q", [0, 2, 1, 3]), *split("k", [0, 2, 3, 1]), ("MatMul", [-3, -1], {}),
                ("Mul", [-1, np.float32((hidden / heads) ** -0.5)], {}), ("Softmax", [-1], {}),
                *split("v", [0, 2, 1, 3]), ("MatMul", [-3, -1], {}),
                ("Transpose", [-1], {"perm": [0, 2, 1, 3]}), ("Reshape", [-1, merged], {}),
            ],
        ),
    }  # fmt: skip
    passes = {}
    for name, (inputs, steps) in graphs.items():
        session = _session(inputs, steps)
        feed = {key: generator.standard_normal((batch, length, size)).astype(np.float32) for key, size in inputs}
        passes[name] = partial(session.run, None, feed)
    print(f"\n{'operators, 8 x 128 tokens of 768':40s}{'ms':>8s}")
    for name, seconds in in_turn(passes, 31).items():
        print(f"{name:40s}{median_and_spread(seconds)[0]:8.2f}")


def _session(inputs: list[tuple[str, int]], steps: list[tuple]) -> Any:
    """A graph of steps; an integer among the inputs of one counts steps backwards, an array is a constant."""
    nodes, constants = [], []
    for index, (kind, given, attributes) in enumerate(steps):
        names = []
        for position, item in enumerate(given):
            if isinstance(item, str):
                names.append(item)
            elif isinstance(item, int):
                names.append(f"step{index + item}")
            else:
                names.append(f"constant{index}_{position}")
                constants.append(numpy_helper.from_array(np.asarray(item), names[-1]))
        nodes.append(helper.make_node(kind, names, [f"step{index}"], **attributes))
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", "t", size]) for n, size in inputs],
        [helper.make_tensor_value_info(f"step{len(steps) - 1}", TensorProto.FLOAT, None)], constants,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(MS, 1)]
    return open_session(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString(), 1)
