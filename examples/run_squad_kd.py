"""Distil a question answerer into a factored one: SQuAD 1.1 and 2.0, or files of your own; BERT and GPT-2.

    python examples/run_squad_kd.py --teacher path/to/bert --data_dir path/to/SQuAD --output_dir output/squad
    python examples/run_squad_kd.py --teacher path/to/bert --version v2.0 --train_file train.json \
        --validation_file dev.json --output_dir output/mine

This is the second stage of KroneckerBERT (section 3.5) on SQuAD. A teacher that answers no questions yet is fine-tuned
first. The student is factored from the teacher, or comes from the first stage (--start, see run_mlm_kd.py) and takes
the teacher's output layer. Without --data_dir the questions come from the Hub. Files of your own are in the format of
the official ones. The recipes are those of BERT; GPT-2 needs a --plan, such as kngpt2. The student's answers go to
predictions.json, as the official script reads them. --resume_from_checkpoint true goes on with a run that stopped.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationTrainer
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
from kronecker_transformers.tasks.squad import (
    Answers,
    WindowCollator,
    answers_from_logits,
    best_threshold,
    evaluation_features,
    load_squad,
    read_squad_file,
    training_features,
)
from kronecker_transformers.tasks.squad_metric import SquadMetric, Version


@dataclass
class Options(StudentOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of a BERT or GPT-2, fine-tuned on SQuAD or not."})
    output_dir: str = field(metadata={"help": "New folder for the teacher, checkpoints, student and results.json."})
    version: Version = field(default="v1.1", metadata={"help": "In v2.0 questions may have no answer."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the official train-*.json and dev-*.json; default: the Hub."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own questions in the official format."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to judge on."})
    recipe: str = field(default="kroneckerbert-7.7x", metadata={"help": "Defaults of plan and training."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a window; default: that of the recipe."})
    stride: int = field(default=128, metadata={"help": "Tokens of context that a window shares with the next."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training questions."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Judge on only so many questions."})
    teacher_epochs: float = field(default=2.0, metadata={"help": "Epochs of a teacher that is fine-tuned here."})
    teacher_learning_rate: float = field(default=3e-5, metadata={"help": "Its learning rate."})
    no_answer_threshold: float | None = field(
        default=None,
        metadata={"help": "v2.0: no answer where its score exceeds that of the best answer by more; default: 0."},
    )

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None) or (self.train_file and self.data_dir):
            raise ValueError("give --data_dir, or both --train_file and --validation_file, or none of them for the Hub")
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1; leave it out to use all questions")
        if self.no_answer_threshold is not None:
            if self.version != "v2.0":
                raise ValueError("--no_answer_threshold is for --version v2.0; in v1.1 every question has an answer")
            if not math.isfinite(self.no_answer_threshold):
                raise ValueError(f"--no_answer_threshold is {self.no_answer_threshold}; it must be finite; 0 is usual")


def load_questions(options: Options) -> tuple[Dataset, Dataset]:
    """The questions to train and to judge on; what could only be refused after the training is refused here."""
    if options.train_file and options.validation_file:
        train, held_out = read_squad_file(options.train_file), read_squad_file(options.validation_file)
    else:
        data = load_squad(options.version, options.data_dir)
        train, held_out = data["train"], data["validation"]
    train = train.select(range(min(options.max_train_samples or len(train), len(train))))
    held_out = held_out.select(range(min(options.max_eval_samples or len(held_out), len(held_out))))
    for name, questions in (("training", train), ("validation", held_out)):
        impossible = (row["id"] for row in questions.select_columns(["id", "answers"]) if not row["answers"]["text"])
        if options.version == "v1.1" and (first := next(impossible, None)) is not None:
            raise ValueError(
                f"{name} question {first!r} has no answer, but in v1.1 each has one; run with --version v2.0"
            )
    ids = held_out["id"][:]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids)} validation questions have {len(set(ids))} ids; ids must be unique; change them")
    return train, held_out


def load_answerer(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The teacher with its output layer for spans, its tokenizer, and whether it is fine-tuned already."""
    teacher, tokenizer = teacher_and_tokenizer(source)
    trained = type(teacher).__name__.endswith("ForQuestionAnswering")
    if not trained:
        names = {0: "start", 1: "end"}
        teacher = AutoModelForQuestionAnswering.from_pretrained(
            source, id2label=names, label2id={name: i for i, name in names.items()}
        )
    if tokenizer.pad_token is None:  # GPT-2; the attention mask, not the token, tells what is padding
        check_special_tokens(tokenizer, "eos")
        tokenizer.pad_token = tokenizer.eos_token
    if teacher.config.model_type == "bert":
        check_special_tokens(tokenizer, "cls", "sep")
    teacher.config.pad_token_id = tokenizer.pad_token_id
    return teacher.float(), tokenizer, trained  # whatever precision it was saved in: it is to be trained


