"""all-mpnet-base-v2 on GLUE, and what its student of 7.7 times fewer parameters keeps: stage 2 of KroneckerBERT.

    python benchmarks/base_glue.py --data DIR --work WORK > benchmarks/logs/base_glue.txt

After base.py, with the same folders; WORK holds the teacher and the student that it distilled as a sentence encoder,
which is stage 1 here (--stage_1). For each task the teacher is fine-tuned once; then a student that starts from stage 1
learns from it with all losses, its factors by Adam, or with --muon by Muon. Everything runs through
examples/run_glue_kd.py, in bfloat16, one run at a time. WORK keeps the teachers; finished runs are lines of
logs/base_glue.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base import fetch
from common import GLUE_TASKS, QUIET, RunLog, example, runs_parser, spread
from rich.console import Console

from kronecker_transformers.display import results_table
from kronecker_transformers.tasks.glue import glue_task
from kronecker_transformers.tasks.glue_metric import headline

LOG = RunLog("base_glue")
TEACHER_EPOCHS = {"sst2": 1}
"""4 of the others."""
STEPS = {"sst2": 1052, "mrpc": 575, "cola": 1068, "rte": 390, "stsb": 720}
"""0.5 epochs, 5, 4, 5 and 4."""
LEARNING_RATE = 2.5e-4
"""Of `distill` for this width; on all-MiniLM-L6-v2 a student that had been distilled took its 1e-3 (glue.py)."""
CHOSEN: dict[str, Any] = {
    "attention_mse_weight": 0.05, "logits_weight": 0.05, "supervised_weight": 0.05,
    "dropout": 0, "warmup_steps": 0.1, "per_device_train_batch_size": 32,
}  # fmt: skip
"""As there."""


@dataclass(frozen=True)
class Run:
    """One student of a task."""

    task: str
    steps: int
    seed: int
    learning_rate: float
    muon: bool


def fine_tune(task: str, options: Any) -> Path:
    """The teacher of a task."""
    target, output = options.work / f"teacher-{task}", options.work / f"fine-tuning-{task}"
    if not target.exists():
        shutil.rmtree(output, ignore_errors=True)
        example(
            "run_glue_kd", teacher=fetch(options.work), task_name=task, data_dir=options.data / "glue",
            output_dir=output, teacher_only=True, teacher_epochs=TEACHER_EPOCHS.get(task, 4),
            teacher_learning_rate=3e-5, per_device_train_batch_size=32, **QUIET,
        )  # fmt: skip
        (output / "teacher").rename(target)
    return target


def perform(run: Run, options: Any) -> None:
    """Train and judge one student."""
    teacher, output = fine_tune(run.task, options), options.work / "-".join(map(str, asdict(run).values()))
    shutil.rmtree(output, ignore_errors=True)
    results = example(
        "run_glue_kd", teacher=teacher, start=options.stage_1, task_name=run.task, data_dir=options.data / "glue",
        output_dir=output, max_steps=run.steps, seed=run.seed, learning_rate=run.learning_rate, muon=run.muon,
        **CHOSEN, **QUIET,
    )  # fmt: skip
    LOG.add(asdict(run), {name: results[name] for name in ("metrics", "training", "parameters")})
    shutil.rmtree(output)


def rows() -> Iterator[tuple[str, list[Any]]]:
    """Teacher, then a row of students for each way to make them, and the share that they keep."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    minutes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    teachers: dict[str, float] = {}
    for line in LOG.lines():
        run = Run(**{name: line[name] for name in Run.__dataclass_fields__})
        metric, value = headline(run.task, line["metrics"]["student"])
        whole = line["metrics"]["teacher"][metric]
        name = f"7.7x, {'Muon' if run.muon else 'Adam'}, rate {run.learning_rate:g}"
        teachers[run.task] = 100 * whole
        scores[name][run.task].append(100 * value)
        shares[name][run.task].append(100 * value / whole)
        minutes[name][run.task].append(line["training"]["seconds"] / 60)
    yield "teacher", [f"{teachers[task]:.1f}" if task in teachers else None for task in GLUE_TASKS]
    for name in scores:
        for title, values in ((name, scores), ("  its share, per cent", shares), ("  minutes of stage 2", minutes)):
            yield f"{title}{'' if title == name else f', {name}'}", [spread(values[name][task]) for task in GLUE_TASKS]


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("A teacher of BERT-base's size on GLUE.", "teachers and students of base.py")
    parser.add_argument("--tasks", nargs="*", default=GLUE_TASKS, choices=GLUE_TASKS, help="(default: all)")
    parser.add_argument("--stage_1", type=Path, help="folder of the distilled student")
    parser.add_argument("--seeds", type=int, default=1, help="of stage 2 (default: %(default)s)")
    parser.add_argument("--muon", action="store_true", help="update the factors by Muon")
    options = parser.parse_args()
    console = Console(width=150)
    if not options.table:
        how = LEARNING_RATE, options.muon
        runs = [Run(task, STEPS[task], seed, *how) for seed in range(options.seeds) for task in options.tasks]
        for run in LOG.missing(runs):
            perform(run, options)
    console.print(LOG.environments(), highlight=False)
    metrics = [f"{task}\n{glue_task(task).headline}" for task in GLUE_TASKS]
    console.print(results_table("GLUE dev, per cent: all-mpnet-base-v2 and students of 7.7x", metrics, dict(rows())))


if __name__ == "__main__":
    main()
