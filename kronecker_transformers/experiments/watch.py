"""How a distillation goes: the student's quality on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from ..distillation.agreement import Judge
from ..distillation.progress import Progress
from ..modes import evaluating

LOOKS = 12
"""Points of the curves."""


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
        self.minutes: list[float] = []
        self.quality: list[float] = []
        self.logged: list[int] = []
        self.losses: dict[str, list[float]] = {}
        self.name = ""
        self.progress = Progress()
        """Of the training; the seconds of a look are not counted."""
        self._judge, self._say, self._looked = judge, say, 0

    def look(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Add a point to the curve; `steps` are all of a training that is not limited in time."""
        with self.progress.paused(), evaluating(model):
            values = self._judge(model)
        self.name, value = next(iter(values.items()))
        self.steps.append(step)
        self.minutes.append(self.progress.seconds() / 60)
        self.quality.append(value)
        limit = self.progress.max_minutes
        share = f"of {steps:,}" if limit is None else f"after {self.progress.seconds() / 60:.1f} of {limit:g} minutes"
        self._say(f"  step {step:5,d} {share}: {self.name} {value:.4g}")

    def curve(self) -> dict[str, Any]:
        """What was seen, for a record: the quality's name, and its values with steps and minutes of training."""
        return {"quality": self.name, "values": self.quality, "steps": self.steps, "minutes": self.minutes}

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
