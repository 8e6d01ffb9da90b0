"""KnGPT2's claims at a small scale: a factored student against one with half of the layers, and distillation or none.

    python benchmarks/kngpt2.py --data DIR --work WORK

DIR holds the folders glue (the official files) and text. The teacher is a GPT-2 of 6 layers and hidden size 384 with a
byte-level BPE of 13,824 entries, both trained here on the text. Its students, of 11.04 M and 11.03 M parameters, learn
from it on the same data for the same steps: one has its odd layers and its embedding factored by 2 with a tied head, as
KnGPT2; the other every second layer only, as DistilGPT2. Then all are fine-tuned on SST-2 and CoLA, the students with
and without distillation of intermediate layers (ILKD), each at two learning rates; the better one by the dev score gets
two more seeds. Claims: the factored student wins, and ILKD helps. The paper does not print the weights of the terms;
with all 1, that of hidden states outweighs the labels' loss by far, so the factored student is also tried, with
one seed, at 0.01 for it. Students are trained two at a time with one thread each. WORK keeps the models; finished runs
are lines of logs/kngpt2.jsonl and are not run again. --table shows them without a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import QUIET, RunLog, example, in_parallel, runs_parser, shuffled_text, spread
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.display import results_table
from kronecker_transformers.tasks.glue_metric import headline
from kronecker_transformers.tasks.language_modeling import block_examples
from kronecker_transformers.tasks.text import TextSource, TextStream

LOG = RunLog("kngpt2")
VOCABULARY, LAYERS, HIDDEN, HEADS, LENGTH = 13_824, 6, 384, 6, 256
TEACHER_STEPS, STUDENT_STEPS, TASK_STEPS = 900, 400, 500
STUDENTS: dict[str, dict[str, Any]] = {"KnGPT2-style": {"plan": "kngpt2"}, "DistilGPT2-style": {"layers": "1,3,5"}}
TASKS = ("sst2", "cola")
RATES = (3e-4, 1e-3)
SEEDS = (0, 1, 2)
BALANCED = "ILKD, hidden states at 0.01"
METHODS: dict[str, dict[str, float]] = {
    "ILKD": {},
    BALANCED: {"hidden_mse_weight": 0.01},
    "labels only": {f"{term}_weight": 0 for term in ("embedding_mse", "attention_kl", "hidden_mse")},
}


def train_teacher(data: Path, folder: Path) -> None:
    """A tokenizer and a GPT-2 from scratch; goes on from its last checkpoint."""
    if folder.exists():
        return
    checkpoints = folder.with_name("teacher_checkpoints")
    set_seed(0)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = shuffled_text(data, folder.parent)
    tokenizer.train([str(text)], trainer)
    files = folder.with_name("tokenizer")
    files.mkdir(exist_ok=True)
    tokenizer.model.save(str(files))
    gpt2_tokenizer = GPT2Tokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_layer=LAYERS, n_embd=HIDDEN, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        str(checkpoints), max_steps=TEACHER_STEPS, per_device_train_batch_size=16, learning_rate=1e-3,
        warmup_steps=100, lr_scheduler_type="cosine", weight_decay=0.1, save_steps=250, save_total_limit=2,
        report_to=[], logging_steps=100, disable_tqdm=True, dataloader_pin_memory=False, bf16=QUIET["bf16"],
        use_cpu=QUIET["use_cpu"],
    )  # fmt: skip
    source = TextSource((str(text),))
    blocks = TextStream(lambda seed, share: block_examples(source, gpt2_tokenizer, LENGTH, share))
    Trainer(model, arguments, train_dataset=blocks, data_collator=default_data_collator).train(
        resume_from_checkpoint=any(checkpoints.glob("checkpoint-*"))
    )
    model.config.use_cache = True
    save_folder(folder, model, gpt2_tokenizer)


def distil(name: str, data: Path, work: Path) -> None:
    """Light pre-training of a student, and perplexities."""
    key = {"student": name, "stage": "clm"}
    if LOG.find(key) and (work / name / "student").exists():
        return
    shutil.rmtree(work / name, ignore_errors=True)
    results = example(
        "run_clm_kd", recipe="kngpt2", teacher=work / "teacher", train_text=shuffled_text(data, work),
        output_dir=work / name, max_length=LENGTH, validation_text=data / "text" / "wikitext2_valid.txt",
        window=LENGTH, stride=LENGTH * 3 // 4, normalisation="wikitext", max_steps=STUDENT_STEPS,
        per_device_train_batch_size=16, learning_rate=1e-3, dropout=0, **STUDENTS[name], **QUIET,
    )  # fmt: skip
    if not LOG.find(key):
        del results["options"]  # they name folders of the machine that ran it
        LOG.add(key, results)


def settings(task: str) -> Iterator[dict[str, Any]]:
    """Every student of a task with every method."""
    for name in STUDENTS:
        for method in METHODS:
            if method != BALANCED or name == "KnGPT2-style":
                yield {"student": name, "stage": task, "method": method}


def score(run: dict[str, Any], model: str = "student") -> float | None:
    """What a finished run ended with, in per cent."""
    line = LOG.find(run)
    return 100 * headline(run["stage"], line["metrics"][model])[1] if line else None


def better_rate(setting: dict[str, Any]) -> float:
    """The learning rate with the higher dev score at the first seed."""
    return max(RATES, key=lambda rate: score({**setting, "rate": rate, "seed": SEEDS[0]}) or 0.0)


def fine_tune_teacher(task: str, data: Path, work: Path) -> None:
    """The teacher of a task."""
    target, output = work / f"teacher-{task}", work / f"fine-tuning-{task}"
    if target.exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    example("run_glue_kd", teacher=work / "teacher", output_dir=output, teacher_only=True, **options_of(task, data))
    (output / "teacher").rename(target)


def options_of(task: str, data: Path) -> dict[str, Any]:
    """What teachers and students of a task share."""
    return {
        "task_name": task, "data_dir": data / "glue", "recipe": "kngpt2", "per_device_train_batch_size": 32,
        "teacher_epochs": 1 if task == "sst2" else 4, "teacher_learning_rate": 3e-4, **QUIET,
    }  # fmt: skip


def fine_tune(run: dict[str, Any], data: Path, work: Path) -> None:
    """A task for one student, with one method, at one learning rate and seed."""
    if LOG.find(run):
        return
    name, task = run["student"], run["stage"]
    output = work / "-".join(map(str, run.values()))
    shutil.rmtree(output, ignore_errors=True)
    results = example(
        "run_glue_kd", teacher=work / f"teacher-{task}", output_dir=output, start=work / name / "student",
        max_steps=TASK_STEPS, learning_rate=run["rate"], seed=run["seed"], dropout=0, **options_of(task, data),
        **({"layer_map": [1, 3, 5]} if name == "DistilGPT2-style" else {}), **METHODS[run["method"]],
    )  # fmt: skip
    LOG.add(run, {name: results[name] for name in ("metrics", "training", "parameters")})
    shutil.rmtree(output)


def perplexities() -> Table:
    """The teacher, and each student before and after its distillation."""
    rows: dict[str, list[Any]] = {}
    headings: list[str] = []
    for name in STUDENTS:
        line = LOG.find({"student": name, "stage": "clm"})
        if line is None:
            continue
        headings = list(line["rows"])
        for model, *values in zip(line["models"], *line["rows"].values(), strict=True):
            rows[model if model == "teacher" else f"{name}: {model}"] = values
    return results_table("WikiText-2, validation", headings, rows)


def scores() -> Table:
    """Both tasks: each setting at its better rate over the seeds, and at each rate with the first seed."""
    rows: dict[str, list[Any]] = {"teacher": [score({"stage": task}, "teacher") for task in TASKS]}
    for pair in zip(*map(settings, TASKS), strict=True):
        name = f"{pair[0]['student']}, {pair[0]['method']}"
        best = [[score({**setting, "rate": better_rate(setting), "seed": seed}) for seed in SEEDS] for setting in pair]
        rows[name] = [spread([value for value in values if value is not None]) for values in best]
        for rate in RATES:
            first = [score({**setting, "rate": rate, "seed": SEEDS[0]}) for setting in pair]
            rows[f"  {name}, rate {rate:g}, one seed"] = first
    return results_table("GLUE dev, per cent", ["SST-2, accuracy", "CoLA, Matthews"], rows)


def main() -> None:
    """Run what is missing, then show the tables."""
    options = runs_parser("KnGPT2's claims at a small scale.", "the models").parse_args()
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        train_teacher(options.data, options.work / "teacher")
        places = {"data": options.data, "work": options.work}
        first = [partial(distil, name, **places) for name in STUDENTS]
        in_parallel([*first, *(partial(fine_tune_teacher, task, **places) for task in TASKS)], options.processes)
        runs = [setting for task in TASKS for setting in settings(task)]
        tried = [{**setting, "rate": rate, "seed": SEEDS[0]} for setting in runs for rate in RATES]
        in_parallel([partial(fine_tune, run, **places) for run in tried], options.processes)
        more = [
            {**setting, "rate": better_rate(setting), "seed": seed}
            for setting in runs for seed in SEEDS[1:] if setting["method"] != BALANCED
        ]  # fmt: skip
        in_parallel([partial(fine_tune, run, **places) for run in more], options.processes)
    console = Console(width=110)
    console.print(LOG.environments(), highlight=False)
    console.print(perplexities())
    console.print(scores())


if __name__ == "__main__":
    main()
