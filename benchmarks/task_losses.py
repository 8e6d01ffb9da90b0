"""The losses of a classifier's student, and how it learns from them: students of one start, in equally many steps.

    python benchmarks/task_losses.py --data DIR --work WORK > benchmarks/logs/task_losses.txt

Teachers, dense students, starts and judgement are those of task_recipes.py, whose WORK may be used again; so are the
texts, half of them altered, and Muon. The ways differ in the losses and their weights, in the rate and in the size of a
batch, and in what is trained when. The runs of the log are by an earlier form of this script, whose balanced weights
rest on the gradients of 192 examples, where the package takes those of the first step. Finished runs are lines of
logs/task_losses.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import RunLog, runs_parser, spread
from rich.console import Console
from task_plans import LAYERS, RATIO, compared, prepared
from task_plans import STEPS as DENSE_STEPS
from task_recipes import STEPS, start_of
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer, keep_layers
from kronecker_transformers.distillation.optimizer import FACTORED_RATE
from kronecker_transformers.experiments import lessons
from kronecker_transformers.experiments.training import DENSE_RATE, WARMUP, kept_layers
from kronecker_transformers.experiments.watch import multiplies_bfloat16
from kronecker_transformers.models.kronecker_layers import KroneckerLinear
from kronecker_transformers.tasks.glue import glue_task
from kronecker_transformers.tasks.text import TextStream

LOG = RunLog("task_losses")
RELATIONS = {"attention_mse_weight": 0.0, "relation_kl_weight": 1.0, "supervised_weight": 0.0}
"""Equal shares, with relations in place of attention scores."""
LOGITS = {f"{name}_weight": 0.0 for name in ("embedding_mse", "attention_mse", "hidden_mse", "supervised")}


@dataclass(frozen=True)
class Way:
    """How a student learns; what it does not say is as in `distill`.

    Attributes:
        weights: of the losses.
        balanced: whether they are shares of the gradient.
        rate: learning rate.
        temperature: of the logits.
        batch: examples.
        steps: share of the steps of the task.
        altered: share of the texts.
        logits_alone: share of the steps, at the end, in which only the logits count, at a rate of 3e-4.
        replacing: share of the steps in which more and more of the factored layers take the place of dense ones.
        dense: whether it is the dense student that learns, in the steps of task_plans.py.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict(lessons.SHARES))
    balanced: bool = True
    rate: float = FACTORED_RATE
    temperature: float = 1.0
    batch: int = 32
    steps: float = 1.0
    altered: float = lessons.ALTERED
    logits_alone: float = 0.0
    replacing: float = 0.0
    dense: bool = False


FIXED = "weights 1, 0.05 for attention and logits"
WAYS = {
    FIXED: Way(lessons.WEIGHTS, balanced=False),
    f"{FIXED}, logits at temperature 4": Way(lessons.WEIGHTS, balanced=False, temperature=4),
    f"{FIXED}, logits alone in the last 30 % of the steps": Way(lessons.WEIGHTS, balanced=False, logits_alone=0.3),
    "balanced": Way(),
    "balanced, rate 0.0005": Way(rate=FACTORED_RATE / 2),
    "balanced, batches of 16, 1.45 times the steps": Way(batch=16, steps=1.45),
    "balanced, relations": Way(RELATIONS),
    "balanced, relations, rate 0.0005": Way(RELATIONS, rate=FACTORED_RATE / 2),
    "balanced, relations, batches of 64, 0.6 times the steps": Way(RELATIONS, batch=64, steps=0.6),
    "balanced, relations, 80 % of the texts altered": Way(RELATIONS, altered=0.8),
    "balanced, relations, layers replaced one by one": Way(RELATIONS, replacing=0.5),
    f"dense, {FIXED}": Way(lessons.WEIGHTS, False, DENSE_RATE, dense=True),
    "dense, balanced": Way(rate=DENSE_RATE, dense=True),
}


@dataclass(frozen=True)
class Run:
    """A student of a task."""

    task: str
    way: str
    seed: int


