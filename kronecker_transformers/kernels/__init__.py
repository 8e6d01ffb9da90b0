"""Kernels for a GPU; where none is registered, as for checkpoints that open without this package, PyTorch computes."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ..models.kronecker_layers import register_kernel


def register() -> None:
    """Let factored layers on a GPU use Triton's kernels, for the sums of products that these are made for.

    Not called on import: the kernels are tested in Triton's interpreter and compile, but have not been timed on a GPU.

    Raises:
        RuntimeError: no GPU, or no Triton.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("Triton's kernels need a GPU that torch.cuda can use, and there is none; do without them")
    if not find_spec("triton"):
        raise RuntimeError("Triton is not installed; pip install triton, in the version that suits your torch")
    from .triton_linear import kronecker_linear

    register_kernel("cuda", kronecker_linear)
