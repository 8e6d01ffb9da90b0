"""How many tokens of a large batch should go through a factored model at a time on a CPU.

    python benchmarks/blocks.py | tee benchmarks/logs/blocks.txt

First through one layer (`kronecker_contraction.TOKENS_AT_A_TIME`), then through a whole BERT
(`kronecker_blocks.BLOCK`): BERT-base with weights as drawn for training from scratch, seed 0, one forward pass in
fp32; the dense model gets the whole batch, and in one column blocks of 512 tokens too. All take turns in one process;
milliseconds, median of the rounds. The log has one run on each of two processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from layers import LAYERS
from transformers import BertConfig, BertModel, PreTrainedModel

from kronecker_transformers import compress
from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread
from kronecker_transformers.models import kronecker_blocks, kronecker_contraction
from kronecker_transformers.models.kronecker_layers import kronecker_linear

BATCHES = ((8, 128), (32, 128), (8, 512))  # batch x length
BLOCKS = (10**9, 2048, 1024, 512, 256)
ROUNDS = 5
TOKENS = 8192
"""Through one layer."""


def layer_in_blocks(inputs: Sequence[torch.Tensor], tokens: int) -> Callable[[], None]:
    """One layer in blocks."""

    def run() -> None:
        with patch.object(kronecker_contraction, "TOKENS_AT_A_TIME", tokens):
            kronecker_linear(*inputs)

    return run


def layers() -> None:
    """Print one row for each shape."""
    names = ["whole" if block == BLOCKS[0] else f"in {block}s" for block in BLOCKS]
    print(f"{f'{TOKENS} tokens':19s}", *(f"{name:>10s}" for name in names))
    for layer, (m1, n1, m2, n2, terms) in LAYERS.items():
        inputs = [torch.randn(size) for size in ((TOKENS, n1 * n2), (m1, terms, n1), (m2, terms, n2), (m1 * m2,))]
        works = {name: layer_in_blocks(inputs, block) for name, block in zip(names, BLOCKS, strict=True)}
        medians = (median_and_spread(times)[0] for times in in_turn(works, ROUNDS).values())
        print(f"{layer:19s}", *(f"{median:10.1f}" for median in medians), flush=True)


def in_blocks(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Callable[[], None]:
    """A forward pass of a factored model in blocks."""

    def run() -> None:
        with patch.object(kronecker_blocks, "BLOCK", tokens * model.config.hidden_size):
            model(ids)

    return run


def models() -> None:
    """Print one row for each plan and batch."""
    dense = BertModel(BertConfig()).eval()
    names = ["dense", "dense 512s", *("whole" if block == BLOCKS[0] else f"in {block}s" for block in BLOCKS)]
    print(f"{'':13s}", *(f"{name:>10s}" for name in names))
    for plan in ("7.7x", "21x"):
        model = compress(dense, plan).model
        for batch, length in BATCHES:
            ids = torch.randint(1000, 30000, (batch, length))
            rows = max(1, 512 // length)
            candidates: list[Callable[[], object]] = [
                lambda ids=ids: dense(ids),  # type: ignore[misc]
                lambda ids=ids, rows=rows: [dense(part) for part in ids.split(rows)],  # type: ignore[misc]
                *(in_blocks(model, ids, block) for block in BLOCKS),
            ]
            seconds = in_turn(dict(zip(names, candidates, strict=True)), ROUNDS)
            medians = (median_and_spread(times)[0] for times in seconds.values())
            print(f"{plan:5s} {batch:3d}x{length:3d}", *(f"{median:10.1f}" for median in medians), flush=True)


@torch.inference_mode()
def main() -> None:
    """Both tables."""
    print(environment())
    torch.manual_seed(0)
    layers()
    models()


if __name__ == "__main__":
    main()
