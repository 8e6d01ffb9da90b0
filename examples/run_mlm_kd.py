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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kronecker_transformers.checkpoint.load import load_teacher
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer
from kronecker_transformers.distillation.experiment import (
    TEACHER,
    check_evaluation,
    check_output,
    check_special_tokens,
    checked_length,
    finish,
    results_kept,
    save_once,
    teacher_and_tokenizer,
    train_and_save,
    train_plainly,
)
from kronecker_transformers.distillation.losses import IGNORED, hidden_state_mse
from kronecker_transformers.recipes import RECIPES, StudentOptions, parse_script
from kronecker_transformers.tasks.language_modeling import (
    Example,
    TextSource,
    TextStream,
    length_group,
    masked_examples,
    training_steps,
)

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
Collator = Callable[[list[Example]], Any]


@dataclass
class Options(StudentOptions):
    """The script's own options."""

    teacher: str = field(metadata={"help": "Folder or Hub name of a BERT, with its pre-training heads or without."})
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
    """Tell the story."""
    options, arguments = parse_script(Options, "mlm", argv)
    check_evaluation(arguments.eval_strategy)
    recipe = RECIPES[options.recipe]["mlm"]
    folder = check_output(options.output_dir, bool(arguments.resume_from_checkpoint))
    text = TextSource(tuple(options.train_text), options.fraction)
    notes: list[str] = []

    def note(sentence: str) -> None:
        logger.warning(sentence)
        notes.append(sentence)

    teacher, tokenizer = teacher_and_tokenizer(options.teacher)
    check_teacher(teacher, options)
    predicts_words = options.train_heads > 0 or not isinstance(teacher, BertModel)
    check_special_tokens(tokenizer, "cls", "sep", "pad", *(["mask"] if predicts_words else []))
    options.max_length = length = checked_length(teacher, options.max_length, recipe.length)
    next_sentence = has_next_sentence(teacher, text, options, note)
    examples = partial(masked_examples, text, tokenizer, length, next_sentence, short=options.short_fraction)
    stream = TextStream(examples, arguments.seed, group=length_group(arguments))
    if options.train_heads:
        teacher = with_heads(teacher, tokenizer, next_sentence, stream, options.train_heads, arguments, folder)
        note(f"the heads of the teacher were trained here, in {options.train_heads:,} steps; the rest of it was frozen")
    has_head = not isinstance(teacher, BertModel)
    if not has_head:
        arguments.supervised_weight = arguments.logits_weight = 0.0
        note(
            f"{type(teacher).__name__} has no head to predict words: the student learns the teacher's embedding layer, "
            "attention and hidden states alone, without masks (supervised_weight=0, logits_weight=0)"
        )
    if not arguments.weights():
        raise ValueError("all weights that are left are 0; give an intermediate term a weight, or use --train_heads")
    student = options.student(teacher, tokenizer, recipe, progress=not arguments.disable_tqdm)
    collator = collator_for(student, tokenizer)
    models = {"teacher": teacher, "student, undistilled": copy.deepcopy(student).eval(), "student": student}
    kept: list[Example] = []
    if options.validation_text:
        held_out = TextSource(tuple(options.validation_text), split="validation")
        pairs = next_sentence and held_out.has_following_sentences()
        kept += islice(masked_examples(held_out, tokenizer, length, pairs, short=0), options.validation_examples)
        if not kept:
            raise ValueError(f"validation_text={options.validation_text} gives 0 examples; give more text")

    arguments.max_steps = training_steps(arguments, examples(arguments.seed))
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
            batches = fixed_batches(kept, collator)
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


def check_teacher(teacher: PreTrainedModel, options: Options) -> None:
    """Refuse a teacher that this stage is not for."""
    if type(teacher) not in (BertForPreTraining, BertForMaskedLM, BertModel):
        raise ValueError(
            f"teacher {options.teacher!r} is a {type(teacher).__name__}; this stage needs a BertForPreTraining, "
            "BertForMaskedLM or BertModel; give the model from before its fine-tuning"
        )
    if options.train_heads and not isinstance(teacher, BertModel):
        raise ValueError(
            f"train_heads={options.train_heads} is for a teacher without heads, not a {type(teacher).__name__}; "
            "leave it out"
        )


