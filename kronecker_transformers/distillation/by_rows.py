"""Losses with one value for each row of a tensor, computed some rows at a time, together with their gradients.

Autograd would keep several float32 copies of what such a loss goes through. Over a vocabulary, or over all pairs of
tokens, these are most of the memory of a step, and much of its time where they are larger than a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ENTRIES = {"cpu": 2**18, "cuda": 2**26}
"""That are worked on at a time: as many as a cache holds, or as many as leave a GPU no gaps."""


def by_rows(function: Callable[..., tuple[Tensor, Tensor]], student: Tensor, *others: Tensor) -> Tensor:
    """A loss of each row, with a gradient for the student.

    Args:
        function: of some rows of all tensors; gives the values of these rows, (rows,), and their slopes, the derivative
            of each by the row of the student, shaped like it.
        student: (rows, ...).
        others: (rows, ...) each; they get no gradient.

    Returns:
        (rows,), in float32 or wider.
    """
    values: Tensor = _ByRows.apply(function, student, *others)
    return values


class _ByRows(torch.autograd.Function):
    """Keeps nothing but the slopes: in the dtype of the student, but float16, in which small ones would become 0.

    They come before the scale of the loss, which is there to prevent that.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, Tensor]], student: Tensor, *others: Tensor) -> Tensor:
        entries = ENTRIES.get(student.device.type, ENTRIES["cuda"])
        rows = max(1, entries // max(1, student.shape[1:].numel()))
        values = student.new_empty(len(student), dtype=torch.promote_types(student.dtype, torch.float32))
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        slopes = torch.empty_like(student, dtype=kept) if ctx.needs_input_grad[1] else None
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            values[part], found = function(*(tensor[part] for tensor in (student, *others)))
            if slopes is not None:
                slopes[part] = found
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.dtype = student.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        shaped = gradient.to(slopes.dtype).reshape(-1, *[1] * (slopes.ndim - 1))
        return None, (slopes * shaped).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 2)
