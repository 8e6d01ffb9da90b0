"""Distil a GPT-2 into a factored one on plain text, as `distill` does, or as KnGPT2 does (sections 3 and 4).

    python examples/run_clm_kd.py --teacher path/to/gpt2 --train_text text.txt --validation_text held_out.txt \
        --max_steps 1000 --output_dir out/gpt2
    python examples/run_clm_kd.py ... --recipe kngpt2
    python examples/run_clm_kd.py ... --layers 0,2,4,7,9,11

The student learns the teacher's embedding layer, attention, hidden states and logits, and to predict the next word;
with --recipe kngpt2, as in the paper, it does not learn the logits. It is factored from the teacher, by a plan that is
searched and calibrated on the text or by that of the paper, or goes on from an earlier student (--start); with --layers
it is a dense model that has some of the teacher's layers, as DistilGPT2 has, to compare with. Text has a blank line
between documents, or is one running text; a table (.json, .csv, .parquet) or a dataset of the Hub has one document in
each row of its column `text`. It is read as a stream. Perplexity, before and after, stands beside the protocol by which
it was measured, for it depends on it. --resume_from_checkpoint true goes on with a run that stopped, after it has read
again what that run had read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedModel, default_data_collator

from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationTrainer, keep_layers
from kronecker_transformers.experiments.lessons import calibration_lines
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
from kronecker_transformers.models.kronecker_family import longest_sequence
from kronecker_transformers.recipes import RECIPES, StudentOptions, parse_script
from kronecker_transformers.tasks.language_modeling import block_examples
from kronecker_transformers.tasks.perplexity import NORMALISATIONS, perplexity
from kronecker_transformers.tasks.text import WHOLE, Example, Share, TextSource, TextStream, stream_seed, training_steps


@dataclass
class Options(StudentOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of a GPT2LMHeadModel."})
    train_text: list[str] = field(metadata={"help": "Text files, tables, or one dataset of the Hub."})
    output_dir: str = field(metadata={"help": "New folder for checkpoints, the student and results.json."})
    validation_text: str | None = field(
        default=None,
        metadata={"help": "Text file, table or dataset (its split validation) to measure perplexity on."},
    )
    window: int | None = field(default=None, metadata={"help": "Tokens in its window; default: the model's maximum."})
    stride: int | None = field(default=None, metadata={"help": "Tokens by which it moves; default: half of it."})
    normalisation: str = field(
        default="none", metadata={"help": "What is done to that text first.", "choices": list(NORMALISATIONS)}
    )
    recipe: str = field(default="language-model", metadata={"help": "Defaults of plan and training."})
    layers: str | None = field(
        default=None, metadata={"help": "The teacher's layers, from 0, of a dense student: 0,2,4; no plan then."}
    )
    fraction: float = field(default=1.0, metadata={"help": "Share of the documents, above 0, at most 1."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens; default: that of the recipe."})

    def __post_init__(self) -> None:
        if self.layers is not None and (self.plan or self.ratio or self.start or self.calibration):
            raise ValueError(
                f"--layers {self.layers} makes a dense student; leave out --plan, --ratio, --start and --calibration"
            )
        if self.layers is not None and not all(part.strip().isdecimal() for part in self.layers.split(",")):
            raise ValueError(f"--layers {self.layers!r} must be numbers with commas between them, such as 0,2,4")


def main(argv: list[str] | None = None) -> None:
    """Distil a student and judge it beside its teacher."""
    options, arguments = parse_script(Options, "clm", argv)
    check_evaluation(arguments.eval_strategy)
    check_stream(arguments)
    recipe = RECIPES[options.recipe]["clm"]
    folder = check_output(options.output_dir, arguments.resume_from_checkpoint)
    text = TextSource(tuple(options.train_text), options.fraction)
    held_out = TextSource((options.validation_text,), split="validation").text() if options.validation_text else None
    if held_out is not None and not held_out.split():
        raise ValueError(f"validation_text {options.validation_text!r} has 0 words; give another, or leave it out")

    teacher, tokenizer = teacher_and_tokenizer(options.teacher)
    longest = checked_maximum(teacher, options)
    check_special_tokens(tokenizer, "eos")
    options.max_length = length = checked_length(teacher, options.max_length, recipe.length)
    if options.layers:
        arguments.muon = False  # there are no factors
        arguments.layer_map = [int(layer) for layer in options.layers.split(",")]
        student = keep_layers(teacher, arguments.layer_map)
    else:
        texts = calibration_lines(text, teacher, tokenizer)
        options.check(teacher, tokenizer, recipe, texts, arguments)
        student = options.student(teacher, tokenizer, recipe, texts, progress=not arguments.disable_tqdm)
    options.choose_rate(arguments, student)
    models = {"teacher": teacher, "student, undistilled": copy.deepcopy(student), "student": student}

    def examples(seed: int, share: Share = WHOLE) -> Iterable[Example]:
        return block_examples(text, tokenizer, length, share)

    first = stream_seed(arguments)
    arguments.max_steps = training_steps(arguments, examples(first))
    arguments.accelerator_config.dispatch_batches = False  # each process reads the stream and takes its share
    trainer = DistillationTrainer(
        student,
        teacher,
        arguments,
        train_dataset=TextStream(examples, first),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    seen = train_and_save(trainer, tokenizer, folder)

    record = {"options": vars(options), "training": seen}
    with results_kept(folder, record):
        rows: dict[str, list[Any]] = {"parameters": [model.num_parameters() for model in models.values()]}
        protocol = None
        if held_out is not None:
            window = options.window or longest
            found = [
                perplexity(
                    model.to(arguments.device),
                    tokenizer,
                    held_out,
                    window=window,
                    stride=options.stride or window // 2,
                    normalisation=options.normalisation,
                    progress=not arguments.disable_tqdm,
                )
                for model in models.values()
            ]
            rows["perplexity per token"] = [result.per_token for result in found]
            rows["perplexity per word"] = [result.per_word for result in found]
            protocol = f"{found[0].protocol}; {found[0].tokens:,} tokens, {found[0].words:,} words"
        kind = f"layers {options.layers} of the teacher" if options.layers else options.recipe
        table = results_table(
            f"{kind}, {seen['samples']:,} blocks of {length} tokens seen",
            models,
            rows,
            notes=f"Perplexity: {protocol}" if protocol else "",
        )
        finish(
            folder,
            table,
            {**record, "models": list(models), "rows": rows, "protocol": protocol},
        )


def checked_maximum(teacher: PreTrainedModel, options: Options) -> int:
    """The teacher's longest sequence, in tokens, after a check of the teacher, the window and its stride."""
    if not isinstance(teacher, GPT2LMHeadModel):
        raise ValueError(
            f"teacher {options.teacher!r} is a {type(teacher).__name__}; a GPT2LMHeadModel is needed; give the model "
            "from before its fine-tuning"
        )
    longest: int = longest_sequence(teacher)
    if options.window is not None and not 2 <= options.window <= longest:
        raise ValueError(f"window={options.window} must be from 2 to the teacher's {longest} tokens; choose another")
    if options.stride is not None and not 1 <= options.stride < (options.window or longest):
        raise ValueError(
            f"stride={options.stride} must be at least 1 and below window={options.window or longest}; choose another"
        )
    return longest


if __name__ == "__main__":
    main()
