"""Seconds of a distillation step of a classifier with relations, and with attention scores in their place.

    python benchmarks/losses.py | tee benchmarks/logs/losses.txt

Random weights of the shape of all-MiniLM-L6-v2 for the teacher, of three layers of low rank for the student; forward
and backward pass, in bf16 where the CPU has instructions for it, without the optimizer. Both take turns in one process;
median of the rounds, with the spread (half the distance between the quartiles).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import low_rank_plan
from transformers import BertConfig, BertForSequenceClassification

from kronecker_transformers import compress
from kronecker_transformers.distillation import Objective, keep_layers
from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread
from kronecker_transformers.experiments.watch import multiplies_bfloat16

LAYERS = (1, 3, 5)
BATCH, LENGTHS, ROUNDS = 32, (12, 32, 64, 128), 11
COMMON = ("embedding_mse", "hidden_mse", "logits")


def step(objective: Objective, student: Any, batch: dict[str, torch.Tensor]) -> None:
    """Losses of a batch and their gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
        values = objective.values(student, batch, objective.count(batch))
    torch.stack(list(values.values())).sum().backward()
    student.zero_grad()


def main() -> None:
    """One row for each length."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    teacher = BertForSequenceClassification(config).eval()
    dense = keep_layers(teacher, LAYERS)
    limit = teacher.base_model.num_parameters() / 7.7
    student = compress(dense, low_rank_plan(dense.base_model, int(limit))).model.requires_grad_(True).train()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=multiplies_bfloat16())
    print(environment())
    print(f"milliseconds of a step of {BATCH} sequences; ratio: relations to attention scores")
    print(f"{'tokens':>8}{'attention scores':>22}{'relations':>22}{'ratio':>8}")
    for length in LENGTHS:
        ids = torch.randint(1000, 30_000, (BATCH, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        jobs = {}
        for name in ("attention_mse", "relation_kl"):
            weights = dict.fromkeys((*COMMON, name), 1.0)
            objective = Objective(student, teacher, weights, layer_map=LAYERS, autocast=autocast)
            jobs[name] = partial(attached, objective, student, batch)
        found = [median_and_spread(times) for times in in_turn(jobs, ROUNDS).values()]
        shown = "".join(f"{median:>13.1f} +- {100 * spread:3.0f} %" for median, spread in found)
        print(f"{length:>8}{shown}{found[1][0] / found[0][0]:>8.2f}")


def attached(objective: Objective, student: Any, batch: dict[str, torch.Tensor]) -> None:
    """A step, with hooks for it alone: two objectives share the models."""
    objective.attach(student)
    step(objective, student, batch)
    objective.detach()


if __name__ == "__main__":
    main()