def windows(make: Callable[..., Any], questions: Dataset, tokenizer: Any, length: int, stride: int) -> Dataset:
    """What `training_features` or `evaluation_features` makes of the questions."""
    settings = {"tokenizer": tokenizer, "max_length": length, "stride": stride}
    return questions.map(make, batched=True, remove_columns=questions.column_names, fn_kwargs=settings)


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


def main(argv: list[str] | None = None) -> None:
    """Tell the story."""
    options, arguments = parse_script(Options, "squad", argv)
    recipe = RECIPES[options.recipe]["squad"]
    folder = check_output(options.output_dir, bool(arguments.resume_from_checkpoint))
    train, held_out = load_questions(options)

    teacher, tokenizer, trained = load_answerer(options.teacher)
    options.max_length = length = checked_length(teacher, options.max_length, recipe.length)
    collator: Any = WindowCollator(tokenizer)
    lessons = windows(training_features, train, tokenizer, length, options.stride)
    exam = Exam(
        options.version,
        held_out,
        windows(evaluation_features, held_out, tokenizer, length, options.stride),
        collator,
        options.no_answer_threshold or 0.0,
    )
    if not trained:
        options.check(teacher, tokenizer, recipe)  # what does not fit is refused now, not after the training
        teacher = fine_tune_teacher(
            teacher,
            tokenizer,
            lessons,
            collator,
            folder,
            options.teacher_epochs,
            options.teacher_learning_rate,
            like=arguments,
        )

    student = options.student(teacher, tokenizer, recipe, progress=not arguments.disable_tqdm)
    models: dict[str, Any] = {"teacher": teacher, "student, undistilled": copy.deepcopy(student), "student": student}
    watched = None
    if arguments.eval_strategy != "no":  # the loss while it trains; answers are judged at the end
        watched = windows(training_features, held_out, tokenizer, length, options.stride)
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=lessons,
        eval_dataset=watched,
        data_collator=collator,
        processing_class=tokenizer,
    )
    seen = train_and_save(trainer, tokenizer, folder)

    models["student, undistilled"].to(student.device)  # the trainer has moved the others
    record = {"options": vars(options), "training": seen}
    with results_kept(folder, record):
        answers = {name: exam.answers(model) for name, model in models.items()}
        metrics = {name: exam.scores(found) for name, found in answers.items()}
        parameters = [model.num_parameters() for model in models.values()]
        rows = {name: [found[name] for found in metrics.values()] for name in metrics["teacher"] if "total" not in name}
        notes = f"The student has seen {seen['samples']:,} windows, {seen['tokens']:,} tokens."
        results = {**record, "models": list(models), "rows": rows, "parameters": parameters, "metrics": metrics}
        if options.version == "v2.0":
            results["tuned_on_validation"] = tuned = {name: exam.tuned(found) for name, found in answers.items()}
            notes += "\n* with the threshold that is best on these very validation questions; on new ones f1 is lower"
            rows["f1, tuned threshold*"] = [found["f1"] for found in tuned.values()]
        shown = {name: [*values, 100 * values[-1] / values[0] if values[0] else None] for name, values in rows.items()}
        table = results_table(
            f"SQuAD {options.version}, {options.recipe}: {len(held_out):,} questions",
            [*models, "retained, %"],
            {"parameters": [*parameters, None], **shown},
            notes,
        )
        if trainer.is_world_process_zero():
            write_json(folder / "predictions.json", answers["student"].predictions)
        finish(folder, table, results)


def write_json(path: Path, content: dict[str, str]) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
