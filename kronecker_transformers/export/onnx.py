"""A factored model, or a dense one, as graphs for ONNX Runtime or OpenVINO, in a folder that others read as it is.

onnx/model.onnx             fp32
onnx/model_quantized.onnx   int8: products with dynamic quantization, a scale for each output; tables by rows
onnx/model_q4.onnx          int4: weights in blocks of 32, a scale for each
onnx/model_fp16.onnx        fp16, for a GPU or WebGPU
openvino/openvino_model.xml and .bin                    fp32, for OpenVINO
openvino/openvino_model_qint8_quantized.xml and .bin    weights in 8 bits, for OpenVINO
config.json                 that of the stock model: the graphs need no code of this package
tokenizer, and the files of sentence-transformers where the model has them
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import eager_mask

from ..checkpoint.files import check_new_folder, new_folder
from ..checkpoint.load import remember_truncation, save_tokenizer
from ..checkpoint.sentence_modules import modules_of
from ..checkpoint.teachers import check_finite, check_pad_token
from ..models import DENSE_CLASSES
from ..models.kronecker_family import family_of, has_choices, heads_of
from .openvino import require_openvino, write_openvino, write_openvino_int8
from .parity import FORMS, SENTENCES, ExportedFile, checked_graph, has_past, text_batches
from .products import as_products

OPSET = 23
"""Of the graph: the first one with attention as an operator of its own; ONNX Runtime 1.23 or newer runs it."""
BLOCK = 32
"""Entries of a weight of 4 bits that share a scale."""
SMALLEST = 4096
"""Entries of a weight or table that is worth quantizing."""
LARGEST = 2**31 - 1
"""Bytes of a graph in one file, the limit of its format."""


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    also: Iterable[str] = (),
    texts: Sequence[str] = SENTENCES,
) -> list[ExportedFile]:
    """Write a model as graphs for ONNX Runtime, with what it needs beside them, atomically.

    Batch and length are free. A causal language model takes and gives past keys and values, so one graph reads the
    prompt, with a past of length 0, and then makes token after token.

    Args:
        model: factored or dense, with any head that is supported; computed in fp32.
        tokenizer: written beside the graphs; without one, they are compared on random tokens.
        folder: must not exist yet or be empty.
        also: forms that are written beside fp32: int8, int4, fp16.
        texts: on which the graphs are compared with PyTorch.

    Returns:
        What was written.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: an unknown form, no texts, a model of no supported class, a causal classifier without a padding
            token, weights that are not finite or more than a graph holds (2 GiB), or a graph whose outputs differ from
            the model's.
        OSError: the folder cannot be written; as with every other error, nothing is left behind.
    """
    return export_graphs(model, tokenizer, folder, ("fp32", *also), texts=texts)


def export_graphs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    forms: Iterable[str],
    *,
    texts: Sequence[str] = SENTENCES,
) -> list[ExportedFile]:
    """As `export_onnx`, with graphs of these forms alone, among them those for OpenVINO.

    Raises:
        ImportError, ValueError, OSError: as there.
    """
    require_packages()
    forms = tuple(dict.fromkeys(forms))
    if unknown := [form for form in forms or ("",) if form not in FORMS]:
        raise ValueError(f"form={unknown[0]!r} is no form of a graph; choose from {', '.join(FORMS)}")
    if for_openvino := [form for form in forms if form.startswith("openvino")]:
        require_openvino(int8="openvino_int8" in for_openvino)
    if not texts:
        raise ValueError("texts=[] leave nothing to compare the graphs with PyTorch on; give some sentences")
    heads_of(model)  # refuses other classes
    check_finite(model)
    check_new_folder(folder)
    remember_truncation(tokenizer)
    model = copy.deepcopy(model).cpu().float().eval()
    model.config.output_hidden_states = model.config.output_attentions = False  # a graph has the usual outputs alone
    model.config.return_dict = True
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):  # changes no output, but divides the length
            vars(module)["chunk_size_feed_forward"] = 0
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        batches = text_batches(model, tokenizer, texts)
        write_graphs(model, made, forms)
        found = [checked_graph(model, made, form, batches) for form in forms]
        stock_config(model).save_pretrained(made)
        if model.can_generate():
            model.generation_config.save_pretrained(made)
        if tokenizer is not None:
            save_tokenizer(tokenizer, made)
        if modules := modules_of(model):
            modules.write(made)
        with new_folder(folder) as draft:
            shutil.copytree(made, draft, dirs_exist_ok=True)
    return found


def write_graphs(model: PreTrainedModel, folder: Path, forms: Iterable[str]) -> None:
    """Write graphs in a folder that exists, without a comparison.

    Args:
        model: in fp32 on the CPU, in evaluation mode.
        folder: for the files that `parity.FORMS` names.
        forms: which of them.

    Raises:
        ValueError: a model that cannot read several texts at once, or more weights than a graph holds.
    """
    check_pad_token(model)
    if (size := 4 * sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise ValueError(
            f"the {type(model).__name__} has {size / 2**30:.1f} GiB of weights in fp32, and a graph holds at most 2; "
            "export a smaller model"
        )
    forms = set(forms)
    source = folder / FORMS["fp32"]
    source.parent.mkdir()
    with quietly():
        _WRITERS["fp32"](model, source)
        for form in sorted(forms - {"fp32"}):
            target = folder / FORMS[form]
            target.parent.mkdir(exist_ok=True)
            _WRITERS[form](source, target)
    if "fp32" not in forms:
        source.unlink()
        with contextlib.suppress(OSError):  # other forms are there
            source.parent.rmdir()


def require_packages() -> None:
    """Refuse where what makes graphs is missing.

    Raises:
        ImportError: a package, or a version of one.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if not hasattr(torch.onnx, "ops"):
        missing.append("torch 2.8 or newer")
    if importlib.util.find_spec("transformers.exporters.onnxruntime_fusions") is None:
        missing.append("transformers 5.23 or newer")
    if missing:
        raise ImportError(
            f"export to ONNX needs {', '.join(missing)}; in a clone of the project, pip install --upgrade '.[export]'"
        )


