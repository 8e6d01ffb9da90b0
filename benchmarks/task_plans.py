"""What counts in the search of a classifier's plan: students of equal size, trained for equally many steps.

    python benchmarks/task_plans.py --data DIR --work WORK > benchmarks/logs/task_plans.txt

DIR holds the folder glue (the official files). The teacher is all-MiniLM-L6-v2, fine-tuned on CoLA and on MRPC as in
glue.py. A dense student with three of its six layers is distilled first, as `distill --layers 3` does it, then factored
by plans that make it 7.7 times smaller than the teacher, and distilled once more. The plans are of low rank, so that
they differ in nothing but their ranks: the best by what is lost in the logits or in the last hidden states, where the
influence of a layer is measured with all of its probe's error or with a part of it; and equal shares of all layers,
without a search. Judged by the correlation of logits with the teacher's (of their differences, for two classes), and by
the task's own metric, on its dev set. The runs of the log learned labels too, from texts as they are, by AdamW. WORK
keeps teachers and dense students; finished runs are lines of logs/task_plans.jsonl, and are not made again. --table
shows them without a run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import RunLog, low_rank_plan, runs_parser, spread
from datasets import Dataset, disable_progress_bars
from glue import fine_tune
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_teacher
from kronecker_transformers.compression import candidates, outputs
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments import lessons
from kronecker_transformers.experiments.lessons import Lesson, task_lesson
from kronecker_transformers.experiments.run import predict
from kronecker_transformers.experiments.training import Schedule, kept_layers, shallow, train
from kronecker_transformers.experiments.watch import Watch, multiplies_bfloat16
from kronecker_transformers.tasks.glue import glue_task

LOG = RunLog("task_plans")
RATIO, LAYERS = 7.7, 3
STEPS = {"cola": (700, 600), "mrpc": (300, 300)}
"""Of the dense student, and of the factored one."""
PLANS = {
    "logits, whole error": (False, 1.0),
    "hidden states, whole error": (True, 1.0),
    "logits, a quarter of it": (False, 0.25),
    "hidden states, a quarter of it": (True, 0.25),
    "equal shares": None,
}
"""Whether hidden states count where there are few outputs, and the share of the probe's error."""


@dataclass(frozen=True)
class Run:
    """A student of a task."""

    task: str
    plan: str
    seed: int


def dense_student(task: str, teacher: PreTrainedModel, tokenizer: Any, lesson: Lesson, work: Path) -> PreTrainedModel:
    """The one with fewer layers, the same for all plans."""
    target = work / f"dense-{task}-{LAYERS}"
    if not target.exists():
        schedule = Schedule(None, STEPS[task][0], None, multiplies_bfloat16(), 0)
        student, _ = shallow(teacher, kept_layers(teacher, LAYERS) or [], lesson, schedule, *watching(teacher, lesson))
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return load_teacher(str(target))[0].float().eval()


def watching(teacher: PreTrainedModel, lesson: Lesson) -> tuple[Watch, Any]:
    """What is told while a student learns."""
    say = partial(print, file=sys.stderr, flush=True)
    wanted = judged_logits(teacher, lesson)
    return Watch(lambda model: {"correlation": correlation(wanted, judged_logits(model, lesson))}, say), say


def judged_logits(model: PreTrainedModel, lesson: Lesson) -> np.ndarray:
    """One number for each example of the dev set."""
    logits = np.stack(predict(model, Dataset.from_list(list(lesson.held_out)), lesson.collate)["logits"])
    return logits[:, -1] - logits[:, 0]


def correlation(wanted: np.ndarray, found: np.ndarray) -> float:
    """In per cent."""
    return 100 * float(np.corrcoef(wanted, found)[0, 1])


def plan_of(name: str, dense: PreTrainedModel, limit: float, lesson: Lesson, tokenizer: Any) -> Mapping[str, Any]:
    """The plan by this rule, for so many parameters of the base model."""
    how = PLANS[name]
    if how is None:
        return low_rank_plan(dense.base_model, int(limit))
    states, step = how
    few = outputs.has_few_outputs if states else (lambda model: False)
    with (
        patch.object(candidates, "STEP", step),
        patch.object(candidates, "has_few_outputs", few),
        patch.object(outputs, "has_few_outputs", few),
    ):
        found = search_plan(dense, lesson.calibration, parameters=int(limit), low_rank=True, tokenizer=tokenizer)
    return found.plan


