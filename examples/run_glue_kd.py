"""Distil a text classifier into a factored one: GLUE tasks, or files of your own; BERT and GPT-2.

    python examples/run_glue_kd.py --teacher path/to/bert --task_name sst2 --data_dir path/to/GLUE --output_dir out/sst2
    python examples/run_glue_kd.py --teacher path/to/bert --train_file train.tsv --validation_file dev.tsv \
        --output_dir out/mine

This is the second stage of KroneckerBERT (section 3.5), and KnGPT2's fine-tuning. A teacher that has no classifier yet
is fine-tuned first. The student is factored from the teacher, or comes from the first stage (--start, see
run_mlm_kd.py) and takes the teacher's classifier. Without --data_dir the task comes from the Hub. For the tests of
GLUE, predictions are written as its server reads them. --resume_from_checkpoint true goes on with a run that stopped.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer
from kronecker_transformers.distillation.experiment import (
    check_output,
    check_special_tokens,
    checked_length,
    fine_tune_teacher,
    finish,
    predict,
    results_kept,
    teacher_and_tokenizer,
    train_and_save,
)
from kronecker_transformers.recipes import RECIPES, StudentOptions, parse_script
from kronecker_transformers.tasks.glue import glue_task, load_glue, load_text_classification, write_predictions
from kronecker_transformers.tasks.glue_metric import GlueMetric
from kronecker_transformers.tasks.labels import match_labels
from kronecker_transformers.tasks.pairs import encode_texts

logger = logging.getLogger(__name__)


@dataclass
class Options(StudentOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of a BERT or GPT-2, fine-tuned on the task or not."})
    output_dir: str = field(metadata={"help": "New folder for the teacher, checkpoints, student and results.json."})
    task_name: str | None = field(
        default=None, metadata={"help": "cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb; or give your own files."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "The official GLUE download; default: the Hub."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "tsv, csv, json or parquet with sentence (or sentence1 and sentence2) and label."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to judge on."})
    recipe: str = field(default="kroneckerbert-7.7x", metadata={"help": "Defaults of plan and training."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens; default: that of the recipe."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    teacher_epochs: float = field(default=3.0, metadata={"help": "Epochs of a teacher that is fine-tuned here."})
    teacher_learning_rate: float = field(default=3e-5, metadata={"help": "Its learning rate."})
    teacher_only: bool = field(
        default=False, metadata={"help": "Stop when the teacher is fine-tuned and judged; for several students of it."}
    )

    def __post_init__(self) -> None:
        if (self.task_name is None) == (self.train_file is None or self.validation_file is None):
            raise ValueError("give either --task_name or both --train_file and --validation_file")


@dataclass(frozen=True)
class Task:
    """Examples, columns and labels of a task, and the teacher's ids of these labels where they are others."""

    data: DatasetDict
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    name: str | None
    ids: tuple[int, ...] = ()

    @property
    def evaluation_splits(self) -> list[str]:
        """Splits with labels that are not for training."""
        return [split for split in self.data if split.startswith("validation")]

    def to_teacher(self, labels: list[Any]) -> list[Any]:
        """Labels of the task as the teacher numbers them; -1, for none, stays."""
        return [self.ids[label] if label >= 0 else label for label in labels] if self.ids else labels

    def from_teacher(self, ids: Any) -> np.ndarray:
        """The other way, for an array of predictions or labels."""
        return np.argsort(self.ids)[np.asarray(ids)] if self.ids else np.asarray(ids)

    def metrics(self, predictions: np.ndarray, references: Any) -> dict[str, float]:
        """The task's official metrics; accuracy, or the correlations of STS-B, for a task of one's own.

        Predictions and references are as the teacher numbers them.
        """
        predictions, references = self.from_teacher(predictions), self.from_teacher(references)
        if self.name is None and self.labels:
            return {"accuracy": float(np.mean(predictions == np.asarray(references)))}
        metric = GlueMetric(self.name or "stsb")
        return metric.compute(predictions=predictions, references=references) or {}


