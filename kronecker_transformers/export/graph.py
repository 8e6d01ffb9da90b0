"""What transformers' exporter leaves to be done for a graph of ONNX: passes, each in place, on `onnx_ir`.

In ONNX Runtime on a CPU its `SkipLayerNormalization` takes more than twice the time of the sum and the norm that it
joins, and its `BiasGelu` nearly twice that of `Gelu`, after a product that adds the bias (`benchmarks/device.py`).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

RANGE = 64
"""Largest integer of a weight of 8 bits. With 127, sums of two products overflow on processors that lack VNNI."""


def for_cpu(model: ir.Model) -> None:
    """All passes for a graph that the exporter has fused for ONNX Runtime."""
    for node in list(model.graph):
        if node.op_type == "SkipLayerNormalization":
            _split_norm(model.graph, node)
        elif node.op_type == "BiasGelu":
            _split_gelu(model.graph, node)
        elif node.op_type == "FusedMatMul":
            _turn_weight(model.graph, node)
    _share_tables(model.graph)
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)  # where in Python each node comes from


def name_inputs(graph: ir.Graph) -> None:
    """Give keys and values, and sizes that vary, the names that others look for.

    past_key_values.0.key (batch, heads, past_sequence, size), present.0.key and so on; the exporter numbers them all.
    """
    sizes: dict[str, str] = {}
    named: list[Any] = [*graph.inputs, *graph.outputs]
    for value in named:
        prefix = "past_key_values" if value.is_graph_input() else "present"
        if match := re.fullmatch(r".*past_key_values\.layers\.(\d+)\.(key|value)s", value.name or ""):
            value.name = f"{prefix}.{match[1]}.{match[2]}"
        if not value.is_graph_input():
            if match:
                sizes[str(value.shape[2])] = "total_sequence"
            continue
        names = ["batch", *(["choices"] if len(value.shape) == 3 else []), "sequence"]
        if match:
            names = ["batch", "", "past_sequence", ""]
        elif value.name == "attention_mask" and any(other.name == "position_ids" for other in graph.inputs):
            names = ["batch", "total_sequence"]
        sizes |= {str(size): name for size, name in zip(value.shape, names, strict=True) if name}
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:  # a number that varies in none of the examples has become a name
            value.shape = ir.Shape(
                [int(str(size)) if str(size).isdigit() else sizes.get(str(size)) for size in value.shape]
            )


def _split_norm(graph: ir.Graph, node: ir.Node) -> None:
    """A norm of a sum; `Sum` is what no runtime fuses with the norm again."""
    x, residual, scale, shift, *bias = node.inputs
    if bias and bias[0] is not None:
        x = _add(graph, node, "Add", [x, bias[0]], node.outputs[0])
    total = _add(graph, node, "Sum", [x, residual], node.outputs[0])
    if len(node.outputs) > 3:
        ir.convenience.replace_all_uses_with(node.outputs[3], total, replace_graph_outputs=True)
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    _replace(
        graph, node, _add(graph, node, "LayerNormalization", [total, scale, shift], node.outputs[0], epsilon=epsilon)
    )


def _split_gelu(graph: ir.Graph, node: ir.Node) -> None:
    total = _add(graph, node, "Add", list(node.inputs), node.outputs[0])
    _replace(graph, node, _add(graph, node, "Gelu", [total], node.outputs[0]))


def _turn_weight(graph: ir.Graph, node: Any) -> None:
    """A product with a constant weight that the exporter leaves to be transposed: quantizers know it the other way."""
    states, weight = node.inputs
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if not weight.is_initializer() or attributes.pop("transB", 0) != 1 or attributes.pop("alpha", 1.0) != 1:
        return
    if any(attributes.values()):  # the states are transposed too
        return
    name = f"{weight.name}_transposed"
    if name not in graph.initializers:
        _constant(graph, name, np.ascontiguousarray(weight.const_value.numpy().T))
    product = ir.node("MatMul", [states, graph.initializers[name]], name=f"{node.name}_turned")
    product.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, product)
    _replace(graph, node, product.outputs[0])


def _share_tables(graph: ir.Graph) -> None:
    """Words that are looked up in the weight of the output head, where the exporter has stored it a second time.

    A head needs its weight as (k, words); a look-up then takes columns of it. Only the largest is shared: with a second
    one, that of frequent words, ONNX Runtime 1.32 crashes while it loads the graph of a GPT-2 in half precision.
    """
    nodes: list[Any] = list(graph)
    weights: dict[tuple[int, ...], list[Any]] = {}
    for node in nodes:
        if node.op_type == "MatMul" and (weight := node.inputs[1]).is_initializer():
            weights.setdefault(tuple(weight.shape), []).append(weight)
    found: list[tuple[Any, Any]] = []
    for node in nodes:
        if node.op_type != "Gather" or not node.inputs[0].is_initializer() or node.attributes.get_int("axis", 0) != 0:
            continue
        table = node.inputs[0]
        for weight in weights.get(tuple(table.shape)[::-1], ()):
            if np.array_equal(table.const_value.numpy().T, weight.const_value.numpy()):
                found.append((node, weight))
                break
    largest = max((weight.const_value.size for _, weight in found), default=0)
    for node, weight in found:
        if weight.const_value.size == largest:
            rows = node.inputs[1]
            columns = _add(graph, node, "Gather", [weight, rows], None, axis=1)
            order = [*range(1, 1 + len(rows.shape)), 0]
            _replace(graph, node, _add(graph, node, "Transpose", [columns], node.outputs[0], perm=order))


def rest_to_int8(model: ir.Model, smallest: int) -> None:
    """Store as 8-bit integers what quantized products have left in floats, a scale for each row.

    Look-ups take integers, and become floats afterwards. The weight of a product that is left of its input becomes one
    of floats when the graph is loaded, by the runtime's folding of constants.

    Args:
        model: with products of 8 bits; a table that is the weight of one as well is not stored again.
        smallest: entries; smaller weights are left as they are.
    """
    graph = model.graph
    last = _constant(graph, "last_axis", np.array([-1]))
    weights: list[Any] = list(graph.initializers.values())
    for weight in weights:
        values = weight.const_value.numpy()
        if values.dtype != np.float32 or values.ndim != 2 or values.size < smallest:
            continue
        for node, index in list(weight.uses()):
            if node.op_type not in ("Gather", "MatMul", "FusedMatMul"):  # scales of blocks, say
                continue
            is_table = node.op_type == "Gather" and index == 0
            axis = node.attributes.get_int("axis", 0) if is_table else 0
            integers, scales = _quantized(graph, weight, axis)
            if is_table:
                integers = _add(graph, node, "Gather", [integers, node.inputs[1]], axis=axis)
                scales = _add(graph, node, "Gather", [scales, node.inputs[1]])
            if axis == 0:
                scales = _add(graph, node, "Unsqueeze", [scales, last])
            floats = _add(graph, node, "Mul", [_add(graph, node, "Cast", [integers], to=ir.DataType.FLOAT), scales])
            if is_table:
                _replace(graph, node, floats)
            else:
                node.replace_input_with(index, floats)
    RemoveUnusedNodesPass()(model)


def _quantized(graph: ir.Graph, weight: Any, axis: int) -> tuple[ir.Value, ir.Value]:
    """Integers (m, n) and scales along an axis; those of a quantized product where the weight is that of one too."""
    names = [f"{weight.name}{suffix}" for suffix in (TENSOR_NAME_QUANT_SUFFIX, "_scale")]
    if names[0] not in graph.initializers:
        values = weight.const_value.numpy()
        scales = np.abs(values).max(1 - axis) / RANGE
        integers = np.round(values / np.expand_dims(np.where(scales, scales, 1), 1 - axis))
        for name, content in zip(names, (integers.astype(np.int8), scales.astype(np.float32)), strict=True):
            _constant(graph, name, content)
    return graph.initializers[names[0]], graph.initializers[names[1]]


def _constant(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    tensor = ir.tensor(content, name=name)
    value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _add(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: list[Any], like: ir.Value | None = None, **attributes: Any
) -> ir.Value:
    """A new node; its output, of the type and shape of another value."""
    node = ir.node(kind, inputs, attributes)
    if like is not None:
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let a value stand for the first output of a node, which is removed."""
    old = node.outputs[0]
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name, value.shape, value.type = old.name, old.shape, old.type
