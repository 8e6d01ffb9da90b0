"""An encoder on a CPU computes a large batch some sequences at a time, so that its activations stay in the cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from transformers import PreTrainedModel

from .kronecker_internals import is_watched

BLOCK = 512 * 768
"""Entries of the hidden states that go through an encoder at a time: 512 tokens of BERT-base (benchmarks/blocks.py)."""


def in_blocks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward method of an encoder's stock class, in blocks where that is faster: on a CPU without gradients.

    The batch stays whole for a compiled model, for a decoder or whatever else has a cache, for forward hooks, and for
    masks that are no tensors.
    """
    arguments = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def blockwise(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(arguments, args, strict=False))
        if len(named) < len(args) or named.keys() & kwargs.keys():
            return forward(self, *args, **kwargs)  # which refuses them
        return _in_blocks(self, forward, named | kwargs)

    return blockwise


def _in_blocks(model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    source = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or not isinstance(source, torch.Tensor)
        or source.device.type != "cpu"
        or source.ndim < 2
        or source.shape[0] * source.shape[1] * model.config.hidden_size <= BLOCK
        or getattr(model.config, "is_decoder", False)
        or inputs.get("past_key_values") is not None
        or not isinstance(inputs.get("attention_mask"), (torch.Tensor, NoneType))
        or is_watched(model)
    ):
        return forward(model, **inputs)
    batch = source.shape[0]
    rows = max(1, BLOCK // (source.shape[1] * model.config.hidden_size))
    parts = {
        name: value.split(rows)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch
    }
    blocks = [dict(zip(parts, block, strict=True)) for block in zip(*parts.values(), strict=True)]
    return _joined([forward(model, **{**inputs, **block}) for block in blocks])


def _joined(outputs: list[Any]) -> Any:
    """Outputs of blocks as one: tensors are joined along the batch, in tuples and model outputs too."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, tuple):
        return tuple(map(_joined, map(list, zip(*outputs, strict=True))))
    return first
