"""How much calibration text a start needs: students of one plan, or of a plan searched on the same text.

    python benchmarks/calibration_texts.py --data DIR --work WORK > benchmarks/logs/calibration_texts.txt

Dense students with half of the layers of two teachers, fine-tuned on CoLA, are factored by plans that make them 7.7
times smaller than these: one of low rank with equal shares for all layers, and one that is searched; calibrated on so
many of the task's training sentences, from all over them; then trained for so many steps, if any (--steps). Those of
all-MiniLM-L6-v2 are of task_plans.py, those of all-mpnet-base-v2 of base_rates.py. Judged by the errors of the layers
on held-out text, and by the correlation of the logits with the teacher's on the dev set. WORK keeps teachers and dense
students; finished runs are lines of logs/calibration_texts.jsonl, and are not made again. --table shows them without a
run.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from typing import Any

import base_rates
import common
import task_plans
from common import RunLog, low_rank_plan, runs_parser
from distilled_tasks import BASE, SMALL
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.compression.calibration import largest_inputs
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.classification import load_task
from kronecker_transformers.experiments.lessons import spread
from kronecker_transformers.experiments.training import Schedule, kept_layers, train
from kronecker_transformers.experiments.watch import multiplies_bfloat16
from kronecker_transformers.tasks.glue import glue_task

LOG = RunLog("calibration_texts")
TASK = "cola"
TEXTS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Run:
    """A start, and how long it is trained."""

    teacher: str
    searched: bool
    texts: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """For tables."""
        plan = "searched" if self.searched else "equal shares"
        return f"{self.teacher}, {plan}, {self.texts:,}" + (f", {self.steps:,} steps" if self.steps else "")


def perform(run: Run, options: Any) -> None:
    """Make, train and judge one student."""
    options = copy.copy(options)
    if run.teacher == SMALL:
        options.work = options.work / "small"
    teacher, dense, tokenizer, lesson = (task_plans if run.teacher == SMALL else base_rates).prepared(TASK, options)
    texts = [text for (text,) in spread(load_task(TASK, str(options.data / "glue"), None, None).rows(None), run.texts)]
    ratio = base_rates.ratio_of_rest(teacher, dense)
    base: Any = dense.base_model
    size = base.num_parameters()
    how = {"plan": "search", "ratio": ratio} if run.searched else {"plan": low_rank_plan(base, int(size / ratio))}
    begin = time.monotonic()
    found = compress(dense, **how, calibration=texts, tokenizer=tokenizer)
    seconds = time.monotonic() - begin
    errors = [layer.output_error for layer in found.report.layers if layer.output_error is not None]
    wanted, student = task_plans.judged_logits(teacher, lesson), found.model
    start = task_plans.correlation(wanted, task_plans.judged_logits(student, lesson))
    trained: dict[str, Any] = {}
    if run.steps:
        schedule = Schedule(None, run.steps, None, multiplies_bfloat16(), run.seed)
        kept = kept_layers(teacher, dense.config.num_hidden_layers)
        watch = task_plans.watching(teacher, lesson)
        trained["training"] = train(student.requires_grad_(True), teacher, lesson, schedule, *watch, kept)
        trained |= task_plans.compared(TASK, lesson, teacher=teacher, dense=dense, student=student)
    LOG.add(
        asdict(run),
        {
            "seconds": seconds, "parameters": found.report.factored.parameters,
            "tokens_per_input": sum(len(tokenizer(text).input_ids) for text in texts)
            / largest_inputs(dense.base_model.modules()),
            "layer_error": statistics.mean(errors), "correlation": start, **trained,
        },
    )  # fmt: skip


def rows() -> dict[str, list[Any]]:
    """The starts, then those that were trained, over their seeds."""
    found: dict[Run, list[dict[str, Any]]] = defaultdict(list)
    for line in LOG.lines():
        found[Run(**{field.name: line[field.name] for field in fields(Run)} | {"seed": 0})].append(line)
    table = {}
    for run in sorted(found, key=lambda run: (run.teacher, run.steps, run.searched, run.texts)):
        start, lines = found[run][0], found[run]
        table[run.name] = [
            round(start["tokens_per_input"], 1), round(start["seconds"]), round(start["layer_error"], 2),
            f"{start['correlation']:.1f}",
            common.spread([line["correlations"]["student"] for line in lines if run.steps]),
            common.spread([line["scores"]["student"] for line in lines if run.steps]),
        ]  # fmt: skip
    return table


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Amounts of calibration text.", "teachers and dense students")
    parser.add_argument("--teachers", nargs="*", default=[SMALL, BASE], choices=[SMALL, BASE], help="(default: both)")
    parser.add_argument("--texts", nargs="*", type=int, default=TEXTS, help="(default: %(default)s)")
    parser.add_argument("--searched", action="store_true", help="plans that are searched on the same texts")
    parser.add_argument("--steps", type=int, default=0, help="of training (default: none)")
    parser.add_argument("--seeds", type=int, default=1, help="of training (default: %(default)s)")
    options = parser.parse_args()
    disable_progress_bar()
    if not options.table:
        runs = [
            Run(teacher, options.searched, texts, options.steps, seed)
            for teacher in options.teachers
            for seed in range(options.seeds)
            for texts in options.texts
        ]
        LOG.finish(runs, perform, options)
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    headings = [
        "tokens for\neach input",
        "seconds",
        "error of layers,\nheld-out text",
        "correlation\nat the start",
        "correlation\nafter training",
        glue_task(TASK).headline,
    ]
    console.print(results_table("Students of 7.7x on CoLA, per cent", headings, rows()))


if __name__ == "__main__":
    main()
