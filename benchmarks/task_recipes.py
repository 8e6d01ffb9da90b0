"""How a classifier's student learns: students of one start, trained for equally many steps in several ways.

    python benchmarks/task_recipes.py --data DIR --work WORK > benchmarks/logs/task_recipes.txt

Teachers, dense students and judgement are those of task_plans.py, whose WORK may be used again; each start is searched
by `search_plan` as it is, of any shapes, and calibrated. The ways differ in the texts (as they are, or half of them
augmented), in the optimizer of the factors and in its rate; the weights of the losses are 1, and 0.05 for attention
scores and logits (task_losses.py tries others). Finished runs are lines of logs/task_recipes.jsonl, and are not made
again. --table shows them without a run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import RunLog, runs_parser, spread
from rich.console import Console
from task_plans import LAYERS, RATIO, compared, prepared, watching
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation.optimizer import FACTORED_RATE as RATE
from kronecker_transformers.experiments import lessons
from kronecker_transformers.experiments.training import Schedule, kept_layers, train
from kronecker_transformers.experiments.watch import multiplies_bfloat16
from kronecker_transformers.tasks.glue import glue_task

LOG = RunLog("task_recipes")
STEPS = {"cola": 2000, "mrpc": 400}


@dataclass(frozen=True)
class Recipe:
    """A way to learn: the share of texts that are augmented, Muon or AdamW, and the learning rate."""

    augmented: float = lessons.AUGMENTED
    muon: bool = True
    rate: float = RATE

    @property
    def name(self) -> str:
        """For tables."""
        texts = f"{100 * self.augmented:g} % of the texts augmented" if self.augmented else "texts as they are"
        return f"{texts}, {'Muon' if self.muon else 'AdamW'}, {self.rate:g}"


RECIPES = (Recipe(0, False), Recipe(0), Recipe(muon=False), Recipe(), Recipe(rate=RATE / 2))


@dataclass(frozen=True)
class Run:
    """A student of a task."""

    task: str
    augmented: float
    muon: bool
    rate: float
    seed: int


def start_of(task: str, dense: PreTrainedModel, limit: float, lesson: Any, tokenizer: Any, work: Path) -> Any:
    """The untrained student, the same for all."""
    target = work / f"start-{task}-{LAYERS}"
    if not target.exists():
        found = search_plan(dense, lesson.calibration, parameters=int(limit), tokenizer=tokenizer)
        compress(dense, found.plan, calibration=lesson.calibration, tokenizer=tokenizer).save_pretrained(target)
    return load_student(str(target))[0].float().requires_grad_(True)


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    teacher, dense, tokenizer, lesson = prepared(run.task, options, run.augmented)
    limit = teacher.base_model.num_parameters() / RATIO
    student = start_of(run.task, dense, limit, lesson, tokenizer, options.work)
    schedule = Schedule(None, STEPS[run.task], run.rate, multiplies_bfloat16(), run.seed)
    lesson = replace(lesson, muon=run.muon, factored_weights=None)
    summary = train(student, teacher, lesson, schedule, *watching(teacher, lesson), kept_layers(teacher, LAYERS))
    quality = compared(run.task, lesson, teacher=teacher, dense=dense, student=student)
    LOG.add(asdict(run), {**quality, "training": summary})


def rows() -> dict[str, list[Any]]:
    """Teacher and dense student, then the ways to learn."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        task = line["task"]
        for name, row in (("teacher", "teacher"), ("dense", f"{LAYERS} of 6 layers, dense")):
            found[row][f"{task} near"] = [line["correlations"][name]]
            found[row][f"{task} score"] = [line["scores"][name]]
        found["start"][f"{task} near"] = [line["training"]["curve"]["values"][0]]
        row = Recipe(line["augmented"], line["muon"], line["rate"]).name
        found[row][f"{task} score"].append(line["scores"]["student"])
        found[row][f"{task} near"].append(line["correlations"]["student"])
    columns = [f"{task} {kind}" for task in STEPS for kind in ("near", "score")]
    return {name: [spread(values[column]) for column in columns] for name, values in found.items()}


def show(log: RunLog, found: dict[str, list[Any]]) -> None:
    """Where the runs of a log were measured, and a table of correlation and score on each task."""
    headings = [f"{task}\n{what}" for task in STEPS for what in ("correlation", glue_task(task).headline)]
    console = Console(width=150)
    console.print(log.environments(), highlight=False)
    console.print(results_table("all-MiniLM-L6-v2 on tasks, students of 7.7x, per cent", headings, found))


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Recipes for classifiers.", "teachers and starts")
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=list(STEPS), choices=list(STEPS), help="(default: both)")
    options = parser.parse_args()
    disable_progress_bar()
    if not options.table:
        recipes, seeds = map(asdict, RECIPES), range(options.seeds)
        runs = [Run(task, **recipe, seed=seed) for recipe in recipes for task in options.tasks for seed in seeds]
        LOG.finish(runs, perform, options)
    show(LOG, rows())


if __name__ == "__main__":
    main()
