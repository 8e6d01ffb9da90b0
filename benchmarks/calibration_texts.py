"""How much calibration text a start needs: students of one plan, or of a plan searched on the same text, untrained.

    python benchmarks/calibration_texts.py --data DIR --work WORK > benchmarks/logs/calibration_texts.txt

Dense students with half of the layers of two teachers, fine-tuned on CoLA, are factored by plans that make them 7.7
times smaller than these: one of low rank with equal shares for all layers, and one that is searched; calibrated on so
many of the task's training sentences, from all over them. Those of all-MiniLM-L6-v2 are of task_plans.py, those of
all-mpnet-base-v2 of base_rates.py. Judged by the errors of the layers on held-out text, and by the correlation of the
logits with the teacher's on the dev set. WORK keeps teachers and dense students; finished runs are lines of
logs/calibration_texts.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import base_rates
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

LOG = RunLog("calibration_texts")
TASK = "cola"
TEXTS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Run:
    """A start."""

    teacher: str
    searched: bool
    texts: int


def perform(run: Run, options: Any) -> None:
    """Make and judge one start."""
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
    wanted = task_plans.judged_logits(teacher, lesson)
    LOG.add(
        asdict(run),
        {
            "seconds": seconds, "parameters": found.report.factored.parameters,
            "tokens_per_input": sum(len(tokenizer(text).input_ids) for text in texts)
            / largest_inputs(dense.base_model.modules()),
            "layer_error": statistics.mean(errors),
            "correlation": task_plans.correlation(wanted, task_plans.judged_logits(found.model, lesson)),
        },
    )  # fmt: skip


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Amounts of calibration text.", "teachers and dense students")
    parser.add_argument("--teachers", nargs="*", default=[SMALL, BASE], choices=[SMALL, BASE], help="(default: both)")
    parser.add_argument("--texts", nargs="*", type=int, default=TEXTS, help="(default: %(default)s)")
    parser.add_argument("--searched", action="store_true", help="plans that are searched on the same texts")
    options = parser.parse_args()
    disable_progress_bar()
    if not options.table:
        runs = [Run(teacher, options.searched, texts) for teacher in options.teachers for texts in options.texts]
        LOG.finish(runs, perform, options)
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    headings = [
        "texts",
        "tokens for\neach input",
        "seconds",
        "error of layers,\nheld-out text",
        "correlation,\nper cent",
    ]
    rows = {
        f"{line['teacher']}, {'searched' if line['searched'] else 'equal shares'}, {line['texts']:,}": [
            line["texts"], round(line["tokens_per_input"], 1), round(line["seconds"]), round(line["layer_error"], 2),
            round(line["correlation"], 1),
        ]
        for line in sorted(LOG.lines(), key=lambda line: (line["teacher"], line["searched"], line["texts"]))
    }  # fmt: skip
    console.print(results_table("Starts of students of 7.7x on CoLA", headings, rows))


if __name__ == "__main__":
    main()
