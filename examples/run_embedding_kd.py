"""Distil a sentence encoder into a factored one, on plain sentences.

    python examples/run_embedding_kd.py --teacher path/to/encoder --train_text sentences.txt \
        --validation_text held_out.txt --output_dir output/encoder

The student's plan is searched, as by the command `distill`; it learns the teacher's sentence embeddings and their
similarities, with the pooling and the prompt that its settings for sentence-transformers say (without any, the mean
over the tokens). Text has one sentence on a line; a table (.json, .csv, .parquet) or a dataset of the Hub has it in the
column `text`. It is read as a stream.
Training goes over all sentences once, or as often as --num_train_epochs says, and from the second time on half of them
are augmented (--augmented); --resume_from_checkpoint true goes on with a run that stopped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from kronecker_transformers.checkpoint.sentence_modules import encoder_settings, modules_of, share_modules
from kronecker_transformers.compression.activations import COUNTED
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationTrainer
from kronecker_transformers.experiments.lessons import augmented_sentences, calibration_lines, spread
from kronecker_transformers.experiments.run import (
    check_evaluation,
    check_output,
    check_special_tokens,
    check_stream,
    checked_length,
    finish,
    results_kept,
    teacher_and_tokenizer,
    train_and_save,
)
from kronecker_transformers.recipes import RECIPES, AugmentationOptions, parse_script
from kronecker_transformers.tasks.sentences import encode, neighbour_agreement, similarity_fidelity
from kronecker_transformers.tasks.tables import read_table
from kronecker_transformers.tasks.text import WHOLE, TextSource, TextStream, length_group, stream_seed, training_steps


@dataclass
class Options(AugmentationOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of an encoder."})
    train_text: list[str] = field(metadata={"help": "Text files, tables, or one dataset of the Hub."})
    output_dir: str = field(metadata={"help": "New folder for checkpoints, the student and results.json."})
    validation_text: list[str] | None = field(
        default=None, metadata={"help": "Held-out text to judge fidelity on; of a dataset, its split validation."}
    )
    validation_lines: int = field(default=2000, metadata={"help": "Lines of it, from all over it, at most."})
    sts_file: str | None = field(
        default=None, metadata={"help": "Table with the columns sentence1, sentence2 and label (a similarity)."}
    )
    recipe: str = field(default="sentence-encoder", metadata={"help": "Defaults of plan and training."})
    fraction: float = field(default=1.0, metadata={"help": "Share of the training text, above 0, at most 1."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens; default: that of the recipe."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_lines < 3:
            raise ValueError(f"--validation_lines {self.validation_lines} must be at least 3; some thousand do well")


def main(argv: list[str] | None = None) -> None:
    """Distil a student and judge it beside its teacher."""
    options, arguments = parse_script(Options, "embedding", argv)
    check_evaluation(arguments.eval_strategy)
    check_stream(arguments)
    recipe = RECIPES[options.recipe]["embedding"]
    folder = check_output(options.output_dir, arguments.resume_from_checkpoint)
    text = TextSource(tuple(options.train_text), options.fraction)

    held_out: list[str] = []
    if options.validation_text:
        source = TextSource(tuple(options.validation_text), split="validation")
        held_out += spread(source.lines(), options.validation_lines)
        if len(held_out) < 3:
            raise ValueError(f"validation_text gives {len(held_out)} sentences; at least 3 are needed; give more text")
    sts = sts_table(options.sts_file) if options.sts_file else None

    teacher, tokenizer = teacher_and_tokenizer(options.teacher)
    settings = encoder_settings(teacher, tokenizer)
    modules = modules_of(teacher)
    teacher = cast(PreTrainedModel, teacher.base_model)  # a head has nothing to say here
    share_modules(modules, teacher)
    check_special_tokens(tokenizer, "pad")
    options.max_length = length = checked_length(
        teacher, options.max_length, min(recipe.length, settings.max_length or recipe.length)
    )
    settings.check_length(length, tokenizer)
    texts, counted = calibration_lines(text, teacher, tokenizer, settings.prompt), text.lines(COUNTED)
    prompted = [settings.prompt + line for line in counted]
    options.check(teacher, tokenizer, recipe, texts, arguments)
    student = options.student(teacher, tokenizer, recipe, texts, prompted, progress=not arguments.disable_tqdm)
    options.choose_rate(arguments, student)
    judges = {
        "teacher": teacher,
        "student, undistilled": copy.deepcopy(student).eval().to(arguments.device),
        "student": student,
    }

    first, augmented = stream_seed(arguments), options.choose_augmented(recipe)
    examples = augmented_sentences(text, augmented, first, counted, teacher, tokenizer, length, settings.prompt)
    arguments.max_steps = training_steps(arguments, examples(first, WHOLE))
    arguments.accelerator_config.dispatch_batches = False  # each process reads the stream and takes its share
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=TextStream(examples, first, group=length_group(arguments)),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        pooling=settings.pooling,
    )
    seen = train_and_save(trainer, tokenizer, folder)

    student.eval()
    record = {"options": vars(options), "training": seen}
    with results_kept(folder, record):
        judged = partial(encode, tokenizer=tokenizer, max_length=length, settings=settings)
        rows: dict[str, list[float]] = {"parameters": [model.num_parameters() for model in judges.values()]}
        if held_out:
            embeddings = [judged(model, sentences=held_out) for model in judges.values()]
            rows["similarity fidelity (Spearman)"] = [similarity_fidelity(embeddings[0], e) for e in embeddings]
            rows["nearest 10 neighbours in common"] = [neighbour_agreement(embeddings[0], e) for e in embeddings]
        if sts is not None:
            rows["STS, Spearman"] = [sts_spearman(partial(judged, model), sts) for model in judges.values()]
        table = results_table(f"{options.recipe}, {seen['samples']:,} sentences seen", judges, rows)
        finish(folder, table, {**record, "models": list(judges), "rows": rows})


def sts_table(file: str) -> Dataset:
    """Sentence pairs and how similar they are.

    Raises:
        ValueError: a column is missing, or a label is no number.
    """
    table = read_table(file)
    if missing := [name for name in ("sentence1", "sentence2", "label") if name not in table.column_names]:
        raise ValueError(f"sts_file {file!r} lacks the column {missing[0]!r}; it has {', '.join(table.column_names)}")
    for label in table["label"]:
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
            raise ValueError(f"sts_file {file!r} has the label {label!r}; labels are numbers; correct it")
    return table


def sts_spearman(judged: Callable[..., Tensor], table: Dataset) -> float:
    """Spearman correlation of the similarities of embeddings with the labels of a table of sentence pairs."""
    first, second = (judged(sentences=table[name][:]) for name in ("sentence1", "sentence2"))
    return float(spearmanr((first * second).sum(-1), table["label"][:]).statistic)


if __name__ == "__main__":
    main()
