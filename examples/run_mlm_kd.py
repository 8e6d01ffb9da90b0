"""Distil a BERT into a factored one on plain text, before any task: the first stage of KroneckerBERT (section 3.5).

    python examples/run_mlm_kd.py --teacher path/to/bert --train_text text.txt --max_steps 1000 --output_dir out/stage1
    python examples/run_mlm_kd.py --teacher path/to/bert --train_text wikimedia/wikipedia:20231101.en --fraction 0.1 \
        --max_steps 100000 --output_dir out/stage1

The student learns the teacher's embedding layer, attention and hidden states, and, with the teacher's heads, to predict
masked words and whether one sentence follows another. Text has one sentence on a line and a blank line between
documents; without documents there is no next sentence to predict. A table (.json, .csv, .parquet) or a dataset of the
Hub has one document in each row of its column `text`. It is read as a stream, and never held in memory as a whole.

A teacher without these heads, such as a sentence encoder, teaches its embedding layer, attention and hidden states
alone, on text without masks; or --train_heads STEPS gives it heads first, and leaves the rest of it as it is.
--resume_from_checkpoint true goes on with a run that stopped, after it has read again what that run had read.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationTrainer
from kronecker_transformers.experiments.masked_language import (
    check_teacher,
    collator_for,
    fixed_batches,
    has_next_sentence,
    headed,
    last_layer_distance,
    masked_quality,
    train_heads,
)
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
from kronecker_transformers.models.kronecker_family import heads_of
from kronecker_transformers.recipes import RECIPES, StudentOptions, parse_script
from kronecker_transformers.tasks.language_modeling import masked_examples
from kronecker_transformers.tasks.text import (
    WHOLE,
    Example,
    Share,
    TextSource,
    TextStream,
    length_group,
    stream_seed,
    training_steps,
)

logger = logging.getLogger(__name__)


@dataclass
class Options(StudentOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of an encoder, with its pre-training heads or without."})
    train_text: list[str] = field(metadata={"help": "Text files, tables, or one dataset of the Hub."})
    output_dir: str = field(metadata={"help": "New folder for checkpoints, the student and results.json."})
    validation_text: list[str] | None = field(
        default=None, metadata={"help": "Held-out text to judge on; of a dataset, its split validation."}
    )
    validation_examples: int = field(default=1000, metadata={"help": "How many examples of it, from its start."})
    recipe: str = field(default="kroneckerbert-7.7x", metadata={"help": "Defaults of plan and training."})
    fraction: float = field(default=1.0, metadata={"help": "Share of the documents, above 0, at most 1."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens; default: that of the recipe."})
    no_next_sentence: bool = field(default=False, metadata={"help": "Leave out next-sentence prediction."})
    short_fraction: float = field(default=0.1, metadata={"help": "Share of examples of a random smaller length."})
    train_heads: int = field(
        default=0, metadata={"help": "Steps in which a teacher without heads first gets them; 0: it gets none."}
    )


def main(argv: list[str] | None = None) -> None:
    """Give a teacher its heads if need be, distil its student on text, and judge both."""
    options, arguments = parse_script(Options, "mlm", argv)
    check_evaluation(arguments.eval_strategy)
    check_stream(arguments)
    recipe = RECIPES[options.recipe]["mlm"]
    folder = check_output(options.output_dir, arguments.resume_from_checkpoint)
    text = TextSource(tuple(options.train_text), options.fraction)
    notes: list[str] = []

    def note(sentence: str) -> None:
        logger.warning(sentence)
        notes.append(sentence)

    teacher, tokenizer = teacher_and_tokenizer(options.teacher)
    check_teacher(teacher, options.teacher, options.train_heads)
    predicts_words = options.train_heads > 0 or bool(heads_of(teacher))
    check_special_tokens(tokenizer, "cls", "sep", "pad", *(["mask"] if predicts_words else []))
    options.max_length = length = checked_length(teacher, options.max_length, recipe.length)
    next_sentence = not options.no_next_sentence and has_next_sentence(teacher, text, options.train_heads > 0, note)

    def examples(seed: int, share: Share = WHOLE) -> Iterable[Example]:
        return masked_examples(text.share(share), tokenizer, length, next_sentence, seed, options.short_fraction)

    if options.train_heads:
        teacher = headed(teacher, next_sentence)
    has_head = bool(heads_of(teacher))
    if not has_head:
        arguments.supervised_weight = arguments.logits_weight = 0.0
        note(
            f"{type(teacher).__name__} has no head to predict words: the student learns the teacher's embedding layer, "
            "attention and hidden states alone, without masks (supervised_weight=0, logits_weight=0)"
        )
    if not arguments.weights():
        raise ValueError("all weights that are left are 0; give an intermediate term a weight, or use --train_heads")
    options.check(teacher, tokenizer, recipe, arguments=arguments)
    kept: list[Example] = []
    if options.validation_text:
        held_out = TextSource(tuple(options.validation_text), split="validation")
        pairs = next_sentence and held_out.has_following_sentences()
        kept += islice(masked_examples(held_out, tokenizer, length, pairs, short=0), options.validation_examples)
        if not kept:
            raise ValueError(f"validation_text={options.validation_text} gives 0 examples; give more text")

    first = stream_seed(arguments)
    stream = TextStream(examples, first, group=length_group(arguments))
    if options.train_heads:
        teacher = train_heads(teacher, tokenizer, stream, options.train_heads, arguments, folder)
        note(f"the heads of the teacher were trained here, in {options.train_heads:,} steps; the rest of it was frozen")
    student = options.student(teacher, tokenizer, recipe, progress=not arguments.disable_tqdm)
    collator = collator_for(student, tokenizer, arguments)
    models = {"teacher": teacher, "student, undistilled": copy.deepcopy(student).eval(), "student": student}
    arguments.max_steps = training_steps(arguments, examples(first))
    arguments.remove_unused_columns = False  # the collator needs what the model does not take
    arguments.accelerator_config.dispatch_batches = False  # each process reads the stream and takes its share
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=stream,
        data_collator=collator,
        processing_class=tokenizer,
    )
    seen = train_and_save(trainer, tokenizer, folder)

    student.eval()
    record = {"options": vars(options), "training": seen}
    with results_kept(folder, record):
        rows: dict[str, list[Any]] = {"parameters": [model.num_parameters() for model in models.values()]}
        if options.validation_text:
            batches = fixed_batches(kept, collator_for(student, tokenizer))
            judge = masked_quality if has_head else partial(last_layer_distance, teacher)
            found = [judge(model.to(arguments.device), batches) for model in models.values()]
            rows |= {name: [values[name] for values in found] for name in found[0]}
            notes.append(f"Judged on {len(kept):,} examples of {', '.join(options.validation_text)}.")
        title = f"{options.recipe}, {seen['samples']:,} examples seen, at most {length} tokens"
        table = results_table(title, models, rows, notes="\n".join(notes))
        finish(
            folder,
            table,
            {**record, "models": list(models), "rows": rows, "notes": notes},
        )


if __name__ == "__main__":
    main()
