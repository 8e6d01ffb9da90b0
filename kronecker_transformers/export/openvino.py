"""A graph for ONNX Runtime, converted for OpenVINO; its weights in 8 bits by NNCF."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any


def require_openvino(int8: bool = False) -> None:
    """Refuse where what converts graphs is missing.

    Raises:
        ImportError: a package.
    """
    needed = ("openvino", "nncf") if int8 else ("openvino",)
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"OpenVINO needs {', '.join(missing)}; in a clone of the project, pip install --upgrade '.[openvino]'"
        )


def write_openvino(source: Path, target: Path) -> None:
    """Convert a graph in fp32.

    Args:
        source: of a graph for ONNX Runtime.
        target: the .xml file; the weights go beside it, as .bin.
    """
    import openvino

    openvino.save_model(_converted(source), target, compress_to_fp16=False)


def write_openvino_int8(source: Path, target: Path) -> None:
    """Convert a graph with weights and tables of 8 bits, a scale for each output or row; products stay in fp32."""
    import nncf
    import openvino

    before = nncf.common.logging.logger.nncf_logger.level
    nncf.set_log_level(logging.ERROR)
    try:
        model = nncf.compress_weights(_converted(source), mode=nncf.CompressWeightsMode.INT8_SYM)
    finally:
        nncf.set_log_level(before)
    openvino.save_model(model, target, compress_to_fp16=False)


def _converted(source: Path) -> Any:
    import openvino

    return openvino.convert_model(source)
