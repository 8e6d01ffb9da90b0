"""Graphs, opened in the runtime that is for them: ONNX Runtime, or OpenVINO for the files that end in .xml."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}
"""In which OpenVINO computes what is not quantized."""


def is_for_openvino(path: str | os.PathLike[str] | bytes) -> bool:
    """Whether a graph is one for OpenVINO."""
    return not isinstance(path, bytes) and os.fspath(path).endswith(".xml")


def open_session(
    path: str | os.PathLike[str] | bytes, threads: int | None = None, profile: str = "", dtype: str = "float32"
) -> Any:
    """A session on the CPU, whose idle threads do not take time from those of other sessions.

    Args:
        path: of a graph, or the bytes of one for ONNX Runtime.
        threads: default: those of PyTorch.
        profile: for ONNX Runtime, prefix of the file for a profile; for OpenVINO any word. Without, nothing is counted.
        dtype: for OpenVINO, one of `OPENVINO_TYPES`.

    Returns:
        A session of ONNX Runtime, or what behaves as one.
    """
    threads = threads or torch.get_num_threads()
    if is_for_openvino(path):
        return OpenVINOSession(str(path), threads, dtype, bool(profile))
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Port:
    """An input or output."""

    name: str
    shape: tuple[int | None, ...]
    """None for a size that varies."""


class OpenVINOSession:
    """A graph in OpenVINO, with the methods of a session of ONNX Runtime that this package calls.

    Args:
        path: of its .xml file.
        threads: that compute.
        dtype: one of `OPENVINO_TYPES`.
        profile: measure every node, for `share_of_products`.
    """

    def __init__(self, path: str, threads: int, dtype: str = "float32", profile: bool = False) -> None:
        import openvino

        options = {
            "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": OPENVINO_TYPES[dtype], "PERF_COUNT": profile
        }  # fmt: skip
        self.model = openvino.Core().compile_model(path, "CPU", options)
        self._request = self.model.create_infer_request()

    def get_inputs(self) -> list[Port]:
        """Names and shapes."""
        return [_port(port) for port in self.model.inputs]

    def get_outputs(self) -> list[Port]:
        """Names and shapes."""
        return [_port(port) for port in self.model.outputs]

    def run(self, names: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs with these names for inputs by their names."""
        self._request.infer(dict(feed), share_inputs=True)
        return [self._request.get_tensor(name).data.copy() for name in names]

    def share_of_products(self) -> float:
        """The share of the time of all nodes of the last run that the products of linear layers took."""
        spent = [(info.node_type, info.real_time.total_seconds()) for info in self._request.profiling_info]
        return sum(time for kind, time in spent if kind == "FullyConnected") / sum(time for _, time in spent)


def _port(port: Any) -> Port:
    sizes = port.get_partial_shape()
    return Port(port.get_any_name(), tuple(None if size.is_dynamic else size.get_length() for size in sizes))
