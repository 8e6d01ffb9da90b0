"""Speed of whole factored models beside the dense models they come from: one forward pass, fp32, eager, SDPA.

    python benchmarks/models.py | tee benchmarks/logs/models.txt

The weights are drawn as for training from scratch, seed 0. All take turns in one process; median of the rounds, with
the spread (half the distance between the quartiles). A ratio above 1 means that the factored model is faster.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kronecker_transformers import compress
from kronecker_transformers.benchmark import environment, in_turn, median_and_spread

BATCHES = ((1, 16), (1, 128), (8, 128), (32, 128))  # batch x length
ROUNDS = 9


@torch.inference_mode()
def main() -> None:
    """Print one row for each model, plan and batch."""
    print(environment())
    torch.manual_seed(0)
    columns = f"{'dense ms':>9s} {'spread':>7s} {'factored':>9s} {'spread':>7s} {'ratio':>6s}"
    print(f"{'model':12s} {'plan':7s} {'batch':>7s} {columns}")
    teachers: dict[str, tuple[PreTrainedModel, tuple[str, ...]]] = {
        "BERT-base": (BertModel(BertConfig()).eval(), ("7.7x", "21x")),
        "GPT-2 small": (GPT2LMHeadModel(GPT2Config()).eval(), ("kngpt2",)),
    }
    for name, (teacher, plans) in teachers.items():
        models = {"dense": teacher, **{plan: compress(teacher, plan).model for plan in plans}}
        for batch, length in BATCHES:
            ids = torch.randint(1000, 30000, (batch, length))
            seconds = in_turn({key: partial(model, ids) for key, model in models.items()}, ROUNDS)
            dense, dense_spread = median_and_spread(seconds["dense"])
            for plan in plans:
                factored, spread = median_and_spread(seconds[plan])
                print(
                    f"{name:12s} {plan:7s} {batch:3d}x{length:3d} {dense:9.1f} {dense_spread:7.0%} "
                    f"{factored:9.1f} {spread:7.0%} {dense / factored:5.2f}x"
                )


if __name__ == "__main__":
    main()
