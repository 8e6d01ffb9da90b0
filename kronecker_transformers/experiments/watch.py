"""How a distillation goes: its pace on this machine, and the student's quality on the way."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ..checkpoint.pooling import Pooling
from ..distillation import Objective, TeacherMemory
from ..distillation.agreement import Judge
from ..distillation.progress import Progress
from ..distillation.trainer import attention_kernel, teacher_pooling

LOOKS = 12
"""Points of the curves."""
TRIED, MARGIN = 8, 1.25
"""Batches on which the pace of this machine is measured, and the factor on the steps that follow from it."""


def multiplies_bfloat16() -> bool:
    """Whether this machine computes on a CPU that has instructions for products of bfloat16 (AMX, AVX512-BF16)."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # the oldest versions have none
    return not torch.accelerator.is_available() and bool(found.get("amx_bf16") or found.get("avx512_bf16"))


class Watch(TrainerCallback):
    """Looks at the student now and then: the losses, and its quality on held-out text.

    The looks are spread evenly over the training, over its time where that ends it before its steps do.
    """

    def __init__(self, judge: Judge, say: Callable[[str], object]) -> None:
        self.steps: list[int] = []
        self.quality: list[float] = []
        self.logged: list[int] = []
        self.losses: dict[str, list[float]] = {}
        self.name = ""
        self.progress = Progress()
        """Of the training; the seconds of a look are not counted."""
        self._judge, self._say, self._looked = judge, say, 0

    def look(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Add a point to the curve."""
        start, training = time.monotonic(), model.training
        values = self._judge(model.eval())
        model.train(training)
        self.progress.skip(time.monotonic() - start)
        self.name, value = next(iter(values.items()))
        self.steps.append(step)
        self.quality.append(value)
        self._say(f"  step {step:5,d} of {steps:,}: {self.name} {value:.4g}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a log, and so for a look, when one is due."""
        due = int(LOOKS * max(self.progress.share_of_time(), state.global_step / state.max_steps))
        if due > self._looked:
            self._looked, control.should_log = due, True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """At each log of the trainer."""
        if "loss" in logs:
            self.logged.append(state.global_step)
            for loss in args.weights():
                self.losses.setdefault(loss, []).append(logs[loss])
            self.look(model, state.global_step, state.max_steps)


def affordable_steps(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    arguments: Any,
    batches: list[Any],
    minutes: float,
    memory: TeacherMemory | None = None,
    pooling: Pooling | None = None,
) -> int:
    """How many steps of distillation this machine makes in a number of minutes, from a try with a copy of the student.

    It is only a plan, with a margin: the training ends by time, and its learning rate follows the time, where steps are
    slower; were they faster than planned, minutes would be left over.
    """
    copied = copy.deepcopy(student).to(arguments.device).train()
    autocast = partial(torch.autocast, arguments.device.type, torch.bfloat16, enabled=arguments.bf16)
    weights, layers = arguments.weights(), arguments.layer_map
    dense = teacher.to(arguments.device)
    pooling = pooling or teacher_pooling(dense, weights)  # what is new goes into the memory
    objective = Objective(copied, dense, weights, layer_map=layers, autocast=autocast, pooling=pooling, memory=memory)
    objective.attach(copied)
    optimizer = torch.optim.AdamW(copied.parameters(), fused=True)
    seconds = []
    for batch in [*batches, *batches]:  # the first time to warm up
        batch = {name: value.to(arguments.device) for name, value in batch.items() if isinstance(value, Tensor)}
        start = time.perf_counter()
        with attention_kernel(arguments, batch["input_ids"].shape[-1]):
            with autocast():
                losses = objective.values(copied, batch, objective.count(batch))
            loss = torch.stack(list(losses.values())).sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for an accelerator
        seconds.append(time.perf_counter() - start)
    objective.detach()
    return max(LOOKS, int(MARGIN * 60 * minutes / statistics.mean(seconds[len(batches) :])))
