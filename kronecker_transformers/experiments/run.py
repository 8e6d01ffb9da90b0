"""What the examples share: resumable output folders, fine-tuning, prediction."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..checkpoint.files import check_new_folder, to_json, write_text
from ..checkpoint.load import load_teacher, save_folder
from ..display import console
from ..distillation.arguments import DistillationArguments
from ..distillation.checkpoints import is_complete
from ..distillation.contexts import unchanged_cache, unchanged_forward
from ..distillation.sampling import SamplingTrainer
from ..distillation.trainer import DistillationTrainer
from ..evaluation.timing import environment
from ..models.kronecker_family import longest_sequence
from ..modes import evaluating

Collator = Callable[[list[Any]], dict[str, Any]]
"""Makes a batch of tensors from examples."""

logger = logging.getLogger(__name__)

STUDENT, TEACHER = "student", "teacher"
"""Folders of an experiment: the finished student, and the teacher where it was trained here."""


def check_output(folder: str | Path, resume: str | bool | None) -> Path:
    """The folder of an experiment, before long work begins.

    Args:
        folder: where it is to be.
        resume: `resume_from_checkpoint` of its training.

    Raises:
        FileExistsError: it holds something and is not to be resumed, or already holds a finished student.
        PermissionError: it could not be made.
    """
    if not resume:
        return check_new_folder(folder)
    check_new_folder(Path(folder) / STUDENT)
    return Path(folder)


def teacher_and_tokenizer(source: str, head: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_teacher`, for a teacher that must have its tokenizer; in float32, as the student will train in.

    Raises:
        ValueError, OSError: as there; or no tokenizer.
    """
    teacher, tokenizer = load_teacher(source, head)
    if tokenizer is None:
        raise ValueError(f"teacher {source!r} comes without a tokenizer; save its tokenizer in the same folder")
    return teacher.float(), tokenizer


def check_evaluation(strategy: Any) -> None:
    """Refuse an evaluation in a training that has nothing to be evaluated on.

    Raises:
        ValueError: the strategy is not "no".
    """
    if strategy != "no":
        raise ValueError(
            f"--eval_strategy {getattr(strategy, 'value', strategy)} needs a set to evaluate on while training, which "
            "this script does not have; leave it out: the student is judged at the end"
        )


def check_stream(arguments: TrainingArguments) -> None:
    """Refuse what a training on a stream cannot do: it has an order of its own, and epochs unknown to the Trainer.

    Raises:
        ValueError: a strategy is "epoch"; or another order is asked for, or a size of batches that is found on the way.
    """
    for name in ("save", "eval", "logging"):
        if getattr(arguments, f"{name}_strategy") == "epoch":
            raise ValueError(
                f"--{name}_strategy epoch: a stream of examples has no end of an epoch; give steps, for example "
                f"--{name}_strategy steps --{name}_steps 500"
            )
    if arguments.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError(
            f"--train_sampling_strategy {arguments.train_sampling_strategy}: a stream of examples is shuffled in a "
            "buffer; choose random or group_by_length"
        )
    if arguments.auto_find_batch_size:
        raise ValueError(
            "--auto_find_batch_size: the steps of a stream are counted for the batches that were asked for; leave it "
            "out, and give a smaller --per_device_train_batch_size"
        )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, *names: str) -> None:
    """Refuse a tokenizer that lacks a token that a task needs.

    Args:
        tokenizer: of the teacher.
        names: "mask", "cls", "sep", "pad" or "eos".

    Raises:
        ValueError: one is missing.
    """
    for name in names:
        if getattr(tokenizer, f"{name}_token") is None:
            raise ValueError(
                f"the teacher's tokenizer has no {name} token, which this task needs; set {name}_token in its "
                "tokenizer_config.json to a token of its vocabulary"
            )


def checked_length(teacher: PreTrainedModel, asked: int | None, default: int) -> int:
    """The tokens at which texts are cut: those that were asked for, or the default as far as the teacher reads.

    Raises:
        ValueError: fewer than 2 were asked for, or more than the teacher reads.
    """
    most: int = longest_sequence(teacher)
    if asked is not None and not 2 <= asked <= most:
        raise ValueError(
            f"max_length={asked} must be from 2 to the teacher's {most} tokens; choose another --max_length"
        )
    return asked or min(default, most)


