"""What a product of their own for frequent words is worth to classifiers: students of equal size and equal steps.

    python benchmarks/frequent_words.py --data DIR --work WORK > benchmarks/logs/frequent_words.txt

Teachers, dense students and judges are those of task_plans.py; the plans are searched, 7.7 times smaller than the
teacher, once without frequent words in the embedding and once with them, and the students learn as in
`distill --task`. WORK keeps teachers and dense students; finished runs are lines of logs/frequent_words.jsonl, and are
not made again. --table shows them without a run.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

from common import RunLog, runs_parser, spread
from datasets import disable_progress_bars
from rich.console import Console
from task_plans import LAYERS, RATIO, STEPS, compared, prepared, watching
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.compression import candidates
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.training import Schedule, kept_layers, train
from kronecker_transformers.experiments.watch import multiplies_bfloat16
from kronecker_transformers.tasks.glue import glue_task

LOG = RunLog("frequent_words")


@dataclass(frozen=True)
class Run:
    """A student of a task."""

    task: str
    frequent_words: bool
    seed: int


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    teacher, dense, tokenizer, lesson = prepared(run.task, options)
    base: Any = dense.base_model
    ratio = RATIO * base.num_parameters() / teacher.base_model.num_parameters()
    none: Any = patch.object(candidates, "_with_frequent_words", lambda W, weights: [])
    with nullcontext() if run.frequent_words else none:
        result = compress(
            dense, "search", ratio=ratio, calibration=lesson.calibration, counted=lesson.counted, tokenizer=tokenizer
        )
    student: Any = result.model.requires_grad_(True)
    schedule = Schedule(None, STEPS[run.task][1], None, multiplies_bfloat16(), run.seed)
    summary = train(student, teacher, lesson, schedule, *watching(teacher, lesson), kept_layers(teacher, LAYERS))
    table = student.base_model.get_input_embeddings()
    LOG.add(
        asdict(run),
        {**compared(run.task, lesson, teacher=teacher, dense=dense, student=student), "embedding": table.entry,
         "embedding_parameters": sum(p.numel() for p in table.parameters()), "training": summary,
         "parameters": student.base_model.num_parameters()},
    )  # fmt: skip


def rows() -> dict[str, list[Any]]:
    """Teacher and dense student, then both kinds of plans."""
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        task, name = line["task"], "frequent words" if line["frequent_words"] else "without"
        for model, row in (("teacher", "teacher"), ("dense", f"{LAYERS} of 6 layers, dense")):
            found[row][f"{task} score"] = [line["scores"][model]]
            found[row][f"{task} near"] = [line["correlations"][model]]
        found[name][f"{task} score"].append(line["scores"]["student"])
        found[name][f"{task} near"].append(line["correlations"]["student"])
        found[name][f"{task} start"].append(line["training"]["curve"]["values"][0])
        found[name][f"{task} size"] = [line["embedding_parameters"] / 1e6]
    columns = [f"{task} {kind}" for task in STEPS for kind in ("size", "start", "near", "score")]
    return {name: [spread(values[column]) for column in columns] for name, values in found.items()}


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Frequent words of classifiers.", "teachers and dense students")
    parser.add_argument("--seeds", type=int, default=2, help="of the students' training (default: %(default)s)")
    parser.add_argument("--tasks", nargs="*", default=list(STEPS), choices=list(STEPS), help="(default: both)")
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if not options.table:
        kinds = [(task, own) for task in options.tasks for own in (False, True)]
        LOG.finish([Run(*kind, seed) for seed in range(options.seeds) for kind in kinds], perform, options)
    headings = [
        f"{task}\n{what}"
        for task in STEPS
        for what in ("embedding, M", "correlation, start", "correlation", glue_task(task).headline)
    ]
    console = Console(width=170)
    console.print(LOG.environments(), highlight=False)
    console.print(results_table("all-MiniLM-L6-v2 on tasks, students of 7.7x, per cent", headings, rows()))


if __name__ == "__main__":
    main()
