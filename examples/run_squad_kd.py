"""Distil a question answerer into a factored one: SQuAD 1.1 and 2.0, or files of your own; encoders and GPT-2.

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
from dataclasses import dataclass, field
from typing import Any

from kronecker_transformers.checkpoint.files import write_text
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationTrainer
from kronecker_transformers.experiments.question_answering import Exam, load_answerer, load_questions, windows
from kronecker_transformers.experiments.run import (
    check_output,
    checked_length,
    fine_tune_teacher,
    finish,
    results_kept,
    train_and_save,
)
from kronecker_transformers.recipes import RECIPES, StudentOptions, parse_script
from kronecker_transformers.tasks.squad import WindowCollator, evaluation_features, training_features
from kronecker_transformers.tasks.squad_metric import Version


@dataclass
class Options(StudentOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of an encoder or GPT-2, fine-tuned on SQuAD or not."})
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
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training questions."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many questions."})
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


def main(argv: list[str] | None = None) -> None:
    """Fine-tune a teacher if need be, distil its student, and judge both."""
    options, arguments = parse_script(Options, "squad", argv)
    recipe = RECIPES[options.recipe]["squad"]
    folder = check_output(options.output_dir, arguments.resume_from_checkpoint)
    train, held_out = load_questions(
        options.version,
        options.data_dir,
        (options.train_file, options.validation_file) if options.train_file and options.validation_file else None,
        options.max_train_samples,
        options.max_eval_samples,
    )

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
    options.check(teacher, tokenizer, recipe, arguments=arguments)
    if not trained:
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
            found = json.dumps(answers["student"].predictions, indent=2, ensure_ascii=False)
            write_text(folder / "predictions.json", found + "\n")
        finish(folder, table, results)


if __name__ == "__main__":
    main()
