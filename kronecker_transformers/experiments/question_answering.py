"""Extractive question answering: questions, a teacher with an output layer for spans, and how models are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from ..models.kronecker_family import family_of
from ..tasks.squad import WindowCollator, load_squad, read_squad_file
from ..tasks.squad_answers import Answers, answers_from_logits, best_threshold
from ..tasks.squad_metric import SquadMetric, Version
from .run import check_special_tokens, predict, teacher_and_tokenizer


def load_questions(
    version: Version,
    data_dir: str | None,
    files: tuple[str, str] | None,
    max_train_samples: int | None,
    max_eval_samples: int | None,
) -> tuple[Dataset, Dataset]:
    """The questions to train and to judge on; what could only be refused after the training is refused here."""
    if files:
        train, held_out = map(read_squad_file, files)
    else:
        data = load_squad(version, data_dir)
        train, held_out = data["train"], data["validation"]
    train = train.select(range(min(max_train_samples or len(train), len(train))))
    held_out = held_out.select(range(min(max_eval_samples or len(held_out), len(held_out))))
    for name, questions in (("training", train), ("validation", held_out)):
        impossible = (row["id"] for row in questions.select_columns(["id", "answers"]) if not row["answers"]["text"])
        if version == "v1.1" and (first := next(impossible, None)) is not None:
            raise ValueError(
                f"{name} question {first!r} has no answer, but in v1.1 each has one; run with --version v2.0"
            )
    ids = held_out["id"][:]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids)} validation questions have {len(set(ids))} ids; ids must be unique; change them")
    return train, held_out


def load_answerer(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The teacher with its output layer for spans, its tokenizer, and whether it is fine-tuned already."""
    head = "ForQuestionAnswering"
    teacher, tokenizer = teacher_and_tokenizer(source, head)
    trained = type(teacher).__name__.endswith(head)
    if not trained:
        names = {0: "start", 1: "end"}
        teacher = AutoModelForQuestionAnswering.from_pretrained(
            source, id2label=names, label2id={name: i for i, name in names.items()}
        )
    if tokenizer.pad_token is None:  # the attention mask, not the token, tells what is padding
        check_special_tokens(tokenizer, "eos")
        tokenizer.pad_token = tokenizer.eos_token
    if not family_of(teacher).causal:
        check_special_tokens(tokenizer, "cls", "sep")
    teacher.config.pad_token_id = tokenizer.pad_token_id
    return teacher.float(), tokenizer, trained  # whatever precision it was saved in: it is to be trained


def windows(make: Callable[..., Any], questions: Dataset, tokenizer: Any, length: int, stride: int) -> Dataset:
    """What `training_features` or `evaluation_features` makes of the questions."""
    settings = {"tokenizer": tokenizer, "max_length": length, "stride": stride}
    return questions.map(
        make, batched=True, remove_columns=questions.column_names, fn_kwargs=settings,
        load_from_cache_file=False,  # it would be found by the name of `make`, and be of an earlier version of it
    )  # fmt: skip


@dataclass(frozen=True)
class Exam:
    """Questions with known answers, and what models make of them."""

    version: Version
    questions: Dataset
    windows: Dataset
    collator: WindowCollator
    no_answer_threshold: float

    def answers(self, model: PreTrainedModel) -> Answers:
        """A model's answers."""
        collator: Any = self.collator
        inputs = self.windows.remove_columns(["example_id", "offset_mapping"])
        logits = predict(model, inputs, collator, ("start_logits", "end_logits"))
        threshold = self.no_answer_threshold if self.version == "v2.0" else None
        start, end = logits["start_logits"], logits["end_logits"]
        return answers_from_logits(self.questions, self.windows, start, end, no_answer_threshold=threshold)

    def scores(self, answers: Answers) -> dict[str, float]:
        """The official scores, in per cent."""
        predictions = [{"id": name, "prediction_text": text} for name, text in answers.predictions.items()]
        references = self.questions.select_columns(["id", "answers"]).to_list()
        return SquadMetric(self.version).compute(predictions=predictions, references=references)

    def tuned(self, answers: Answers) -> dict[str, Any]:
        """The highest scores of v2.0 that any threshold gives on these very questions: better than on new ones.

        An infinite threshold, with which all or none are left without an answer, is a string: JSON has no infinity.
        """
        best = best_threshold(answers.n_best, answers.null_odds, self.questions)
        return {name: value if math.isfinite(value) else str(value) for name, value in best._asdict().items()}