def has_next_sentence(
    teacher: PreTrainedModel, text: TextSource, options: Options, note: Callable[[str], None]
) -> bool:
    """Whether there is next-sentence prediction; if not, it is noted why."""
    fresh = isinstance(teacher, BertModel)
    if options.no_next_sentence or (fresh and not options.train_heads):
        return False
    if getattr(teacher, "pooler", None) is None if fresh else isinstance(teacher, BertForMaskedLM):
        part = "the pooler" if fresh else "a head"
        note(f"no next-sentence prediction: the teacher is a {type(teacher).__name__} without {part} for it")
    elif not text.has_documents():
        note("no next-sentence prediction: the text has no documents (a blank line between two of them)")
    elif not text.has_following_sentences():
        note("no next-sentence prediction: the documents of the text are single sentences")
    else:
        return True
    return False


def collator_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Collator:
    """Makes a batch for this model: masks anew each time for one with a head, no masks for one without."""
    names = {"input_ids", "token_type_ids", "attention_mask"}
    mask, pad = DataCollatorForLanguageModeling(tokenizer), DataCollatorWithPadding(tokenizer)

    def collate(examples: list[Example]) -> Any:
        if model.base_model is model:
            return pad([{name: example[name] for name in names} for example in examples])
        batch = mask(examples)
        if "PreTraining" in type(model).__name__ and "next_sentence_label" not in batch:
            batch["next_sentence_label"] = torch.full((len(examples),), IGNORED)
        return batch

    return collate


def with_heads(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    next_sentence: bool,
    stream: TextStream,
    steps: int,
    like: DistillationArguments,
    folder: Path,
) -> PreTrainedModel:
    """The teacher with heads that were trained on it, saved in ``folder/teacher``; if that is there already, that one.

    All that it had stays bit by bit as it was; the words' embeddings are also the output layer of the new head.
    """
    saved = folder / TEACHER
    if not saved.exists():
        config: Any = copy.deepcopy(base.config)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # what is frozen needs none
        config.tie_word_embeddings = True
        model: PreTrainedModel = (BertForPreTraining if next_sentence else BertForMaskedLM)(config)
        model.base_model.load_state_dict(base.state_dict(), strict=False)  # a masked LM has no pooler
        model.base_model.requires_grad_(False)
        train_plainly(
            model,
            stream,
            collator_for(model, tokenizer),
            like,
            max_steps=steps,
            learning_rate=like.learning_rate,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            setattr(model.config, name, getattr(base.config, name))
        save_once(saved, model, tokenizer)
    return load_teacher(saved)[0]


def fixed_batches(examples: list[Example], collator: Collator, size: int = 32) -> list[Batch]:
    """Batches with masks that are the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [collator(examples[start : start + size]) for start in range(0, len(examples), size)]


@torch.no_grad()
def masked_quality(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Accuracy and loss at the masked words, and accuracy for the next sentences where there are any."""
    right = loss = words = right_pairs = pairs = 0.0
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if "label" not in name}
        output = model(**inputs)
        chosen = batch["labels"] != IGNORED
        labels, logits = batch["labels"][chosen], output[0].cpu()[chosen].float()
        words += len(labels)
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        if "next_sentence_label" in batch:
            known = batch["next_sentence_label"] != IGNORED
            pairs += int(known.sum())
            answers = output["seq_relationship_logits"].cpu().argmax(-1)
            right_pairs += int((answers == batch["next_sentence_label"])[known].sum())
    found = {"masked words, accuracy": right / max(words, 1), "masked words, loss": loss / max(words, 1)}
    return {**found, "next sentence, accuracy": right_pairs / pairs} if pairs else found


@torch.no_grad()
def last_layer_distance(teacher: PreTrainedModel, model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean squared difference of the last hidden states from the teacher's."""
    distances = []
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        mine, theirs = (m(**inputs).last_hidden_state for m in (model, teacher))
        distances.append(hidden_state_mse(mine, theirs, inputs["attention_mask"].bool()))
    return {"last layer, distance (MSE)": float(torch.cat(distances).mean())}


if __name__ == "__main__":
    main()
