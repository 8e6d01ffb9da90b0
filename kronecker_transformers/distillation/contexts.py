"""What holds only while a model is trained: its settings, and how PyTorch computes attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def is_bf16_on_cpu(accelerator: Accelerator) -> bool:
    """Whether this is a training in bfloat16 on a CPU."""
    return accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu"


def training_attention(accelerator: Accelerator, length: int) -> AbstractContextManager[None]:
    """For short sequences in bf16 on a CPU the plain form: flash attention has a slow backward pass there."""
    return plain_attention() if is_bf16_on_cpu(accelerator) and length <= _SHORT else nullcontext()
