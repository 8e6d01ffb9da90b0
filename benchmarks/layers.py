"""Speed of single factored layers beside the dense layers they replace, forward, fp32.

    python benchmarks/layers.py | tee benchmarks/logs/layers.txt

Both take turns in one process; median of the rounds, with the spread (half the distance between the quartiles). A ratio
above 1 means that the factored layer is faster.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

from kronecker_transformers.benchmark import environment, in_turn, median_and_spread
from kronecker_transformers.models.kronecker_layers import kronecker_linear

# name: (m1, n1, m2, n2, terms); sizes of BERT-base and GPT-2 small
LAYERS = {
    "7.7x attention": (384, 384, 2, 2, 1),
    "7.7x FFN up": (8, 2, 384, 384, 1),
    "7.7x FFN down": (2, 8, 384, 384, 1),
    "21x attention": (384, 48, 2, 16, 1),
    "21x FFN up": (16, 2, 192, 384, 1),
    "21x FFN down": (2, 16, 384, 192, 1),
    "kngpt2 c_attn": (1152, 768, 2, 1, 1),
    "kngpt2 attn.c_proj": (384, 768, 2, 1, 1),
    "kngpt2 c_fc": (1536, 768, 2, 1, 1),
    "kngpt2 mlp.c_proj": (384, 3072, 2, 1, 1),
    "attention, 2 terms": (192, 192, 4, 4, 2),
    "attention, rank 96": (768, 1, 1, 768, 96),
}
TOKENS = (1, 16, 128, 1024, 4096)
ROUNDS = 21


@torch.inference_mode()
def main() -> None:
    """Print one row for each layer and number of tokens."""
    print(environment())
    torch.manual_seed(0)
    print(f"{'layer':20s} {'tokens':>6s} {'dense ms':>9s} {'spread':>7s} {'factored':>9s} {'spread':>7s} {'ratio':>6s}")
    for name, (m1, n1, m2, n2, terms) in LAYERS.items():
        A, B, bias = torch.randn(m1, terms, n1), torch.randn(m2, terms, n2), torch.randn(m1 * m2)
        W = torch.randn(m1 * m2, n1 * n2)
        for tokens in TOKENS:
            x = torch.randn(tokens, n1 * n2)
            seconds = in_turn(
                {"dense": partial(linear, x, W, bias), "factored": partial(kronecker_linear, x, A, B, bias)}, ROUNDS
            )
            dense, dense_spread = median_and_spread(seconds["dense"])
            factored, spread = median_and_spread(seconds["factored"])
            print(
                f"{name:20s} {tokens:6d} {dense:9.3f} {dense_spread:7.0%} {factored:9.3f} {spread:7.0%} "
                f"{dense / factored:5.2f}x"
            )


if __name__ == "__main__":
    main()
