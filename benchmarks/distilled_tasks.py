"""Two teachers on GLUE, and what their students keep that the command `distill --task` makes as it is.

    python benchmarks/distilled_tasks.py --data DIR --work WORK > benchmarks/logs/distilled_tasks.txt

DIR holds the folder glue (the official files). The teachers are all-MiniLM-L6-v2 and, of BERT-base's size,
all-mpnet-base-v2 (base.py fetches it), fine-tuned once for each task (examples/run_glue_kd.py); then a student of each
is made by the package's `distill`: a dense one with half of the layers first, then one whose plan is searched on it and
whose factors are calibrated on the task's texts; trained for so many minutes in all (--minutes). The runs of the log
had one thread each, other work on the other core, and were calibrated on 512 texts (CoLA with the larger teacher: 541,
for 60 minutes 2,170), where `distill` reads more of short ones now; those of the smaller teacher on the first texts of
the training set, where `distill` takes them from all over it. Of the larger teacher MRPC, RTE and STS-B are older:
these students learned labels too, on texts as they are, by AdamW, and have plans of the search as it was before
task_plans.py.
WORK keeps the teachers; finished runs are lines of logs/distilled_tasks.jsonl, and are not made again. --table shows
them without a run, and the curves of students on a fifth of the dev set.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import glue
from base import fetch
from common import GLUE_TASKS, QUIET, RunLog, example, runs_parser, spread
from encoders import show_curve
from rich.console import Console

from kronecker_transformers import distill
from kronecker_transformers.display import results_table
from kronecker_transformers.hub.files import RESULTS_FILE
from kronecker_transformers.tasks.glue import glue_task, load_glue

LOG = RunLog("distilled_tasks")
SMALL, BASE = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
LAYERS = {SMALL: 3, BASE: 6}
"""Of the students: half of the teacher's."""
TEACHER_EPOCHS = {"cola": 4, "mrpc": 4, "rte": 3, "stsb": 3, "sst2": 1}
SAMPLES = {"sst2": 10_000}
"""Training examples of the larger teacher, at most."""


@dataclass(frozen=True)
class Run:
    """One student of a teacher on a task."""

    teacher: str
    task: str
    ratio: float
    layers: int
    minutes: float
    seed: int

    @property
    def name(self) -> str:
        """For tables; without teacher, task and seed."""
        return f"{self.ratio:g}x, {self.layers} layers, {self.minutes:g} minutes"


def fine_tune(teacher: str, task: str, options: Any) -> Path:
    """The teacher of a task."""
    if teacher == SMALL:
        work = options.work / "small"
        work.mkdir(parents=True, exist_ok=True)
        glue.fine_tune(task, options.data, work)
        return Path(work) / f"teacher-{task}"
    target, output = options.work / f"teacher-{task}", options.work / f"fine-tuning-{task}"
    if not target.exists():
        shutil.rmtree(output, ignore_errors=True)
        example(
            "run_glue_kd", teacher=fetch(options.work), task_name=task, data_dir=options.data / "glue",
            output_dir=output, teacher_only=True, teacher_epochs=TEACHER_EPOCHS[task],
            teacher_learning_rate=3e-5, per_device_train_batch_size=32, **QUIET,
            **({"max_train_samples": SAMPLES[task]} if task in SAMPLES else {}),
        )  # fmt: skip
        (output / "teacher").rename(target)
        shutil.rmtree(output)
    return target


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    folder = options.work / "students" / "-".join(map(str, asdict(run).values()))
    shutil.rmtree(folder, ignore_errors=True)
    distill(
        fine_tune(run.teacher, run.task, options), output=folder, task=run.task, data_dir=str(options.data / "glue"),
        ratio=run.ratio, layers=run.layers, minutes=run.minutes, seed=run.seed, bf16=True,
        show=partial(print, file=sys.stderr, flush=True),
    )  # fmt: skip
    record = json.loads((folder / RESULTS_FILE).read_text())
    results = {name: record.get(name) for name in ("models", "rows", "dense_training", "training")}
    LOG.add(asdict(run), {**results, "chance": chance(run.task, options.data / "glue")})


def chance(task: str, data: Path) -> float:
    """What the dev set gives to an answer that is always the same: the share of its more frequent class, or 0."""
    if glue_task(task).headline != "accuracy":
        return 0.0
    labels = load_glue(task, data, ["validation"])["validation"]["label"][:]
    return max(map(labels.count, set(labels))) / len(labels)


def run_of(line: dict[str, Any]) -> Run:
    """The run of a line of the log."""
    return Run(**{field.name: line[field.name] for field in fields(Run)})


def rows(teacher: str) -> Iterator[tuple[str, list[Any]]]:
    """A teacher; then for each kind of student its scores, what it keeps, and what it keeps of the way from chance."""
    teachers: dict[str, dict[str, None]] = defaultdict(dict)  # of one task there may be two, fine-tuned apart
    lucky: dict[str, str] = {}
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in LOG.lines():
        run = run_of(line)
        if run.teacher != teacher:
            continue
        scores = line["rows"][glue_task(run.task).headline]
        whole, score, luck = scores[0], scores[-1], line["chance"]
        teachers[run.task][f"{100 * whole:.1f}"] = None
        lucky[run.task] = f"{100 * luck:.1f}"
        values = {
            "": score, "share of the teacher's": score / whole,
            "share of its way from chance": (score - luck) / (whole - luck),
        }  # fmt: skip
        for name, value in values.items():
            found[run.name][name][run.task].append(100 * value)
    yield "teacher", [", ".join(teachers[task]) or None for task in GLUE_TASKS]
    yield "majority class", [lucky.get(task) for task in GLUE_TASKS]
    for run_name, values_of in found.items():
        for name, shares in values_of.items():
            yield f"  {name}, {run_name}" if name else run_name, [spread(shares[task]) for task in GLUE_TASKS]


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Students by the command distill on GLUE.", "teachers and students")
    parser.add_argument("--teacher", default=SMALL, choices=list(LAYERS), help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=GLUE_TASKS, choices=GLUE_TASKS, help="(default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="of students (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=7.7, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the student (default: half of the teacher's)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of its training (default: %(default)s)")
    parser.add_argument("--teachers", action="store_true", help="only fine-tune the teachers")
    options = parser.parse_args()
    if options.teachers:
        for task in options.tasks:
            fine_tune(options.teacher, task, options)
        return
    if not options.table:
        how = options.ratio, options.layers or LAYERS[options.teacher], options.minutes
        runs = [Run(options.teacher, task, *how, seed) for seed in range(options.seeds) for task in options.tasks]
        for run in LOG.missing(runs):
            perform(run, options)
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    metrics = [f"{task}\n{glue_task(task).headline}" for task in GLUE_TASKS]
    for teacher in LAYERS:
        title = f"GLUE dev, per cent: {teacher} and its students"
        console.print(results_table(title, metrics, dict(rows(teacher))))
    for line in LOG.lines():
        for what, part in (("dense", "dense_training"), ("factored", "training")):
            title = f"{line['teacher']}, {line['task']}, {run_of(line).name}, seed {line['seed']}, {what}"
            show_curve(console, title, {"training": line[part] or {}})


if __name__ == "__main__":
    main()
