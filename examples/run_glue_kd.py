"""Distil a text classifier into a factored one: GLUE tasks, or files of your own; encoders and GPT-2.

    python examples/run_glue_kd.py --teacher path/to/bert --task_name sst2 --data_dir path/to/GLUE --output_dir out/sst2
    python examples/run_glue_kd.py --teacher path/to/bert --train_file train.tsv --validation_file dev.tsv \
        --output_dir out/mine

A teacher that has no classifier yet is fine-tuned first. The student's plan is searched on it, and the student learns
from the teacher's outputs on the task's texts, half of them augmented, as by `distill --task`. With --recipe
kroneckerbert-7.7x or -21x this is the second stage of KroneckerBERT (section 3.5), with kngpt2 the fine-tuning of
KnGPT2: the student is factored by the paper's shapes then, or comes from the first stage (--start, see run_mlm_kd.py)
and takes the teacher's classifier, and it learns labels too. Without --data_dir the task comes from the Hub. For the
tests of GLUE, predictions are written as its server reads them. --resume_from_checkpoint true goes on with a run that
stopped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import DataCollatorWithPadding

from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.classification import (
    check_unnamed_labels,
    decided,
    distiller,
    judged,
    load_classifier,
    load_task,
    tokenized,
)
from kronecker_transformers.experiments.lessons import augmented_examples, calibration_rows
from kronecker_transformers.experiments.run import (
    check_output,
    check_stream,
    checked_length,
    fine_tune_teacher,
    finish,
    predict,
    results_kept,
    train_and_save,
)
from kronecker_transformers.recipes import RECIPES, AugmentationOptions, parse_script
from kronecker_transformers.tasks.glue import glue_task, write_predictions
from kronecker_transformers.tasks.text import TextStream, stream_seed, training_steps


@dataclass
class Options(AugmentationOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of an encoder or GPT-2, fine-tuned on the task or not."})
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
    recipe: str = field(default="classifier", metadata={"help": "Defaults of plan and training."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens; default: that of the recipe."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training examples."})
    teacher_epochs: float = field(default=3.0, metadata={"help": "Epochs of a teacher that is fine-tuned here."})
    teacher_learning_rate: float = field(default=3e-5, metadata={"help": "Its learning rate."})
    teacher_only: bool = field(
        default=False, metadata={"help": "Stop when the teacher is fine-tuned and judged; for several students of it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        files = self.train_file, self.validation_file
        if self.task_name is None and (None in files or self.data_dir is not None):
            raise ValueError("give --task_name, with or without --data_dir, or both --train_file and --validation_file")
        if self.task_name is not None and files != (None, None):
            raise ValueError(f"--task_name {self.task_name} has files of its own; leave it out, or your files")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(
                f"--max_train_samples is {self.max_train_samples}; it must be at least 1; leave it out to use all"
            )


def main(argv: list[str] | None = None) -> None:
    """Fine-tune a teacher if need be, distil its student, and judge both."""
    options, arguments = parse_script(Options, "glue", argv)
    recipe = RECIPES[options.recipe]["glue"]
    augmented = options.choose_augmented(recipe)
    if augmented and (weight := arguments.weights().get("supervised")):
        raise ValueError(
            f"--augmented {augmented} makes texts without labels, which supervised_weight={weight:g} needs; "
            "set one of them to 0"
        )
    if augmented:
        check_stream(arguments)
    if not arguments.eval_do_concat_batches:
        raise ValueError("--eval_do_concat_batches false: metrics are those of a whole evaluation set; leave it out")
    folder = check_output(options.output_dir, arguments.resume_from_checkpoint)
    task = load_task(options.task_name, options.data_dir, options.train_file, options.validation_file)

    teacher, tokenizer, task, certain = load_classifier(options.teacher, task)
    options.max_length = length = checked_length(teacher, options.max_length, recipe.length)
    collator = DataCollatorWithPadding(tokenizer)
    data = DatasetDict({name: tokenized(split, task, tokenizer, length) for name, split in task.data.items()})
    if options.max_train_samples:
        data["train"] = data["train"].select(range(min(options.max_train_samples, len(data["train"]))))
    train_rows = task.rows(options.max_train_samples)
    texts = calibration_rows(train_rows, teacher, tokenizer)
    if certain is False:
        check_unnamed_labels(teacher.to(arguments.device), task, data, collator)
    if not options.teacher_only:
        options.check(teacher, tokenizer, recipe, texts, arguments)
    if certain is None:
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

    student = options.student(teacher, tokenizer, recipe, texts, progress=not arguments.disable_tqdm)
    options.choose_rate(arguments, student)
    models = {
        "teacher": teacher,
        "student, undistilled": copy.deepcopy(student).to(arguments.device),
        "student": student,
    }
    train: Any = data["train"]
    if augmented:
        arguments.max_steps = training_steps(arguments, train_rows)
        examples = augmented_examples(train_rows, augmented, teacher, tokenizer, length)
        train = TextStream(examples, stream_seed(arguments), group=arguments.train_batch_size)
        arguments.accelerator_config.dispatch_batches = False  # each process makes its share of the examples
    trainer = distiller(student, teacher, arguments, task, data, train, collator, tokenizer)
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


if __name__ == "__main__":
    main()
