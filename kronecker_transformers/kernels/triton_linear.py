"""Sums of Kronecker products on a GPU, in Triton: a GEMM of the large factor with the small one mixed in registers.

    y[t, q, p] = sum over s, r, k of S[q, r, s] L[p, r, k] x[t, s, k]  (+ bias[q, p])

L (P, R, K) is the larger factor and S (Q, R, S) the smaller one; which of them is A and which B only changes strides.
Where the input has fewer small indices than the output, the small factor is mixed into the accumulator of the GEMM
(`mix_after`), else into one of its operands (`mix_before`). The gradient of the input is the same product with both
factors transposed. That of the large factor is a GEMM over tokens with one operand mixed likewise (`large_gradient`);
that of the small factor reduces the accumulator of `mix_after` against the other side. Nothing but the inputs is kept
for the backward pass, and neither a mixed activation nor anything of the size of W is ever in memory.

Accumulation is in float32, and float32 is multiplied in full unless PyTorch may use TF32. Sums have the order of the
tiles, which are tuned once in each process for every size: results repeat within a process.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .triton_kernels import large_gradient, mix_after, mix_before

FEWEST = 16
"""Terms times the small indices of the input or of the output, whichever are fewer, at most."""
MOST = 32
"""Small indices of the input and of the output at most."""
LEAST = 16
"""Large indices of the input and of the output at least; with fewer there is no work for tensor cores."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 256  # that the gradient of the large factor is split into, over tokens