def stock_config(model: PreTrainedModel) -> Any:
    """The config of the dense model with these outputs, with its class as architecture."""
    factored = type(model) in DENSE_CLASSES
    config = model.config.to_dense_config() if factored else copy.deepcopy(model.config)
    for name in ("auto_map", "custom_pipelines"):  # code that was not used here
        vars(config).pop(name, None)
    config.architectures = [(DENSE_CLASSES[type(model)] if factored else type(model)).__name__]
    return config


@torch.no_grad()
def _write_fp32(model: PreTrainedModel, path: Path) -> None:
    import onnx_ir as ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    from .graph import for_cpu, name_inputs

    plain = as_products(model)
    plain.set_attn_implementation(ATTENTION)
    example = _example(plain)
    settings = OnnxConfig(dynamic=True, ort_fusions="cpu", opset_version=OPSET)
    program: Any = OnnxExporter().export(plain, example, settings).program
    for_cpu(program)
    name_inputs(program.graph)
    ir.save(program, str(path))


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs for the exporter, in which no two sizes that may vary are the same, and none is 1."""
    past, length = (5, 3) if has_past(model) else (0, 7)
    shape = (2, 3, length) if has_choices(model) else (2, length)
    ids = torch.ones(shape, dtype=torch.long)
    example: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones(*shape[:-1], past + length, dtype=torch.long),
    }
    if getattr(model.config, "type_vocab_size", 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    if family_of(model).causal:
        example["use_cache"] = bool(past)
    if past:
        example["position_ids"] = torch.arange(past, past + length).expand(shape)
        example["past_key_values"] = cache = DynamicCache(config=model.config)
        model(input_ids=torch.ones(2, past, dtype=torch.long), past_key_values=cache, use_cache=True)
    return example


def _write_int8(source: Path, target: Path) -> None:
    import onnx
    import onnx_ir as ir

    ir.save(to_int8(onnx.load(source)), str(target))


def to_int8(proto: Any) -> Any:
    """An `onnx_ir.Model` with products and tables in 8 bits, from an `onnx.ModelProto` in fp32."""
    import onnx_ir as ir

    from .graph import rest_to_int8

    model = ir.from_proto(_products_to_int8(proto, _products(proto)))
    rest_to_int8(model, SMALLEST)
    return model


def _write_int4(source: Path, target: Path) -> None:
    import onnx
    import onnx_ir as ir
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    from .graph import rest_to_int8

    proto = onnx.load(source)
    products = _products(proto)
    tables = {node.input[0] for node in proto.graph.node if node.op_type == "Gather"}
    shared = {name: weight for name, weight in products.items() if weight in tables}  # in 8 bits they are stored once
    settings = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=4, quant_format=QuantFormat.QOperator,
        op_types_to_quantize=("MatMul", "Gather"),
    )  # fmt: skip
    kept = {*shared.values(), *(t.name for t in proto.graph.initializer if t.data_type != onnx.TensorProto.FLOAT)}
    left = [
        node.name
        for node in proto.graph.node
        if (node.op_type == "MatMul" and node.name not in products) or not kept.isdisjoint(node.input[:1])
    ]
    quantizer = MatMulNBitsQuantizer(proto, algo_config=settings, nodes_to_exclude=[*left, *shared])
    quantizer.process()
    model = ir.from_proto(_products_to_int8(quantizer.model.model, shared))
    rest_to_int8(model, SMALLEST)
    ir.save(model, str(target))


def _write_fp16(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True), target)


_WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "fp32": _write_fp32, "int8": _write_int8, "int4": _write_int4, "fp16": _write_fp16,
    "openvino": write_openvino, "openvino_int8": write_openvino_int8,
}  # fmt: skip


def _products(proto: Any) -> dict[str, str]:
    """The constant weights of products that are worth quantizing, by the names of their nodes."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in proto.graph.initializer}
    found = {node.name: node.input[1] for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")}
    return {node: weight for node, weight in found.items() if sizes.get(weight, 0) >= SMALLEST}


def _products_to_int8(proto: Any, products: Iterable[str]) -> Any:
    """A graph with dynamic quantization of these products."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not (chosen := list(products)):  # of an empty list the quantizer makes all there is
        return proto
    del proto.graph.value_info[:]  # of shapes that ONNX cannot infer anew
    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(
            proto, path := Path(folder) / "model.onnx", per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8, nodes_to_quantize=chosen, op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )  # fmt: skip
        return onnx.load(path)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what exporter and quantizer say of versions, of each other and of their progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention of ONNX as one operator; query, key and value (batch, heads, length, size)."""
    heads = query.shape[1]
    q, k, v = (states.transpose(1, 2).flatten(2) for states in (query, key, value))
    y, *_ = torch.onnx.ops.attention(
        q, k, v, attention_mask, q_num_heads=heads, kv_num_heads=heads, scale=float(scaling)
    )
    return y.unflatten(-1, (heads, -1)), None


ATTENTION = "kronecker_onnx"
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
