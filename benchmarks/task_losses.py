"""The losses of a classifier's student, and how it learns from them: students of one start, in equally many steps.

    python benchmarks/task_losses.py --data DIR --work WORK > benchmarks/logs/task_losses.txt

Teachers, dense students, starts and judgement are those of task_recipes.py, whose WORK may be used again; so are the
texts, half of them augmented, and Muon. The ways differ in the losses and their weights, in the rate and batch size,
and in what is trained when. In the log the runs "balanced" are by this script; all others are by an earlier form
of it, whose balanced weights rested on the gradients of 192 examples, where the package takes those of the first step.
Finished runs are lines of logs/task_losses.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

from common import RunLog, runs_parser, spread
from task_plans import LAYERS, RATIO, compared, prepared, watching
from task_plans import STEPS as DENSE_STEPS
from task_recipes import STEPS, show, start_of
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers.distillation import keep_layers
from kronecker_transformers.distillation.optimizer import DENSE_RATE, FACTORED_RATE
from kronecker_transformers.experiments import lessons
from kronecker_transformers.experiments.training import Schedule, kept_layers, train
from kronecker_transformers.experiments.watch import multiplies_bfloat16
from kronecker_transformers.models.kronecker_layers import KroneckerLinear

LOG = RunLog("task_losses")
RELATIONS = {**lessons.SHARES, "attention_mse_weight": 0.0, "relation_kl_weight": 1.0}
"""Equal shares, with relations in place of attention scores."""
LOGITS = {f"{name}_weight": 0.0 for name in ("embedding_mse", "attention_mse", "hidden_mse", "supervised")}
LOGITS_RATE = 3e-4


@dataclass(frozen=True)
class Way:
    """How a student learns; what it does not say is as in `distill`.

    Attributes:
        weights: of the losses, and other arguments of the distillation.
        rate: learning rate.
        batch: examples.
        steps: share of the steps of the task.
        augmented: share of the texts.
        logits_alone: share of the steps, at the end, in which only the logits count.
        replacing: share of the steps in which more and more of the factored layers take the place of dense ones.
        dense: whether it is the dense student that learns, in the steps of task_plans.py.
    """

    weights: Mapping[str, Any]
    rate: float = FACTORED_RATE
    batch: int = 32
    steps: float = 1.0
    augmented: float = lessons.AUGMENTED
    logits_alone: float = 0.0
    replacing: float = 0.0
    dense: bool = False


FIXED = "weights 1, 0.05 for attention and logits"
WAYS = {
    FIXED: Way(lessons.WEIGHTS),
    f"{FIXED}, logits at temperature 4": Way({**lessons.WEIGHTS, "temperature": 4.0}),
    f"{FIXED}, logits alone in the last 30 % of the steps": Way(lessons.WEIGHTS, logits_alone=0.3),
    "balanced": Way(lessons.SHARES),
    "balanced, rate 0.0005": Way(lessons.SHARES, rate=FACTORED_RATE / 2),
    "balanced, batches of 16, 1.45 times the steps": Way(lessons.SHARES, batch=16, steps=1.45),
    "balanced, relations": Way(RELATIONS),
    "balanced, relations, rate 0.0005": Way(RELATIONS, rate=FACTORED_RATE / 2),
    "balanced, relations, batches of 64, 0.6 times the steps": Way(RELATIONS, batch=64, steps=0.6),
    "balanced, relations, 80 % of the texts augmented": Way(RELATIONS, augmented=0.8),
    "balanced, relations, layers replaced one by one": Way(RELATIONS, replacing=0.5),
    f"dense, {FIXED}": Way(lessons.WEIGHTS, DENSE_RATE, dense=True),
    "dense, balanced": Way(lessons.SHARES, DENSE_RATE, dense=True),
}


@dataclass(frozen=True)
class Run:
    """A student of a task."""

    task: str
    way: str
    seed: int


@contextmanager
def replacing(student: PreTrainedModel, dense: PreTrainedModel, steps: float) -> Iterator[None]:
    """After Xu et al., "BERT-of-Theseus" (EMNLP 2020): in each step a factored layer computes itself with a probability
    that rises from 0.5 to 1 in so many steps, and otherwise the layer that it came from.
    """
    origins = dict(dense.named_modules())
    layers = {name: module for name, module in student.named_modules() if isinstance(module, KroneckerLinear)}
    for name, layer in layers.items():
        vars(layer)["forward"] = _either(layer, layer.forward, origins[name], steps)
    yield
    for layer in layers.values():
        vars(layer).pop("forward")


def _either(layer: nn.Module, own: Callable[[Any], Any], origin: nn.Module, steps: float) -> Callable[[Any], Any]:
    passes = count()

    def forward(x: Any) -> Any:
        chosen = not layer.training or random.random() < 0.5 + 0.5 * next(passes) / steps
        return own(x) if chosen else origin(x)

    return forward


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    way = WAYS[run.way]
    teacher, dense, tokenizer, lesson = prepared(run.task, options, way.augmented)
    lesson = replace(lesson, batch=way.batch, weights=way.weights, factored_weights=None)
    layers, half = kept_layers(teacher, LAYERS), multiplies_bfloat16()
    if way.dense:
        student, steps = keep_layers(teacher, layers or []), DENSE_STEPS[run.task][0]
    else:
        limit = teacher.base_model.num_parameters() / RATIO
        student = start_of(run.task, dense, limit, lesson, tokenizer, options.work)
        steps = round(way.steps * STEPS[run.task])
    last = round(way.logits_alone * steps)
    with replacing(student, dense, way.replacing * steps) if way.replacing else nullcontext():
        schedule = Schedule(None, steps - last, way.rate, half, run.seed)
        summary = train(student, teacher, lesson, schedule, *watching(teacher, lesson), layers)
    if last:
        lesson = replace(lesson, weights=LOGITS)
        schedule = Schedule(None, last, LOGITS_RATE, half, run.seed + 1)
        train(student, teacher, lesson, schedule, *watching(teacher, lesson), layers)
    quality = compared(run.task, lesson, teacher=teacher, dense=dense, student=student.eval())
    LOG.add(asdict(run), {**quality, "training": summary})


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
        runs = [Run(task, way, seed) for way in options.ways for task in options.tasks for seed in range(options.seeds)]
        LOG.finish(runs, perform, options)
    show(LOG, rows())


if __name__ == "__main__":
    main()
