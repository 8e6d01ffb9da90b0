"""Other ways to run the graphs of `device.py`: OpenVINO, and static quantization in ONNX Runtime.

    python benchmarks/runtimes.py --work /tmp/device | tee benchmarks/logs/runtimes.txt

Encoders of BERT-base's and MiniLM's size with random weights. All take turns in one process, one thread; median of the
rounds in milliseconds. OpenVINO: fp32, bf16, and weights of 8 bits by NNCF, beside the dense model in int8 in ONNX
Runtime, to which the ratios are. Static: products of 8 bits with ranges that are known before, in both forms that ONNX
Runtime's quantizer writes, beside dynamic quantization and fp32.
"""

from __future__ import annotations

import argparse
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from device import SHAPES, SIZES, exported, instructions
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from transformers import BertConfig, BertModel

from kronecker_transformers.evaluation.sessions import session_pass
from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread
from kronecker_transformers.export.openvino import write_openvino, write_openvino_int8
from kronecker_transformers.export.parity import FORMS, graph_bytes
from kronecker_transformers.export.runtimes import open_session

REFERENCE = "dense, int8, ONNX Runtime"
HEADINGS = "".join(f"{f'{batch}x{length}':>10s}" for batch, length in SHAPES)


def timed(sessions: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of each at every shape, all in turn."""
    times: dict[str, list[float]] = {side: [] for side in sessions}
    for batch, length in SHAPES:
        passes = {side: session_pass(session, batch, length) for side, session in sessions.items()}
        for side, found in in_turn(passes, {16: 41, 128: 21}[length] if batch == 1 else 9).items():
            times[side].append(median_and_spread(found)[0])
    return times


def openvino(name: str, folders: dict[str, Path]) -> None:
    """Every model in OpenVINO."""
    paths = {REFERENCE: folders["dense"] / FORMS["int8"]}
    sessions = {REFERENCE: open_session(paths[REFERENCE], 1)}
    for plan, folder in folders.items():
        for form, write in (("openvino", write_openvino), ("openvino_int8", write_openvino_int8)):
            path = folder / FORMS[form]
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                with redirect_stdout(StringIO()):  # the progress of NNCF
                    write(folder / FORMS["fp32"], path)
            for dtype in ("float32", "bfloat16") if form == "openvino" else ("float32",):
                side = f"{plan}, {'int8' if form == 'openvino_int8' else dtype}"
                paths[side], sessions[side] = path, open_session(path, 1, dtype=dtype)
    times = timed(sessions)
    headings = "".join(f"{f'{batch}x{length}':>10s}{'ratio':>7s}" for batch, length in SHAPES)
    print(f"\n{name + ', OpenVINO ' + version('openvino'):34s}{'MB':>7s}{headings}")
    for side, found in times.items():
        cells = [f"{time:10.2f}{first / time:6.2f}x" for time, first in zip(found, times[REFERENCE], strict=True)]
        print(f"{side:34s}{graph_bytes(paths[side]) / 1e6:7.1f}{''.join(cells)}", flush=True)


class Tokens(CalibrationDataReader):
    """Random tokens, for ranges that are as good as any where weights are random."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        ids = generator.integers(0, 100, (4, 2, 64))
        self._batches = iter(
            {"input_ids": i, "attention_mask": np.ones_like(i), "token_type_ids": np.zeros_like(i)} for i in ids
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        return next(self._batches, None)


def write_static(source: Path, target: Path, form: QuantFormat) -> None:
    """The graph in fp32 with static quantization of its products."""
    proto = onnx.load(source)
    del proto.graph.value_info[:]
    weights = {tensor.name for tensor in proto.graph.initializer}
    products = [node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    quantize_static(
        proto, target, Tokens(), form, per_channel=True, nodes_to_quantize=products, op_types_to_quantize=["MatMul"],
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )  # fmt: skip


def static(name: str, folders: dict[str, Path]) -> None:
    """The dense model and low rank, in each form."""
    paths: dict[str, Path] = {}
    for plan in ("dense", "low rank 7.7x"):
        paths |= {f"{plan}, {form}": folders[plan] / FORMS[form] for form in ("fp32", "int8")}
        for label, form in (("QOperator", QuantFormat.QOperator), ("QDQ", QuantFormat.QDQ)):
            paths[f"{plan}, static, {label}"] = path = folders[plan] / f"static-{label}.onnx"
            if not path.exists():
                write_static(folders[plan] / FORMS["fp32"], path, form)
    print(f"\n{name + ', static and dynamic':34s}{HEADINGS}")
    for side, found in timed({side: open_session(path, 1) for side, path in paths.items()}).items():
        print(f"{side:34s}{''.join(f'{time:10.2f}' for time in found)}", flush=True)


def main() -> None:
    """Both, for both sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the graphs, which are made once")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    print(f"{environment()}, onnxruntime {onnxruntime.__version__}; {instructions()}")
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        settings: dict[str, Any] = sizes
        folders = exported(name, BertModel(BertConfig(**settings)).eval(), options.work)
        static(name, folders)
        openvino(name, folders)


if __name__ == "__main__":
    main()
