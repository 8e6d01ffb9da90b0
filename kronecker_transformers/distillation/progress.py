"""What a training has seen and how long it took, and the end of one that is limited in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy


class Progress(TrainerCallback, ExportableState):
    """Counts samples and seconds over all runs of a training, in its checkpoints too, and ends it after `max_minutes`.

    Attributes:
        samples: seen so far, in all processes.
        elapsed: seconds at the beginning of the step, the same number in all processes: what is decided by time is
            decided by this one.
        weights: of the losses, where the first step has balanced them.
        asked: what they were made of.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.samples, self.elapsed, self.max_minutes = 0, 0.0, max_minutes
        self.weights: dict[str, float] | None = None
        self.asked: dict[str, float] | None = None
        self._before = 0.0
        self._started: float | None = None  # while a training runs

    def seconds(self) -> float:
        """Of training so far, earlier runs included."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what is no training, such as an evaluation on the way."""
        begin = time.monotonic()
        yield
        if self._started is not None:
            self._started += time.monotonic() - begin

    def share_of_time(self) -> float:
        """Of `max_minutes`, from 0; 0 without a limit."""
        return self.elapsed / (60 * self.max_minutes) if self.max_minutes else 0.0

    def is_over(self) -> bool:
        """Whether the time of a training is over, of one that was restored too."""
        return self.max_minutes is not None and self.seconds() >= 60 * self.max_minutes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock; of a new training it may be another try, with smaller batches.

        The limit is that of the arguments, not of a checkpoint.
        """
        self.max_minutes = args.max_minutes
        if not state.global_step:
            self.restore(TrainerState())
        self._started = time.monotonic()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop it: what comes later is no training."""
        self._before, self._started = self.seconds(), None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End a training whose time is over, with a last checkpoint, as one whose steps are done has it."""
        if self.share_of_time() >= 1:
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        counted = {"samples": self.samples, "_before": self.seconds(), "weights": self.weights, "asked": self.asked}
        return {"args": {"max_minutes": self.max_minutes}, "attributes": counted}

    def restore(self, state: TrainerState) -> None:
        """Go on from a checkpoint, which may be of a version that did not count; begin with an empty state."""
        kept: Any = state.stateful_callbacks or {}
        found = kept.get(type(self).__name__, {}).get("attributes", {})
        self.samples, self._before, self.elapsed = found.get("samples", 0), found.get("_before", 0.0), 0.0
        self.weights, self.asked = found.get("weights"), found.get("asked")
        self._started = None


def follow_time(scheduler: Any, steps: int, progress: Callable[[], Progress]) -> None:
    """Let a schedule over a number of steps advance by time where the steps come more slowly than planned.

    Only schedules that are functions of the step follow; others stay as they are. `progress` gives what counts the time
    now: a resumed training may have made it anew from the checkpoint.
    """
    if isinstance(scheduler, LambdaLR) and steps:
        scheduler.lr_lambdas = [partial(_scheduled, shape, steps, progress) for shape in scheduler.lr_lambdas]


def _scheduled(shape: Callable[[int], float], steps: int, progress: Callable[[], Progress], step: int) -> float:
    return shape(max(step, min(steps, int(progress().share_of_time() * steps))))