def fine_tune_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    collator: Collator,
    folder: Path,
    epochs: float,
    learning_rate: float,
    like: DistillationArguments,
) -> PreTrainedModel:
    """Train a dense model on a task and save it whole in ``folder/teacher``; if that is there already, load it.

    Args:
        model: with the head of the task.
        tokenizer: saved beside it.
        dataset: tokenized examples with labels.
        collator: makes a batch.
        folder: of the experiment.
        epochs: how often it sees the examples.
        learning_rate: at its highest.
        like: from which batch size, precision, seed and logging are taken.
    """
    saved = folder / TEACHER
    if saved.exists():
        return load_teacher(saved)[0]
    with unchanged_cache(model.config):
        train_plainly(
            model, dataset, collator, like, num_train_epochs=epochs, learning_rate=learning_rate, weight_decay=0.01
        )
    save_once(saved, model, tokenizer)
    return model.eval()


def train_plainly(
    model: PreTrainedModel, dataset: Any, collator: Collator, like: DistillationArguments, **changes: Any
) -> None:
    """Train a model with the stock Trainer, without checkpoints.

    Args:
        model: whose parameters that require a gradient are trained.
        dataset: tokenized examples with labels.
        collator: makes a batch.
        like: from which batch size, precision, seed and logging are taken.
        **changes: further or other `TrainingArguments`.
    """
    same = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16", "fp16", "use_cpu",
            "logging_steps", "disable_tqdm", "dataloader_pin_memory", "remove_unused_columns",
            "train_sampling_strategy")  # fmt: skip
    chosen = {name: getattr(like, name) for name in same} | {"warmup_steps": 0.1, **changes}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(scratch, save_strategy="no", report_to=[], **chosen)
        trainer = SamplingTrainer(model, arguments, train_dataset=dataset, data_collator=collator)
        trainer.model_accepts_loss_kwargs = False  # it would not divide a classifier's loss by the accumulation steps
        with unchanged_forward(model):
            trainer.train()


def save_once(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """As `save_folder`, by the main process only; the others wait for it."""
    if PartialState().is_main_process:
        save_folder(folder, model, tokenizer)
    PartialState().wait_for_everyone()


def train_and_save(trainer: DistillationTrainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Distil, from the last checkpoint if that was asked for, and save the student whole in ``folder/student``.

    Returns:
        Samples and tokens (padding not counted) that the student has seen, seconds, and how it has learned.
    """
    resume: Any = trainer.args.resume_from_checkpoint
    if resume is True:  # a run may have stopped before its first checkpoint was whole
        resume = any(map(is_complete, Path(trainer.args.output_dir or "").glob("checkpoint-*")))
    trainer.train(resume_from_checkpoint=resume)
    save_once(folder / STUDENT, trainer.model, tokenizer)
    return trainer.training_summary()


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Collator,
    outputs: Iterable[str] = ("logits",),
    batch_size: int = 64,
) -> dict[str, list[np.ndarray]]:
    """Outputs of a model for every example, in their order; examples of similar length are computed together.

    Args:
        model: put into evaluation mode for this.
        dataset: with `input_ids`; other columns go to the collator.
        collator: makes a batch.
        outputs: which of the model's outputs.
        batch_size: examples.

    Returns:
        For each output one array for each example, float32.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    found: dict[str, list[Any]] = {name: [None] * len(dataset) for name in outputs}
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="predicting", unit="batch", leave=False):
            rows = order[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collator([dataset[i] for i in rows]).items()}
            output = model(**{key: value for key, value in batch.items() if "label" not in key}, return_dict=True)
            for name, values in found.items():
                for row, value in zip(rows, output[name].float().cpu().numpy(), strict=True):
                    values[row] = value
    return found


def finish(folder: Path, table: Table, results: Mapping[str, Any]) -> None:
    """Show the table, and keep the figures in ``results.json``, in the main process only."""
    if PartialState().is_main_process:
        _write_results(folder, results)
        console().print(table)


@contextlib.contextmanager
def results_kept(folder: Path, known: Mapping[str, Any]) -> Iterator[None]:
    """Let no result be lost because its evaluation fails: what is known is in ``results.json`` then, with the error.

    Args:
        folder: of the experiment; its student is saved already.
        known: options and training.
    """
    try:
        yield
    except BaseException as error:
        if PartialState().is_main_process and not (folder / "results.json").exists():  # else `finish` has written all
            _write_results(folder, {**known, "evaluation_failed": f"{type(error).__name__}: {error}"})
        raise


def _write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Beside a finished student lies a copy: its model card is made from it."""
    text = to_json({**results, "environment": environment()})
    for place in (folder, folder / STUDENT):
        if place.is_dir():
            write_text(place / "results.json", text)