class Replacing(TrainerCallback):
    """After Xu et al., "BERT-of-Theseus" (EMNLP 2020): in each step a factored layer computes itself with a probability
    that rises from 0.5 to 1, and otherwise the layer that it came from.
    """

    def __init__(self, share: float) -> None:
        self.share, self.probability = share, 0.5

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise the probability."""
        self.probability = min(1.0, 0.5 + 0.5 * state.global_step / (self.share * args.max_steps))

    @contextmanager
    def placed(self, student: PreTrainedModel, dense: PreTrainedModel) -> Iterator[None]:
        """In the layers of a student, while it is trained."""
        origins = dict(dense.named_modules())
        layers = {name: module for name, module in student.named_modules() if isinstance(module, KroneckerLinear)}
        for name, layer in layers.items():
            vars(layer)["forward"] = self._either(layer, layer.forward, origins[name])
        yield
        for layer in layers.values():
            vars(layer).pop("forward")

    def _either(self, layer: nn.Module, own: Callable[[Any], Any], origin: nn.Module) -> Callable[[Any], Any]:
        return lambda x: origin(x) if layer.training and random.random() > self.probability else own(x)


def train(student: PreTrainedModel, teacher: PreTrainedModel, lesson: Any, run: Run, **changes: Any) -> dict[str, Any]:
    """Once through a schedule; its summary."""
    callbacks = changes.pop("callbacks", [])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch, objective=lesson.objective, warmup_steps=WARMUP, dropout=0.0, seed=run.seed,
            layer_map=kept_layers(teacher, LAYERS), bf16=multiplies_bfloat16(), use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False}, **changes,
        )  # fmt: skip
        stream = TextStream(lesson.examples, run.seed, group=arguments.train_batch_size)
        trainer = DistillationTrainer(
            student, teacher, arguments, train_dataset=stream, data_collator=lesson.collate, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.training_summary()


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    way = WAYS[run.way]
    teacher, dense, tokenizer, lesson = prepared(run.task, options, way.altered)
    if way.dense:
        student, steps = keep_layers(teacher, kept_layers(teacher, LAYERS) or []), DENSE_STEPS[run.task][0]
    else:
        limit = teacher.base_model.num_parameters() / RATIO
        student = start_of(run.task, dense, limit, lesson, tokenizer, options.work)
        steps = round(way.steps * STEPS[run.task])
    last = round(way.logits_alone * steps)
    common = {"muon": not way.dense, "per_device_train_batch_size": way.batch, "temperature": way.temperature}
    first = {"max_steps": steps - last, "learning_rate": way.rate, "balanced": way.balanced, **way.weights, **common}
    if way.replacing:
        replacing = Replacing(way.replacing)
        with replacing.placed(student, dense):
            summary = train(student, teacher, lesson, run, callbacks=[replacing], **first)
    else:
        summary = train(student, teacher, lesson, run, **first)
    if last:
        train(student, teacher, lesson, run, max_steps=last, learning_rate=3e-4, **LOGITS, **common)
    quality = compared(run.task, lesson, teacher=teacher, dense=dense, student=student.eval())
    LOG.add(asdict(run), {**quality, "steps": steps, "seconds": summary["seconds"], "weights": summary["objective"]})


def rows() -> dict[str, list[Any]]:
    """The ways: correlation and score on each task."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        found[line["way"]][f"{line['task']} score"].append(line["scores"]["student"])
        found[line["way"]][f"{line['task']} near"].append(line["correlations"]["student"])
    columns = [f"{task} {kind}" for task in STEPS for kind in ("near", "score")]
    return {way: [spread(found[way][column]) for column in columns] for way in WAYS if way in found}


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Losses of classifiers.", "teachers and starts")
    parser.add_argument("--seeds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=list(STEPS), choices=list(STEPS), help="(default: both)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="(default: all)")
    options = parser.parse_args()
    disable_progress_bar()
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        runs = [Run(task, way, seed) for way in options.ways for task in options.tasks for seed in range(options.seeds)]
        for run in LOG.missing(runs):
            perform(run, options)
    headings = [f"{task}\n{what}" for task in STEPS for what in ("correlation", glue_task(task).headline)]
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    console.print(results_table("all-MiniLM-L6-v2 on tasks, students of 7.7x, per cent", headings, rows()))


if __name__ == "__main__":
    main()
