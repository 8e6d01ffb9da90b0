"""Attention on a CPU, in training and without gradients: PyTorch's flash attention beside the plain form.

    python benchmarks/attention.py | tee benchmarks/logs/attention.txt

All take turns in one process; median of the rounds, with the spread (half the distance between the quartiles). A ratio
above 1 means that the plain form is faster. The trainer's choice for a teacher and a student in bf16 rests on this.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kronecker_transformers.distillation.contexts import plain_attention
from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread

SHAPES = (
    (32, 12, 12, 32), (64, 12, 26, 32), (32, 12, 64, 32), (16, 12, 128, 32), (16, 12, 128, 64), (8, 12, 256, 64),
    (4, 12, 512, 64),
)  # fmt: skip
"""Sequences, heads, tokens, units of a head."""
ROUNDS = 11


WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "flash": partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION), "plain": plain_attention,
}  # fmt: skip


def step(way: str, trained: bool, inputs: list[torch.Tensor], mask: torch.Tensor) -> None:
    """Once forward, and backward where it is trained; inputs are queries, keys and values."""
    query, key, value = inputs
    with WAYS[way](), torch.set_grad_enabled(trained):
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if trained:
            output.sum().backward()


def main() -> None:
    """Print one row for each shape and precision."""
    print(environment())
    torch.manual_seed(0)
    columns = f"{'flash ms':>9s} {'spread':>7s} {'plain ms':>9s} {'spread':>7s} {'ratio':>6s}"
    print(f"{'shape':14s} {'dtype':9s} {'':18s} {columns}")
    kinds = [(dtype, trained) for dtype in (torch.float32, torch.bfloat16) for trained in (True, False)]
    for shape in SHAPES:
        candidates: dict[str, Callable[[], None]] = {}
        for dtype, trained in kinds:
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=trained) for _ in range(3)]
            mask = torch.zeros(shape[0], 1, shape[2], shape[2], dtype=dtype)
            candidates |= {f"{dtype} {trained} {way}": partial(step, way, trained, inputs, mask) for way in WAYS}
        seconds = in_turn(candidates, ROUNDS)
        for dtype, trained in kinds:
            flash, flash_spread = median_and_spread(seconds[f"{dtype} {trained} flash"])
            plain, spread = median_and_spread(seconds[f"{dtype} {trained} plain"])
            print(
                f"{'x'.join(map(str, shape)):14s} {str(dtype).removeprefix('torch.'):9s} "
                f"{'with gradients' if trained else 'without gradients':18s} {flash:9.2f} "
                f"{flash_spread:7.0%} {plain:9.2f} {spread:7.0%} {flash / plain:5.2f}x"
            )


if __name__ == "__main__":
    main()
