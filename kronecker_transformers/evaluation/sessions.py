"""Models in ONNX Runtime or OpenVINO: exported, and timed in turn."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.load import load_model
from ..export.onnx import export_graphs
from ..export.parity import FORMS, graph_bytes, run
from ..export.runtimes import OPENVINO_TYPES, is_for_openvino, open_session
from .cost import describe
from .timing import (
    Comparison,
    Measurement,
    check_length,
    check_sizes,
    environment,
    in_turn,
    machine_rates,
    median_and_spread,
    memory_of,
    name_of,
    peak_memory,
)

ENGINES = {"onnxruntime": ("fp32", "int8"), "openvino": ("openvino", "openvino_int8")}
"""The forms of graphs that a runtime runs: in fp32 and in 8 bits."""
PRODUCTS = ("MatMul", "Gemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits")
"""Operators of linear layers; a `MatMul` of two activations, as in attention by hand, is counted among them."""


def benchmark_sessions(
    model: str | os.PathLike[str] | PreTrainedModel,
    against: str | os.PathLike[str] | PreTrainedModel,
    *,
    batch: int = 1,
    length: int = 128,
    engine: str = "onnxruntime",
    int8: bool = False,
    dtype: str = "float32",
    rounds: int = 15,
) -> Comparison:
    """As `timing.benchmark`, with both models exported by `export_graphs` and run by ONNX Runtime or OpenVINO.

    Bytes are those of the graphs, and memory is that of a process which opens one and runs it. The limit is what is
    left of the time without that of the products of linear layers.

    Args:
        model: name on the Hub, folder, or loaded model, factored or dense.
        against: the same.
        batch: sequences.
        length: tokens of each.
        engine: onnxruntime or openvino, on the CPU.
        int8: in 8 bits, both; in OpenVINO their weights alone.
        dtype: in which OpenVINO computes what is not quantized: float32 or bfloat16.
        rounds: in which both take turns, after two to warm up.

    Raises:
        ImportError, ValueError, OSError: as `export_onnx` and `timing.benchmark`; or an engine or a dtype that is not
            among these.
    """
    check_sizes(batch, length, rounds)
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not known; choose from {', '.join(ENGINES)}")
    if dtype not in (known := tuple(OPENVINO_TYPES) if engine == "openvino" else ("float32",)):
        raise ValueError(f"dtype={dtype!r} is not for {engine} on a CPU; choose from {', '.join(known)}")
    form = ENGINES[engine][int8]
    sources = {"model": model, "against": against}
    loaded: dict[str, Any] = {k: s if isinstance(s, PreTrainedModel) else load_model(s)[0] for k, s in sources.items()}
    for key, side in loaded.items():
        check_length(side, length, sources[key])
    words = {key: side.config.vocab_size for key, side in loaded.items()}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {}
        for key, side in loaded.items():
            export_graphs(side, None, Path(scratch) / key, [form])
            paths[key] = Path(scratch) / key / FORMS[form]
        sessions = {key: open_session(path, dtype=dtype) for key, path in paths.items()}
        passes = {key: session_pass(session, batch, length, words=words[key]) for key, session in sessions.items()}
        seconds = in_turn(passes, rounds)
        measurements: dict[str, Any] = {}
        for key, path in paths.items():
            cost, (middle, spread) = describe(loaded[key], length).factored, median_and_spread(seconds[key])
            measurements[key] = Measurement(
                name=name_of(sources[key]), parameters=cost.parameters, bytes=graph_bytes(path),
                flops=batch * cost.total_flops, milliseconds=middle, spread=spread,
                limit_milliseconds=middle * (1 - share_of_products(path, batch, length, words=words[key], dtype=dtype)),
                peak_bytes=session_memory(path, batch, length, words[key], dtype),
            )  # fmt: skip
    precision = dtype if not int8 else "int8" if dtype == "float32" else f"int8, {dtype}"
    rates, machine = machine_rates(torch.float32), f"{environment()}, {engine} {version(engine)}"
    return Comparison(
        **measurements, batch=batch, length=length, dtype=precision, device="cpu", compiled=False,
        gemm_rate=rates[0], copy_rate=rates[1], environment=machine, runtime=engine,
    )  # fmt: skip


def session_pass(session: Any, batch: int, length: int, past: int = 0, words: int = 100) -> Callable[[], Any]:
    """A function that runs a graph on random tokens.

    Args:
        session: of a graph for inputs (batch, length), or (batch, choices, length).
        batch: sequences.
        length: tokens of each.
        past: tokens whose keys and values are there already, for a graph with a past.
        words: tokens are drawn from the first of the vocabulary, this many.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    shape = (batch, 1, length) if len(inputs["input_ids"].shape) == 3 else (batch, length)
    ids = torch.randint(words, shape, generator=torch.Generator().manual_seed(0))
    sample: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones(*shape[:-1], past + length, dtype=torch.long),
    }
    for name, value in inputs.items():
        if name.startswith("past_key_values.") and past:
            sample[name] = torch.zeros(batch, value.shape[1], past, value.shape[3])
    return partial(run, session, sample, with_past=True)


def share_of_products(
    path: str | os.PathLike[str],
    batch: int,
    length: int,
    threads: int | None = None,
    words: int = 100,
    also: Sequence[str] = (),
    dtype: str = "float32",
) -> float:
    """The share of the time of all nodes that the products of linear layers take, by the runtime's own profile.

    Args:
        path: of a graph.
        batch, length, words: as for `session_pass`.
        threads: as for `open_session`.
        also: further operators that count as products, in ONNX Runtime.
        dtype: as for `open_session`.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, profile=str(Path(folder) / "profile"), dtype=dtype)
        forward = session_pass(session, batch, length, words=words)
        for _ in range(6):
            forward()
        if is_for_openvino(path):
            share: float = session.share_of_products()
            return share
        events = json.loads(Path(session.end_profiling()).read_text())
    begin = [event["ts"] for event in events if event["name"] == "model_run"][1]  # the first run is for warming up
    spent = [
        (event["args"]["op_name"], event["dur"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begin
    ]
    return sum(time for kind, time in spent if kind in (*PRODUCTS, *also)) / sum(time for _, time in spent)


def session_memory(
    path: str | os.PathLike[str], batch: int, length: int, words: int = 100, dtype: str = "float32"
) -> int | None:
    """Peak memory, in bytes, of a process of its own that opens a graph and runs it once; what its imports hold aside.

    None where the system does not tell.

    Raises:
        OSError: the process failed.
    """
    return memory_of(_print_memory, path, batch, length, words, dtype)


def _print_memory(path: str, batch: int, length: int, words: int, dtype: str) -> None:
    importlib.import_module("openvino" if is_for_openvino(path) else "onnxruntime")  # before the memory is counted
    with peak_memory() as extra:
        session_pass(open_session(path, dtype=dtype), batch, length, words=words)()
    print(extra())
