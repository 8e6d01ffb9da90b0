"""Steps of a student that two processes hold half of each (FSDP2), beside the same of a whole one; for torchrun.

torchrun --nproc_per_node 2 sharded.py CLASS [muon]
"""

import copy
import json
import sys

import torch
import transformers
from distilling import ALL_TERMS, collate, examples, pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kronecker_transformers.compression.activations import layers_of
from kronecker_transformers.distillation.objective import Objective
from kronecker_transformers.distillation.optimizer import MuonAdamW, scale_learning_rates

WEIGHTS = {name.removesuffix("_weight"): weight for name, weight in ALL_TERMS.items()}
STEPS = 3


def shard(student):
    """Every layer by itself, and the rest, as accelerate does it."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers_of(student.base_model)[1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student


def trained(student, objective, batch, muon):
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    scale_learning_rates(optimizer, student)
    if muon:
        optimizer = MuonAdamW(optimizer.param_groups, student)
    objective.attach(student)
    found = []
    for _ in range(STEPS):
        values = objective.values(student.eval(), batch, objective.count(batch))
        loss = sum(WEIGHTS[name] * value for name, value in values.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    objective.detach()
    return found


def main():
    torch.distributed.init_process_group("gloo")
    teacher, student = (model.double() for model in pair(getattr(transformers, sys.argv[1])))
    students = [student, copy.deepcopy(student)]
    objectives = [Objective(one, copy.deepcopy(teacher), WEIGHTS) for one in students]
    shard(students[1])
    batch = collate(examples(student))
    losses = [trained(*pair, batch, "muon" in sys.argv) for pair in zip(students, objectives, strict=True)]
    parts = [p for p in students[1].parameters() if isinstance(p, DTensor) and p.to_local().numel() < p.numel()]
    whole = [p.full_tensor() for p in students[1].parameters()]
    apart = max(float((a - b).abs().max()) for a, b in zip(students[0].parameters(), whole, strict=True))
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"losses": losses, "parts": len(parts), "parameters": len(whole), "apart": apart}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
