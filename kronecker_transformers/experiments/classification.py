"""Text classification: a task's examples and labels, a teacher with a classifier, and how models are judged."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..distillation import DistillationArguments, DistillationTrainer
from ..models.kronecker_family import family_of
from ..tasks.augmentation import Row
from ..tasks.glue import glue_task, load_glue, load_text_classification
from ..tasks.glue_metric import GlueMetric
from ..tasks.labels import match_labels
from ..tasks.pairs import encode_texts
from .run import check_special_tokens, predict, teacher_and_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """Examples, columns and labels of a task, and the teacher's ids of these labels where they are others."""

    data: DatasetDict
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    name: str | None
    ids: tuple[int, ...] = ()

    def rows(self, number: int | None = None) -> list[Row]:
        """The texts of its training set, or of so many examples of it."""
        columns = [self.data["train"][name][:number] for name in self.text_columns]
        return list(zip(*(map(str, column) for column in columns), strict=True))

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


def load_task(task_name: str | None, data_dir: str | None, train_file: str | None, validation_file: str | None) -> Task:
    """The GLUE task or the user's files."""
    if task_name:
        spec = glue_task(task_name)
        return Task(load_glue(task_name, data_dir), spec.text_columns, spec.labels, task_name)
    assert train_file is not None
    data, columns, labels = load_text_classification(train_file, validation_file)
    return Task(data, columns, labels, None)


def load_classifier(source: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task, bool | None]:
    """The teacher with a classifier, its tokenizer, the task with the teacher's labels, and whether these are certain.

    They are None for a teacher that is not fine-tuned yet.
    """
    head, certain = "ForSequenceClassification", None
    teacher, tokenizer = teacher_and_tokenizer(source, head)
    if type(teacher).__name__.endswith(head):
        names = label_names(teacher)
        found = match_labels(names, task.labels or ("score",)) if task.labels or len(names) != 1 else None
        certain = found is None or found.is_certain
        task = replace(task, ids=found.ids if found else ())
    else:
        id2label = dict(enumerate(task.labels or ("score",)))
        teacher = AutoModelForSequenceClassification.from_pretrained(
            source, id2label=id2label, label2id={name: i for i, name in id2label.items()}
        )
    if tokenizer.pad_token is None:
        check_special_tokens(tokenizer, "eos")
        tokenizer.pad_token = tokenizer.eos_token
    if not family_of(teacher).causal:
        check_special_tokens(tokenizer, "cls", "sep")
    tokenizer.padding_side = "right"  # a causal model counts positions from the left, padding included
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

    # a cache would be found by the names of these functions, and be of an earlier version of them
    return dataset.map(convert, batched=True, remove_columns=dataset.column_names, load_from_cache_file=False)


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


def distiller(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    arguments: DistillationArguments,
    task: Task,
    data: DatasetDict,
    train: Any,
    collator: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> DistillationTrainer:
    """The trainer, on a dataset or stream; it evaluates with the task's metrics where the arguments ask for it."""

    def compute_metrics(task: Task, prediction: Any) -> dict[str, float]:
        return task.metrics(decided(prediction.predictions), prediction.label_ids)

    splits = task.evaluation_splits
    return DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=train,
        eval_dataset=data[splits[0]] if len(splits) == 1 else {split: data[split] for split in splits},
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=partial(compute_metrics, task),
    )