def prepared(task: str, options: Any, augmented: float = lessons.AUGMENTED) -> tuple[Any, PreTrainedModel, Any, Lesson]:
    """The teacher of a task, its dense student, their tokenizer, and the lesson, with this share of texts augmented."""
    fine_tune(task, options.data, options.work)
    source = str(options.work / f"teacher-{task}"), task, str(options.data / "glue")
    loaded, tokenizer, lesson = task_lesson(*source)
    teacher = loaded.float().eval()
    dense = dense_student(task, teacher, tokenizer, lesson, options.work)
    if augmented != lessons.AUGMENTED:
        with patch.object(lessons, "AUGMENTED", augmented):
            _, _, lesson = task_lesson(*source)
    return teacher, dense, tokenizer, lesson


def compared(task: str, lesson: Lesson, **models: PreTrainedModel) -> dict[str, dict[str, float]]:
    """In per cent, of each model: the task's metric, and the correlation of its logits with the teacher's."""
    metric, wanted = glue_task(task).headline, judged_logits(models["teacher"], lesson)
    assert lesson.scores is not None
    return {
        "scores": {name: 100 * lesson.scores(model)[metric] for name, model in models.items()},
        "correlations": {name: correlation(wanted, judged_logits(model, lesson)) for name, model in models.items()},
    }


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    teacher, dense, tokenizer, lesson = prepared(run.task, options)
    plan = plan_of(run.plan, dense, teacher.base_model.num_parameters() / RATIO, lesson, tokenizer)
    result = compress(dense, plan, calibration=lesson.calibration, tokenizer=tokenizer)
    student: Any = result.model.requires_grad_(True)
    schedule = Schedule(None, STEPS[run.task][1], None, multiplies_bfloat16(), run.seed)
    summary = train(student, teacher, lesson, schedule, *watching(teacher, lesson), kept_layers(teacher, LAYERS))
    quality = compared(run.task, lesson, teacher=teacher, dense=dense, student=student)
    rank = student.base_model.get_input_embeddings().A.shape[1]
    LOG.add(
        asdict(run),
        {**quality, "embedding_rank": rank, "training": summary,
         "parameters": student.base_model.num_parameters()},
    )  # fmt: skip


def rows() -> dict[str, list[Any]]:
    """Teacher and dense student, then the kinds of plans."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        task, plan = line["task"], line["plan"]
        for name in ("teacher", "dense"):
            row = "teacher" if name == "teacher" else f"{LAYERS} of 6 layers, dense"
            found[row][f"{task} score"] = [line["scores"][name]]
            found[row][f"{task} near"] = [line["correlations"][name]]
        found[plan][f"{task} score"].append(line["scores"]["student"])
        found[plan][f"{task} near"].append(line["correlations"]["student"])
        found[plan][f"{task} start"].append(line["training"]["curve"]["values"][0])
        found[plan][f"{task} rank"] = [line["embedding_rank"]]
    columns = [f"{task} {kind}" for task in STEPS for kind in ("rank", "start", "near", "score")]
    return {name: [spread(values[column]) for column in columns] for name, values in found.items()}


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Plans for classifiers.", "teachers and dense students")
    parser.add_argument(
        "--seeds", type=int, default=1, help="of the factored student's training (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="*", default=list(STEPS), choices=list(STEPS), help="(default: both)")
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if not options.table:
        runs = [Run(task, plan, seed) for seed in range(options.seeds) for task in options.tasks for plan in PLANS]
        LOG.finish(runs, perform, options)
    headings = [
        f"{task}\n{what}"
        for task in STEPS
        for what in ("embedding's rank", "correlation, start", "correlation", glue_task(task).headline)
    ]
    console = Console(width=170)
    console.print(LOG.environments(), highlight=False)
    console.print(results_table("all-MiniLM-L6-v2 on tasks, students of 7.7x, per cent", headings, rows()))


if __name__ == "__main__":
    main()
