"""From whom a factored student learns best: from the teacher, or from the dense student that it was factored from.

    python benchmarks/assistants.py --data DIR --work WORK > benchmarks/logs/assistants.txt

A dense student with half of its teacher's layers is distilled first, then factored by a searched plan, as `distill
--task NAME --layers N --minutes M` does it (0.4 of the minutes for the dense student); then, for the rest of the
minutes on one thread, the factored one learns from its guide: the teacher, or the dense student, which has the same
layers and needs half of the teacher's time ("assistant": Mirzadeh et al., AAAI 2020). Judged as in task_plans.py,
always against the teacher. WORK keeps teachers, dense students and starts; finished runs are lines of
logs/assistants.jsonl, and are not made again; that of all-mpnet-base-v2 by the teacher is the one of base_rates.py, of
the same start. --table shows them without a run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from typing import Any

from base_rates import RATIO, ratio_of_rest
from common import GLUE_TASKS, RunLog, runs_parser, spread
from datasets import disable_progress_bars
from distilled_tasks import BASE, LAYERS, SMALL, fine_tune
from rich.console import Console
from task_plans import compared, watching
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_student, load_teacher
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.lessons import Lesson, task_lesson
from kronecker_transformers.experiments.training import Schedule, kept_layers, shallow, train

LOG = RunLog("assistants")
MINUTES = {SMALL: 15.0, BASE: 20.0}
GUIDES = ("teacher", "dense student")


@dataclass(frozen=True)
class Run:
    """A student of a guide."""

    teacher: str
    task: str
    guide: str
    minutes: float
    seed: int


def prepared(run: Run, options: Any) -> tuple[PreTrainedModel, PreTrainedModel, Any, Lesson]:
    """The teacher, its dense student, the factored student, untrained, and the lesson."""
    folder = options.work / "assistants" / f"{run.teacher}-{run.task}-{run.minutes:g}-{run.seed}"
    source = str(fine_tune(run.teacher, run.task, options)), run.task, str(options.data / "glue")
    loaded, tokenizer, lesson = task_lesson(*source)
    teacher, layers = loaded.float().eval(), LAYERS[run.teacher]
    if not (folder / "start").exists():
        schedule, _ = Schedule(run.minutes, None, None, True, run.seed).divided()
        kept = kept_layers(teacher, layers) or []
        student, _ = shallow(teacher, kept, lesson, schedule, *watching(teacher, lesson))
        student.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        ratio = ratio_of_rest(teacher, student)
        start = compress(student, "search", ratio=ratio, calibration=lesson.calibration, tokenizer=tokenizer)
        start.save_pretrained(folder / "start")
    dense = load_teacher(str(folder / "dense"))[0].float().eval()
    return teacher, dense, load_student(str(folder / "start"))[0].float().requires_grad_(True), lesson


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    teacher, dense, student, lesson = prepared(run, options)
    _, schedule = Schedule(run.minutes, None, None, True, run.seed).divided()
    kept = kept_layers(teacher, LAYERS[run.teacher])
    guide, layers = (teacher, kept) if run.guide == "teacher" else (dense, None)
    summary = train(student, guide, lesson, schedule, *watching(teacher, lesson), layers)
    quality = compared(run.task, lesson, teacher=teacher, dense=dense, student=student)
    LOG.add(asdict(run), {**quality, "training": summary})


def rows() -> dict[str, list[Any]]:
    """Of each teacher and task: dense student and start, then the guides."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        run = Run(**{field.name: line[field.name] for field in fields(Run)})
        where = f"{run.teacher}, {run.task}, {run.minutes:g} minutes"
        for name in ("teacher", "dense"):
            values = found[f"{where}: {name}"]
            values[f"score {run.seed}"] = [line["scores"][name]]
            values[f"near {run.seed}"] = [line["correlations"][name]]
        values = found[f"{where}, by the {run.guide}"]
        values[f"score {run.seed}"] = [line["scores"]["student"]]
        values[f"near {run.seed}"] = [line["correlations"]["student"]]
        values[f"start {run.seed}"] = [line["training"]["curve"]["values"][0]]
        values[f"steps {run.seed}"] = [line["training"]["steps"]]
    table = {}
    for name, values in found.items():
        columns: dict[str, list[float]] = defaultdict(list)
        for key, value in values.items():
            columns[key.split()[0]] += value
        table[name] = [spread(columns["steps"], 0)] + [spread(columns[c]) for c in ("start", "near", "score")]
    return table


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Guides of factored students.", "teachers, dense students and starts")
    parser.add_argument("--teacher", default=SMALL, choices=list(LAYERS), help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=["cola"], choices=GLUE_TASKS, help="(default: %(default)s)")
    parser.add_argument("--guides", nargs="*", default=GUIDES, choices=GUIDES, help="(default: both)")
    parser.add_argument("--minutes", type=float, help="(default: 15, and 20 for the larger teacher)")
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if not options.table:
        minutes = options.minutes or MINUTES[options.teacher]
        runs = [
            Run(options.teacher, task, guide, minutes, seed)
            for seed in range(options.seeds)
            for task in options.tasks
            for guide in options.guides
        ]
        LOG.finish(runs, perform, options)
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    headings = ["steps", "correlation\nat the start", "correlation\nafter training", "score"]
    console.print(results_table(f"Students of {RATIO:g}x, per cent", headings, rows()))


if __name__ == "__main__":
    main()