def load_task(options: Options) -> Task:
    """The GLUE task or the user's files."""
    if options.task_name:
        spec = glue_task(options.task_name)
        return Task(load_glue(options.task_name, options.data_dir), spec.text_columns, spec.labels, options.task_name)
    assert options.train_file is not None
    data, columns, labels = load_text_classification(options.train_file, options.validation_file)
    return Task(data, columns, labels, None)


def load_classifier(options: Options, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task, bool | None]:
    """The teacher with a classifier, its tokenizer, the task with the teacher's labels, and whether these are certain.

    They are None for a teacher that is not fine-tuned yet.
    """
    config = AutoConfig.from_pretrained(options.teacher)
    certain = None
    if str((config.architectures or [""])[0]).endswith("ForSequenceClassification"):
        teacher, tokenizer = teacher_and_tokenizer(options.teacher)
        names = label_names(teacher)
        found = match_labels(names, task.labels or ("score",)) if task.labels or len(names) != 1 else None
        certain = found is None or found.is_certain
        task = replace(task, ids=found.ids if found else ())
    else:
        id2label = dict(enumerate(task.labels or ("score",)))
        teacher = AutoModelForSequenceClassification.from_pretrained(
            options.teacher, id2label=id2label, label2id={name: i for i, name in id2label.items()}
        )
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    if tokenizer.pad_token is None:  # GPT-2
        check_special_tokens(tokenizer, "eos")
        tokenizer.pad_token = tokenizer.eos_token
    if teacher.config.model_type == "bert":
        check_special_tokens(tokenizer, "cls", "sep")
    tokenizer.padding_side = "right"  # GPT-2 counts positions from the left, padding included
    teacher.config.pad_token_id = tokenizer.pad_token_id
    return teacher.float(), tokenizer, task, certain  # whatever precision it was saved in: it is to be trained


def label_names(teacher: PreTrainedModel) -> list[str]:
    """Names of the teacher's classes, in the order of their ids."""
    names: dict[Any, str] = teacher.config.id2label or {}
    return [names[i] for i in sorted(names)]


