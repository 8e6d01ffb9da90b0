"""A factored model, or a dense one, as graphs for ONNX Runtime, in a folder that others read as it is.

onnx/model.onnx             fp32
onnx/model_quantized.onnx   int8: products with dynamic quantization, a scale for each output; tables by rows
onnx/model_q4.onnx          int4: weights in blocks of 32, a scale for each
onnx/model_fp16.onnx        fp16, for a GPU or WebGPU
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from ..checkpoint.sentence_modules import modules_of
from ..checkpoint.teachers import check_finite
from ..models import DENSE_CLASSES
from ..models.kronecker_family import family_of, has_choices, heads_of, longest_sequence
from .products import as_products

FORMS = {
    "fp32": "onnx/model.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
    "fp16": "onnx/model_fp16.onnx",
}
"""Names in the folder, as transformers.js and others look for them."""
OPSET = 23
"""Of the graph: the first one with attention as an operator of its own; ONNX Runtime 1.23 or newer runs it."""
TOLERANCES = {"fp32": 1e-4, "int8": 0.3, "int4": 0.5, "fp16": 0.02}
"""Of the outputs: in fp32 the largest difference from PyTorch's, relative to the largest output; in others the norm of
the differences, relative to that of the outputs. More means that something is wrong, not rounded."""
BLOCK = 32
"""Entries of a weight of 4 bits that share a scale."""
SMALLEST = 4096
"""Entries of a weight or table that is worth quantizing."""
SENTENCES = (
    "A man is playing a guitar on the street, and nobody listens.",
    "The quarterly report shows that sales in Europe fell by three per cent while costs rose.",
    "Is it going to rain tomorrow?",
    "She had been reading for hours when the lights went out; the book lay open on her knees until the morning came.",
)
"""What graphs are compared on where no text is given."""


@dataclass(frozen=True)
class ExportedFile:
    """A graph that was written, and how near it comes."""

    name: str
    size: int
    """Bytes."""
    difference: float
    """Largest difference of an output from PyTorch's, relative to the largest output."""
    relative_error: float
    """Norm of the differences of all outputs, relative to the norm of the outputs."""


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
        ValueError: an unknown form, no texts, a model of no supported class, weights that are not finite, or a graph
            whose outputs differ from the model's.
        OSError: the folder cannot be written; as with every other error, nothing is left behind.
    """
    _require_packages()
    also = tuple(also)
    if unknown := [form for form in also if form not in FORMS]:
        raise ValueError(f"also={unknown[0]!r} is no form of a graph; choose from {', '.join(FORMS)}")
    if not texts:
        raise ValueError("texts=[] leave nothing to compare the graphs with PyTorch on; give some sentences")
    heads_of(model)  # refuses other classes
    check_finite(model)
    check_new_folder(folder)
    model = copy.deepcopy(model).cpu().float().eval()
    forms = dict.fromkeys(("fp32", *also))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        (made / "onnx").mkdir()
        with _quietly():
            for form in forms:
                source = model if form == "fp32" else made / FORMS["fp32"]
                _WRITERS[form](source, made / FORMS[form])
        batches = _batches(model, tokenizer, texts)
        found = [_checked(model, made, form, batches) for form in forms]
        stock_config(model).save_pretrained(made)
        if model.can_generate():
            model.generation_config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        if modules := modules_of(model):
            modules.write(made)
        with new_folder(folder) as draft:
            shutil.copytree(made, draft, dirs_exist_ok=True)
    return found


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if not hasattr(torch.onnx, "ops"):
        missing.append("torch 2.8 or newer")
    if importlib.util.find_spec("transformers.exporters.onnxruntime_fusions") is None:
        missing.append("transformers 5.23 or newer")
    if missing:
        raise ImportError(
            f"export to ONNX needs {', '.join(missing)}; pip install --upgrade 'kronecker-transformers[export]'"
        )


def stock_config(model: PreTrainedModel) -> Any:
    """The config of the dense model with these outputs, with its class as architecture."""
    factored = type(model) in DENSE_CLASSES
    config = model.config.to_dense_config() if factored else copy.deepcopy(model.config)
    config.architectures = [(DENSE_CLASSES[type(model)] if factored else type(model)).__name__]
    return config


def _has_past(model: PreTrainedModel) -> bool:
    """Whether its graph takes and gives keys and values."""
    return any(head.kind == "next_token" for head in heads_of(model))


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
    past, length = (5, 3) if _has_past(model) else (0, 7)
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

    from .graph import rest_to_int8

    proto = onnx.load(source)
    model = ir.from_proto(_products_to_int8(proto, _products(proto)))
    rest_to_int8(model, SMALLEST)
    ir.save(model, str(target))


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
    left = [
        node.name
        for node in proto.graph.node
        if (node.op_type == "MatMul" and node.name not in products) or node.input[:1] in [[w] for w in shared.values()]
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
def _quietly() -> Iterator[None]:
    """Without what exporter and quantizer say of versions, of each other and of their progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


