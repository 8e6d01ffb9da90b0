"""Attention forward and backward on a CPU: PyTorch's flash attention beside the plain form, fp32 and bf16.

    python benchmarks/attention.py | tee benchmarks/logs/attention.txt

All four take turns in one process; median of the rounds, with the spread (half the distance between the quartiles). A
ratio above 1 means that the plain form is faster. The trainer's choice for short sequences rests on this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread

SHAPES = ((64, 12, 26, 32), (32, 12, 64, 32), (16, 12, 128, 32), (16, 12, 128, 64), (8, 12, 256, 64), (4, 12, 512, 64))
"""Sequences, heads, tokens, units of a head."""
ROUNDS = 11


def step(backend: SDPBackend, inputs: list[torch.Tensor], mask: torch.Tensor) -> None:
    """Once forward and backward; inputs are queries, keys and values."""
    query, key, value = inputs
    with sdpa_kernel(backend):
        scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()


def main() -> None:
    """Print one row for each shape and precision."""
    print(environment())
    torch.manual_seed(0)
    print(f"{'shape':18s} {'dtype':9s} {'flash ms':>9s} {'spread':>7s} {'plain ms':>9s} {'spread':>7s} {'ratio':>6s}")
    for shape in SHAPES:
        candidates: dict[str, Callable[[], None]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            mask = torch.zeros(shape[0], 1, shape[2], shape[2], dtype=dtype)
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("plain", SDPBackend.MATH)):
                candidates[f"{dtype} {name}"] = partial(step, backend, inputs, mask)
        seconds = in_turn(candidates, ROUNDS)
        for dtype in (torch.float32, torch.bfloat16):
            flash, flash_spread = median_and_spread(seconds[f"{dtype} flash"])
            plain, spread = median_and_spread(seconds[f"{dtype} plain"])
            print(
                f"{'x'.join(map(str, shape)):18s} {str(dtype).removeprefix('torch.'):9s} {flash:9.2f} "
                f"{flash_spread:7.0%} {plain:9.2f} {spread:7.0%} {flash / plain:5.2f}x"
            )


if __name__ == "__main__":
    main()
