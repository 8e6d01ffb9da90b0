"""The trainings of `distill`: of a dense student that has fewer layers than its teacher, and of the factored one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback

from ..distillation import DistillationArguments, DistillationTrainer, keep_layers
from ..distillation.optimizer import DENSE_RATE, FACTORED_RATE, rate_for_size
from ..models import FACTORED_CLASSES
from ..tasks.text import TextStream
from .lessons import Lesson
from .watch import Watch

DENSE_ENCODER_RATE, DENSE_ENCODER_BATCH = 6e-4, 32
"""Of dense sentence encoders: smaller batches, so more steps, help them; to factored ones they make no difference."""
WARMUP = 0.1
"""Share of the steps in which the rate rises."""
MOST_STEPS = 1_000_000
"""Of a training that is limited in time, whose learning rate follows the time: more than any has."""
DENSE_SHARE = 0.4
"""Of minutes or steps, for the dense student."""


@dataclass(frozen=True)
class Schedule:
    """How long and how a student is trained; either `minutes` or `steps` is None."""

    minutes: float | None
    steps: int | None
    learning_rate: float | None
    bf16: bool
    seed: int

    def divided(self) -> tuple[Schedule, Schedule]:
        """For the dense student, at its own learning rate, and for the factored one."""
        if self.steps is not None:
            steps = max(1, round(DENSE_SHARE * self.steps))
            first, second = replace(self, steps=steps), replace(self, steps=max(1, self.steps - steps))
        else:
            assert self.minutes is not None
            minutes = DENSE_SHARE * self.minutes
            first, second = replace(self, minutes=minutes), replace(self, minutes=self.minutes - minutes)
        return replace(first, learning_rate=None), second


def kept_layers(teacher: PreTrainedModel, layers: int | Sequence[int] | None) -> list[int] | None:
    """Which layers a student keeps, from 0: evenly spaced ones for a number; None for all.

    Raises:
        ValueError: a number below 1 or above that of the teacher's layers.
    """
    depth: int = teacher.config.num_hidden_layers
    if layers is None:
        return None
    if not isinstance(layers, int):
        return None if list(layers) == list(range(depth)) else list(layers)
    if not 1 <= layers <= depth:
        raise ValueError(f"layers={layers} must be from 1 to {depth}, the number of the teacher's layers; correct it")
    return None if layers == depth else [(i + 1) * depth // layers - 1 for i in range(layers)]


def shallow(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    lesson: Lesson,
    schedule: Schedule,
    watch: Watch,
    say: Callable[[str], object],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A dense student with some of the teacher's layers, distilled from it; and its training."""
    student = keep_layers(teacher, layers)
    summary = train(student, teacher, lesson, schedule, watch, say, layers)
    return student.cpu().eval().requires_grad_(False), {**summary, "layers": list(layers)}


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    lesson: Lesson,
    schedule: Schedule,
    watch: Watch,
    say: Callable[[str], object],
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Distil a student, dense or factored, in place.

    Args:
        student, teacher: `layers` of the student are those of the teacher that it learns from; None for equal depth.
        lesson: what it learns from, and how.
        schedule: for how long.
        watch: looks at it meanwhile.
        say: called with a line.

    Returns:
        Steps, samples, tokens, seconds, objective, and the curve of the student's quality.
    """
    factored, encoder = type(student) not in FACTORED_CLASSES, lesson.objective == "sentence_encoder"
    batch = lesson.batch if factored or not encoder else DENSE_ENCODER_BATCH
    rate = schedule.learning_rate
    if rate is None:
        rate = FACTORED_RATE if factored else DENSE_ENCODER_RATE if encoder else DENSE_RATE
        rate = rate_for_size(rate, student.config.hidden_size)
    limit = schedule.minutes
    weights = lesson.weights if lesson.factored_weights is None or not factored else lesson.factored_weights
    stream = TextStream(lesson.examples, schedule.seed, group=batch)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch, objective=lesson.objective, **weights, max_steps=schedule.steps or MOST_STEPS,
            max_minutes=limit, per_device_train_batch_size=batch, learning_rate=rate, warmup_steps=WARMUP,
            muon=factored and lesson.muon, dropout=0.0, seed=schedule.seed,
            layer_map=None if layers is None else list(layers),
            bf16=schedule.bf16, use_cpu=schedule.bf16 and not torch.cuda.is_available(),
            save_strategy="no", logging_strategy="no", include_num_input_tokens_seen="non_padding", report_to=[],
            disable_tqdm=True, remove_unused_columns=False, accelerator_config={"dispatch_batches": False},
        )  # fmt: skip
        planned = f"{limit:g} minutes" if schedule.steps is None else f"{schedule.steps:,} steps"
        depth = "" if factored else f" of a dense student with {student.config.num_hidden_layers} layers"
        say(f"Distillation{depth}: {planned}, {batch} examples each")
        trainer = DistillationTrainer(
            student, teacher, arguments, memory=lesson.memory, pooling=lesson.pooling,
            train_dataset=stream, data_collator=lesson.collate, callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        watch.progress = trainer.progress
        watch.look(student, 0, arguments.max_steps)
        trainer.train()
        if trainer.state.global_step > watch.steps[-1]:  # its time was over
            watch.look(student, trainer.state.global_step, arguments.max_steps)
        return {**trainer.training_summary(), "curve": watch.curve()}