def tokenized(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Token ids and labels; nothing is padded here."""

    def convert(batch: dict[str, Any]) -> dict[str, Any]:
        first, *second = (batch[name] for name in task.text_columns)
        encoded = encode_texts(tokenizer, first, second[0] if second else None, length)
        return {**encoded, "labels": task.to_teacher(batch["label"])}

    return dataset.map(convert, batched=True, remove_columns=dataset.column_names)


def check_unnamed_labels(teacher: PreTrainedModel, task: Task, data: DatasetDict, collator: Any) -> None:
    """Warn of a teacher without names for its classes that does worse than chance: their order is another, it seems."""
    split = task.evaluation_splits[0]
    some = data[split].select(range(min(500, len(data[split]))))
    predictions = decided(np.stack(predict(teacher, some, collator)["logits"]))
    accuracy, chance = float(np.mean(predictions == np.asarray(some["labels"][:]))), 1 / len(task.labels)
    if accuracy < chance:
        logger.warning(
            "THE TEACHER IS RIGHT IN %.1f %% OF %d CASES, WORSE THAN CHANCE (%.1f %%): its classes, %s, were taken to "
            "be %s in this order, and seem to be in another one; correct id2label and label2id in its config.json",
            100 * accuracy, len(some), 100 * chance, ", ".join(label_names(teacher)), ", ".join(task.labels),
        )  # fmt: skip


def judged(model: PreTrainedModel, task: Task, data: DatasetDict, collator: Any) -> dict[str, float]:
    """Metrics on every evaluation split, by name."""
    found: dict[str, float] = {}
    for split in task.evaluation_splits:
        predictions = decided(np.stack(predict(model, data[split], collator)["logits"]))
        suffix = split.removeprefix("validation")
        metrics = task.metrics(predictions, data[split]["labels"][:])
        found |= {f"{name}{suffix}": value for name, value in metrics.items()}
    return found


def decided(logits: np.ndarray) -> np.ndarray:
    """Classes (examples,), or the scores of a regression."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)


def main(argv: list[str] | None = None) -> None:
    """Tell the story."""
    options, arguments = parse_script(Options, "glue", argv)
    recipe = RECIPES[options.recipe]["glue"]
    folder = check_output(options.output_dir, bool(arguments.resume_from_checkpoint))
    task = load_task(options)

    teacher, tokenizer, task, certain = load_classifier(options, task)
    options.max_length = length = checked_length(teacher, options.max_length, recipe.length)
    collator = DataCollatorWithPadding(tokenizer)
    data = DatasetDict({name: tokenized(split, task, tokenizer, length) for name, split in task.data.items()})
    if options.max_train_samples:
        data["train"] = data["train"].select(range(min(options.max_train_samples, len(data["train"]))))
    if certain is False:
        check_unnamed_labels(teacher.to(arguments.device), task, data, collator)
    if certain is None:
        if not options.teacher_only:  # what does not fit is refused now, not after the training
            options.check(teacher, tokenizer, recipe)
        teacher = fine_tune_teacher(
            teacher,
            tokenizer,
            data["train"],
            collator,
            folder,
            options.teacher_epochs,
            options.teacher_learning_rate,
            like=arguments,
        )

    title = f"{options.task_name or options.train_file}, {options.recipe}"
    if options.teacher_only:
        quality = judged(teacher.to(arguments.device), task, data, collator)
        rows: dict[str, list[Any]] = {"parameters": [teacher.num_parameters()]}
        rows |= {name: [value] for name, value in quality.items()}
        finish(
            folder,
            results_table(title, ["teacher"], rows),
            {"options": vars(options), "metrics": {"teacher": quality}, "parameters": rows["parameters"]},
        )
        return

    student = options.student(teacher, tokenizer, recipe, progress=not arguments.disable_tqdm)
    models = {
        "teacher": teacher,
        "student, undistilled": copy.deepcopy(student).to(arguments.device),
        "student": student,
    }
    trainer = distiller(student, teacher, arguments, task, data, collator, tokenizer)
    seen = train_and_save(trainer, tokenizer, folder)

    record = {"options": vars(options), "training": seen}
    with results_kept(folder, record):
        metrics = {name: judged(model, task, data, collator) for name, model in models.items()}
        parameters = [model.num_parameters() for model in models.values()]
        rows = {name: [found[name] for found in metrics.values()] for name in metrics["teacher"]}
        shown = {name: [*values, 100 * values[-1] / values[0] if values[0] else None] for name, values in rows.items()}
        headings, shown = [*models, "retained, %"], {"parameters": parameters, **shown}
        finish(
            folder,
            results_table(f"{title}: {seen['samples']:,} examples seen", headings, shown),
            {**record, "models": list(models), "rows": rows, "metrics": metrics, "parameters": parameters},
        )
    if options.task_name:
        for split in glue_task(options.task_name).server_files:
            if split in data:
                answers = task.from_teacher(
                    decided(np.stack(predict(student, data[split], collator)["logits"]))
                ).tolist()
                print(f"For the GLUE server: {write_predictions(options.task_name, split, answers, folder)}")


def distiller(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    arguments: DistillationArguments,
    task: Task,
    data: DatasetDict,
    collator: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> DistillationTrainer:
    """The trainer; it evaluates with the task's metrics where the arguments ask for it."""

    def compute_metrics(task: Task, prediction: Any) -> dict[str, float]:
        return task.metrics(decided(prediction.predictions), prediction.label_ids)

    splits = task.evaluation_splits
    return DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data[splits[0]] if len(splits) == 1 else {split: data[split] for split in splits},
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=partial(compute_metrics, task),
    )


if __name__ == "__main__":
    main()
