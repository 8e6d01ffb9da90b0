"""How many tokens of a large batch should go through a factored BERT at a time (`modeling_kronecker.BLOCK`).

    python benchmarks/blocks.py | tee benchmarks/logs/blocks.txt

BERT-base with weights as drawn for training from scratch, seed 0, one forward pass in fp32; the dense model gets the
whole batch, and in one column blocks of 512 tokens too. All take turns in one process; milliseconds, median of the
rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from transformers import BertConfig, BertModel, PreTrainedModel

from kronecker_transformers import compress
from kronecker_transformers.benchmark import environment, in_turn, median_and_spread
from kronecker_transformers.models import modeling_kronecker

BATCHES = ((8, 128), (32, 128), (8, 512))  # batch x length
BLOCKS = (10**9, 4096, 2048, 1024, 512, 256, 128)
ROUNDS = 7


def in_blocks(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Callable[[], None]:
    """A forward pass of a factored model in blocks."""

    def run() -> None:
        with patch.object(modeling_kronecker, "BLOCK", tokens * model.config.hidden_size):
            model(ids)

    return run


@torch.inference_mode()
def main() -> None:
    """Print one row for each plan and batch."""
    print(environment())
    torch.manual_seed(0)
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


if __name__ == "__main__":
    main()
