"""What holds only while a model is trained: its settings, and how PyTorch computes attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .arguments import DistillationArguments

_SHORT = 128
"""Tokens; with twice as many the plain form gains little, and keeps large matrices (benchmarks/attention.py)."""


@contextmanager
def unchanged_cache(config: Any) -> Iterator[None]:
    """Take back what a trainer of transformers writes into a config: that the model uses no cache for generation."""
    before = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if before is None:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = before


@contextmanager
def unchanged_forward(model: nn.Module) -> Iterator[None]:
    """Take back the autocast that a training in half precision leaves on its model, which is judged in full.

    Accelerate's own way back, `unwrap_model`, takes the decorators of the forward pass away too.
    """
    names = "forward", "_original_forward", "_is_accelerate_prepared"
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """PyTorch's attention as two products and a softmax, in the precision of its inputs."""
    backends = torch.backends.cuda  # the setting counts on CPUs too
    reduced = backends.fp16_bf16_reduction_math_sdp_allowed()
    backends.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        backends.allow_fp16_bf16_reduction_math_sdp(reduced)


def training_attention(arguments: DistillationArguments, length: int) -> AbstractContextManager[None]:
    """For short sequences in bf16 on a CPU the plain form: flash attention has a slow backward pass there."""
    if arguments.bf16 and arguments.device.type == "cpu" and length <= _SHORT:
        return plain_attention()
    return nullcontext()
