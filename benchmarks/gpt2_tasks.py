"""SST-2 and CoLA by students of a small GPT-2, factored or with fewer layers, each at its best.

    python benchmarks/gpt2_tasks.py --data DIR --work WORK > benchmarks/logs/gpt2_tasks.txt

WORK is the folder of gpt2_recipes.py, whose teacher is fine-tuned on a task. A student learns the task in 500 steps of
32 texts, in two ways: one of that script's, distilled on text in 400 steps, goes on with its losses and the labels; or
the student comes from the task's teacher, by a plan that is searched on the task's texts or with those three of six
layers that were best on text, and learns without labels, as by `distill --task`. Each way has two learning rates and
one seed; the best of the four on the dev set gets two more seeds. Muon is for factors; a dense student has AdamW alone.
In the log SST-2 has the second way alone, and a teacher that was trained alike on another machine.
Finished runs are lines of logs/gpt2_tasks.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gpt2_recipes
from common import RunLog, example, runs_parser, shuffled_text, spread
from gpt2_recipes import BEST, best_layers
from kngpt2 import RATES, TASK_STEPS, TASKS, fine_tune_teacher, options_of
from rich.console import Console

from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import keep_layers
from kronecker_transformers.experiments.run import teacher_and_tokenizer
from kronecker_transformers.tasks.glue_metric import headline

LOG = RunLog("gpt2_tasks")
STUDENTS = ("searched plan", BEST)
DIRECT = "from the task's teacher; without labels"
WAYS: dict[str, dict[str, Any]] = {
    "from text; ILKD, labels, logits, balanced, Muon": gpt2_recipes.WAYS[gpt2_recipes.ALL],
    DIRECT: {"recipe": "classifier"},
}
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """A student of a task, and how it learns."""

    task: str
    student: str
    way: str
    rate: float
    seed: int = SEEDS[0]


def start(run: Run, layers: list[str], work: Path) -> dict[str, Any]:
    """Where the student comes from."""
    teacher, tokenizer = teacher_and_tokenizer(str(work / f"teacher-{run.task}"))
    if run.way != DIRECT:
        earlier = gpt2_recipes.Run(run.student, gpt2_recipes.ALL, gpt2_recipes.RATE, 0).folder(work)
        return {"start": earlier / "student"}
    if run.student != BEST:
        whole = sum(parameter.numel() for parameter in teacher.base_model.parameters())
        return {"plan": "search", "ratio": whole / gpt2_recipes.PARAMETERS}
    folder = work / f"cut-{run.task}"
    if not folder.exists():
        save_folder(folder, keep_layers(teacher, [int(layer) for layer in layers]), tokenizer)
    return {"start": folder}


def perform(run: Run, options: Any) -> None:
    """Fine-tune and judge one student."""
    fine_tune_teacher(run.task, options.data, options.work)
    layers: list[str] = []
    if run.student == BEST:
        layers = best_layers(options.work, shuffled_text(options.data, options.work)).split(",")
    output = options.work / "-".join(map(str, asdict(run).values()))
    shutil.rmtree(output, ignore_errors=True)
    results = example(
        "run_glue_kd", teacher=options.work / f"teacher-{run.task}", output_dir=output, max_steps=TASK_STEPS,
        learning_rate=run.rate, seed=run.seed, dropout=0, **start(run, layers, options.work),
        **({"layer_map": layers} if layers else {}), **{**options_of(run.task, options.data), **WAYS[run.way]},
    )  # fmt: skip
    LOG.add(asdict(run), {name: results[name] for name in ("metrics", "training", "parameters")})
    shutil.rmtree(output)


def score(run: Run, model: str = "student") -> float | None:
    """Of a finished run, in per cent."""
    line = LOG.find(asdict(run))
    return 100 * headline(run.task, line["metrics"][model])[1] if line else None


def shown(value: float | None) -> str | None:
    """With one digit after the point."""
    return None if value is None else f"{value:.1f}"


def first_runs(task: str, student: str, ways: Iterable[str] = WAYS) -> list[Run]:
    """Every way at every rate."""
    return [Run(task, student, way, rate) for way in ways for rate in RATES]


def best_of(task: str, student: str) -> list[Run]:
    """The best of those that are finished, with every seed; none if none is."""
    scores = {run: found for run in first_runs(task, student) if (found := score(run)) is not None}
    return [replace(max(scores, key=lambda run: scores[run]), seed=seed) for seed in SEEDS] if scores else []


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Students of a small GPT-2 on tasks.", "the models, that of gpt2_recipes.py")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS, help="(default: both)")
    parser.add_argument("--students", nargs="*", default=STUDENTS, choices=STUDENTS, help="(default: both)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="(default: both)")
    options = parser.parse_args()
    if not options.table:
        for task in options.tasks:
            for student in options.students:
                LOG.finish(first_runs(task, student, options.ways), perform, options)
                LOG.finish(best_of(task, student), perform, options)
    rows: dict[str, list[Any]] = {"teacher": [None for _ in TASKS]}
    for student in STUDENTS:
        chosen = [best_of(task, student) for task in TASKS]
        for column, runs in enumerate(chosen):
            rows["teacher"][column] = shown(score(runs[0], "teacher")) if runs else None
        scores = [[score(run) for run in runs] for runs in chosen]
        rows[f"{student}, the best of these, all seeds"] = [
            spread([found for found in some if found is not None]) for some in scores
        ]
        for run in first_runs(TASKS[0], student):
            way = run.way.removesuffix(", Muon") if student == BEST else run.way
            name, both = f"  {student}, {way}", [replace(run, task=task) for task in TASKS]
            rows[f"{name}, as it starts"] = [shown(score(run, "student, undistilled")) for run in both]
            rows[f"{name}, rate {run.rate:g}"] = [shown(score(run)) for run in both]
    console = Console(width=130)
    console.print(LOG.environments(), highlight=False)
    console.print(results_table("GLUE dev, per cent", ["SST-2, accuracy", "CoLA, Matthews"], rows))


if __name__ == "__main__":
    main()