# ---- comparison ----


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]
) -> list[dict[str, Tensor]]:
    """One batch of all texts, and the first text alone; padded on the right."""
    longest = longest_sequence(model)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        lengths = [min(longest, 5 + 6 * i) for i in range(len(texts))]
        rows = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    else:
        rows = [tokenizer(text, truncation=True, max_length=longest).input_ids for text in texts]
    batches = []
    for part in (rows, rows[:1]):
        ids, mask = torch.zeros(2, len(part), max(map(len, part)), dtype=torch.long)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ids[mask == 0] = model.config.pad_token_id or 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if has_choices(model):
            batch = {name: value.unsqueeze(1) for name, value in batch.items()}
        batches.append(batch)
    return batches


@torch.no_grad()
def _checked(model: PreTrainedModel, folder: Path, form: str, batches: Sequence[Mapping[str, Tensor]]) -> ExportedFile:
    """Compare a graph with the model.

    Raises:
        ValueError: it gives other outputs.
    """
    from onnxruntime import InferenceSession

    name = FORMS[form]
    session = InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    largest = difference = squares = total = 0.0
    for batch in batches:
        expected, found = model(**batch), run(session, batch)
        if _has_past(model):
            found["logits"] = _token_by_token(session, batch, found["logits"])
        real = batch["attention_mask"].bool().numpy()
        for key, output in found.items():
            wanted = expected[key].double().numpy()
            if wanted.shape[: real.ndim] == real.shape:
                wanted, output = wanted[real], output[real]
            gaps = np.abs(wanted - output)
            largest, difference = max(largest, float(np.abs(wanted).max())), max(difference, float(gaps.max()))
            squares, total = squares + float((gaps**2).sum()), total + float((wanted**2).sum())
    file = ExportedFile(name, (folder / name).stat().st_size, difference / largest, math.sqrt(squares / total))
    measured, limit = file.difference if form == "fp32" else file.relative_error, TOLERANCES[form]
    if not measured <= limit:
        raise ValueError(
            f"outputs of {name} differ from PyTorch's by {measured:.2g} of their size, more than {limit:g}; report "
            "this, with the model's config.json"
        )
    return file


def run(session: Any, batch: Mapping[str, Any], with_past: bool = False) -> dict[str, np.ndarray]:
    """What a session of ONNX Runtime gives for token ids and a mask, its outputs by name.

    What else its graph takes is added: segments 0, and with an empty past the positions from 0 on.

    Args:
        session: of a graph that `export_onnx` has written.
        batch: tensors or arrays by name; "present.0.key" and so on of an earlier result are its past.
        with_past: return keys and values too.
    """
    feed = {name.replace("present.", "past_key_values."): np.asarray(value) for name, value in batch.items()}
    ids = feed["input_ids"]
    for value in session.get_inputs():
        if value.name in feed:
            continue
        if value.name == "token_type_ids":
            feed[value.name] = np.zeros_like(ids)
        elif value.name == "position_ids":
            start = feed["attention_mask"].shape[-1] - ids.shape[-1]
            feed[value.name] = np.broadcast_to(np.arange(start, start + ids.shape[-1]), ids.shape)
        else:
            feed[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    names = [value.name for value in session.get_outputs() if with_past or not value.name.startswith("present.")]
    return dict(zip(names, session.run(names, feed), strict=True))


def _token_by_token(session: Any, batch: Mapping[str, Tensor], logits: np.ndarray) -> np.ndarray:
    """The logits of a batch again, the second half of its tokens read one by one after the first half."""
    logits, ids, mask = logits.copy(), batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    start, past = 0, dict[str, np.ndarray]()
    for end in range(max(1, ids.shape[1] // 2), ids.shape[1] + 1):
        step = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **past}
        past = run(session, step, with_past=True)
        logits[:, start:end] = past.pop("logits")
        start = end
    return logits


# ---- attention ----


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