def _tuned(kernel: Any) -> Any:
    """The kernel with the best of some tiles; where it is interpreted, with one that is small."""
    tiles = [(64, 64, 32, 4), (128, 64, 32, 4), (128, 128, 32, 8), (64, 128, 64, 4), (32, 64, 32, 4)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        tiles = [(32, 32, 32, 4)]
    configurations = [
        triton.Config({"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}, num_warps=warps, num_stages=3)
        for rows, columns, depth, warps in tiles
    ]
    return triton.autotune(configurations, key=["SIZE", "P", "K", "NS", "NQ", "NR", "PRECISION"])(kernel)


_mix_after_tuned, _mix_before_tuned, _large_gradient_tuned = map(_tuned, (mix_after, mix_before, large_gradient))
_REDUCING = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 3}
"""Tile where parts of a gradient have their places by the tile, so that it is not tuned."""


def _tf32() -> bool:
    """Whether PyTorch may use it for products of float32."""
    settings: Any = torch.backends.cuda.matmul  # the older setting is an error where only the newer one was changed
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


class _Form(NamedTuple):
    """A product in the terms of the kernels; the strides of activations are in entries, their tokens contiguous."""

    P: int
    R: int
    K: int
    Q: int
    S: int
    L: tuple[int, int, int]
    """Strides of L over p, r, k."""
    small: tuple[int, int, int]
    """Strides of S over q, r, s."""
    x: tuple[int, int, int]
    """Strides of x over t, s, k."""
    y: tuple[int, int, int]
    """Strides of y over t, q, p."""

    @property
    def transposed(self) -> _Form:
        """That of the gradient of the input."""
        return _Form(self.K, self.R, self.P, self.S, self.Q, self.L[::-1], self.small[::-1], self.y, self.x)

    @property
    def mixes_after(self) -> bool:
        """Whether that is the cheaper order."""
        return self.S <= self.Q

    def strides(self) -> dict[str, int]:
        """Those of the product, by their names in the kernels."""
        names = ("x_t", "x_s", "x_k", "l_p", "l_r", "l_k", "s_q", "s_r", "s_s", "y_t", "y_q", "y_p")
        return dict(zip(names, (*self.x, *self.L, *self.small, *self.y), strict=True))

    def sizes(self, x: Tensor) -> dict[str, Any]:
        """The sizes, small ones also as powers of two that hold them, and the precision, by their names."""
        small = {"NS": self.S, "NQ": self.Q, "NR": self.R}
        return {
            "T": len(x), "SIZE": triton.next_power_of_2(len(x)), "P": self.P, "K": self.K, **small,
            **{f"{name[1]}2": triton.next_power_of_2(size) for name, size in small.items()},
            "PRECISION": "tf32" if x.dtype == torch.float32 and _tf32() else "ieee",
        }  # fmt: skip

    def grid(self, tokens: int) -> Any:
        """Programs for y, by the tile."""
        sizes = (self.S, self.R) if self.mixes_after else (self.Q, 1)
        rows, columns = map(triton.next_power_of_2, sizes)
        return lambda tile: (triton.cdiv(tokens, tile["ROWS"] // rows), triton.cdiv(self.P, tile["COLUMNS"] // columns))


def _form(A: Tensor, B: Tensor) -> tuple[_Form, bool]:
    """The product, and whether A is the large factor."""
    (m1, R, n1), (m2, _, n2) = A.shape, B.shape
    first, second = (R * n1, n1, 1), (R * n2, n2, 1)  # strides of contiguous factors
    n, m = n1 * n2, m1 * m2
    if m1 * n1 >= m2 * n2:
        return _Form(m1, R, n1, m2, n2, first, second, (n, 1, n2), (m, 1, m2)), True
    return _Form(m2, R, n2, m1, n1, second, first, (n, n2, 1), (m, m2, 1)), False


def kronecker_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor | None:
    """As `kronecker_layers.kronecker_linear`, for sums that the kernels are made for; None for others."""
    if not fits(x, A, B):
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, A, B, bias = x.to(dtype), A.to(dtype), B.to(dtype), None if bias is None else bias.to(dtype)
    return linear(x, A, B, bias) if x.dtype == A.dtype == B.dtype else None


def fits(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether one factor is tiny and the other is not, there are tokens, and no float64."""
    form, _ = _form(A, B)
    return (
        x.numel() > 0
        and all(value.dtype in _DTYPES and value.device == x.device for value in (x, A, B))
        and min(form.S, form.Q) * form.R <= FEWEST
        and max(form.S, form.Q) <= MOST
        and min(form.P, form.K) >= LEAST
    )


@torch.library.custom_op("kronecker_transformers::linear", mutates_args=())
def linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y = W x + bias.

    Args:
        x: (..., n), in float32, bfloat16 or float16; `fits` says for which sizes.
        A: (m1, R, n1), B: (m2, R, n2), bias: (m,) or None; in the dtype of x.

    Returns:
        (..., m), in the dtype of x.
    """
    form, a_is_large = _form(A, B)
    L, S = (A, B) if a_is_large else (B, A)
    flat, bias = x.reshape(-1, form.K * form.S).contiguous(), None if bias is None else bias.contiguous()
    with _on(x.device):
        y = _product(form, flat, L.contiguous(), S.contiguous(), bias)
    return y.reshape(*x.shape[:-1], -1)


@linear.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], A.shape[0] * B.shape[0])


@torch.library.custom_op("kronecker_transformers::linear_backward", mutates_args=())
def linear_backward(g: Tensor, x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., n), A and B for g (..., m), that of y."""
    form, a_is_large = _form(A, B)
    L, S = (part.contiguous() for part in ((A, B) if a_is_large else (B, A)))
    flat, g = x.reshape(-1, form.K * form.S).contiguous(), g.reshape(-1, form.P * form.Q).contiguous()
    back = form.transposed
    with _on(x.device):
        if back.mixes_after:
            dx = torch.empty_like(flat)
            dS = _accumulate(back, g, L, S, None, dx, flat).permute(2, 1, 0)
        else:
            dx = _product(back, g, L, S, None)
            dS = _accumulate(form, flat, L, S, None, None, g)
        dL = _gradient_of_large(form, flat, L, S, g)
    dS = dS.to(S.dtype).contiguous()
    return dx.reshape(x.shape), *((dL, dS) if a_is_large else (dS, dL))


@linear_backward.register_fake
def _(g: Tensor, x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, dA, dB = (torch.empty_like(value, memory_format=torch.contiguous_format) for value in (x, A, B))
    return dx, dA, dB


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on this GPU; Triton takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, A, B, bias = inputs
    ctx.save_for_backward(x, A, B)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dx, dA, dB = linear_backward(g, *ctx.saved_tensors)
    return dx, dA, dB, g.reshape(-1, g.shape[-1]).sum(0) if ctx.has_bias else None


linear.register_autograd(_backward, setup_context=_keep)


def _product(form: _Form, x: Tensor, L: Tensor, S: Tensor, bias: Tensor | None) -> Tensor:
    """The product y (tokens, outputs), for contiguous x (tokens, inputs)."""
    y = x.new_empty(len(x), form.P * form.Q)
    if form.mixes_after:
        _accumulate(form, x, L, S, bias, y, None)
    else:
        arguments = {"x": x, "L": L, "S": S, "bias": bias, "y": y}
        _mix_before_tuned[form.grid(len(x))](**arguments, **form.strides(), **form.sizes(x))
    return y


def _accumulate(
    form: _Form, x: Tensor, L: Tensor, S: Tensor, bias: Tensor | None, y: Tensor | None, other: Tensor | None
) -> Tensor:
    """Fill y, if there is one; the gradient of S, float32 (Q, R, S), is empty unless there is another tensor like y."""
    kernel, tile, partial = _mix_after_tuned, {}, x.new_empty(0, dtype=torch.float32)
    grid: Any = form.grid(len(x))
    if other is not None:  # the parts have places by the tile, so it is not tuned
        kernel, tile, grid = mix_after, _REDUCING, grid(_REDUCING)
        partial = partial.new_empty(grid[0] * grid[1], form.Q, form.R, form.S)
    arguments = {"x": x, "L": L, "S": S, "bias": bias, "y": y, "other": other, "partial": partial}
    kernel[grid](**arguments, **form.strides(), **form.sizes(x), **tile)
    return partial if other is None else partial.sum(0)


def _gradient_of_large(form: _Form, x: Tensor, L: Tensor, S: Tensor, g: Tensor) -> Tensor:
    """That of L, for g (tokens, outputs): in its shape, (P, R, K)."""
    if form.mixes_after:  # mix g instead of x; then the sum over tokens has fewer terms
        form, x, g = form.transposed, g, x
    sizes, strides = form.sizes(x), form.strides()
    tiles = triton.cdiv(form.K, 64) * triton.cdiv(form.P, 64) * form.R
    share = triton.cdiv(triton.cdiv(len(x), max(1, _PROGRAMS // tiles)), 64) * 64  # tokens, a multiple of all blocks
    splits = triton.cdiv(len(x), share)
    partial = x.new_empty(splits, *L.shape, dtype=torch.float32)

    def grid(meta: Any) -> tuple[int, int, int]:
        return triton.cdiv(form.K, meta["ROWS"]) * triton.cdiv(form.P, meta["COLUMNS"]), form.R, splits

    _large_gradient_tuned[grid](
        u=x, v=g, S=S, partial=partial, SHARE=share, **{**sizes, "P": form.K, "K": form.P},
        u_t=strides["x_t"], u_s=strides["x_s"], u_p=strides["x_k"],
        v_t=strides["y_t"], v_q=strides["y_q"], v_k=strides["y_p"],
        s_q=strides["s_q"], s_r=strides["s_r"], s_s=strides["s_s"],
        g_p=strides["l_k"], g_r=strides["l_r"], g_k=strides["l_p"],
    )  # fmt: skip
    return partial.sum(0).to(L.dtype)
