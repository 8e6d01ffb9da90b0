"""What a student learns from, without labels: plain text for any head, or the texts of a GLUE task."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, TypeVar

from datasets import DatasetDict
from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..checkpoint.pooling import Pooling
from ..checkpoint.sentence_modules import encoder_settings
from ..compression.activations import COUNTED, Text
from ..compression.calibration import TOKENS_PER_INPUT, largest_inputs
from ..distillation import TeacherMemory
from ..models.kronecker_family import heads_of, longest_sequence
from ..tasks.augmentation import Augmentation, Row
from ..tasks.language_modeling import block_examples, masked_examples, sentence_examples
from ..tasks.pairs import encode_texts
from ..tasks.text import WHOLE, Example, Share, TextSource
from .classification import check_unnamed_labels, judged, load_classifier, load_task, tokenized
from .masked_language import collator_for
from .run import check_special_tokens

HELD_OUT_SHARE, HELD_OUT, WATCHED = 0.1, 2000, 500
"""Share of the documents that is held out; examples of it for the end, and to watch meanwhile."""
FEWEST = 50
"""Documents, of which a tenth is held out; of a text that has fewer, lines are."""
CALIBRATION, CALIBRATION_TOKENS = 512, 4096
"""Texts on which the plan is searched and the factors are fitted; of short ones more, for about so many tokens, which
are some blocks for a causal model, and for `TOKENS_PER_INPUT`.
"""
AUGMENTED = 0.5
"""Share of a task's rows that are augmented in each epoch; of plain sentences, which are from the second epoch on."""
_ENCODED = 256
"""Rows that are encoded together."""
WEIGHTS = {"attention_mse_weight": 0.05, "logits_weight": 0.05, "supervised_weight": 0.0}
"""Of a teacher with a head; chosen on the dev sets of STS-B and MRPC (benchmarks/glue.py)."""
SHARES = {"supervised_weight": 0.0, "balanced": True}
"""Equal shares of the gradient for all losses of the paper that need no labels, but for one that is almost 0."""
CAUSAL = {"logits_weight": 1.0, "balanced": True}
"""The same for all losses of KnGPT2, and for the logits."""


_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Lesson:
    """What a student learns from, and how."""

    batch: int
    length: int
    objective: str
    examples: Callable[[int, Share], Iterable[Example]]
    """One epoch, by its seed, or a share of it."""
    collate: Callable[[list[Example]], Any]
    held_out: Sequence[Example] = ()
    """To compare on."""
    sentences: list[str] = field(default_factory=list)
    """The same as sentences, for teachers without a head."""
    calibration: Sequence[Text] = ()
    counted: Sequence[Text] = ()
    """Texts of which only the words are counted, for the heads with which it was tried."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    factored_weights: Mapping[str, Any] | None = None
    """Of a factored student, in place of these: for the heads with which others were tried."""
    scores: Callable[[PreTrainedModel], dict[str, float]] | None = None
    """The task's own metrics."""
    memory: TeacherMemory = field(default_factory=TeacherMemory)
    """What the teacher has said of sentences, for all students that learn this."""
    muon: bool = False
    """Whether factors of linear layers are trained with Muon: for the heads with which it was tried."""
    pooling: Pooling | None = None
    """Of sentence embeddings, without the prompt where that does not count."""


def text_lesson(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: TextSource, seed: int) -> Lesson:
    """Text without labels, for any head.

    Raises:
        ValueError: too little text, a tokenizer that lacks a token, or a prompt that leaves no room for a sentence.
    """
    heads, longest = heads_of(teacher), longest_sequence(teacher)
    kind = heads[0].kind if heads else None
    collate: Callable[[list[Example]], Any] = DataCollatorWithPadding(tokenizer)
    make: Callable[[TextSource, int, Share], Iterable[Example]]
    examples: Callable[[int, Share], Iterable[Example]]
    needs = {"words": ("pad", "mask", "cls", "sep"), "next_token": ("eos",)}.get(str(kind), ("pad",))
    check_special_tokens(tokenizer, *needs)
    length, batch, objective, prompt = min(longest, 128), 32, "kronecker_bert", ""
    weights, pooling = dict(WEIGHTS), None
    if kind is None:
        settings = encoder_settings(teacher, tokenizer)
        length, batch, prompt = min(length, settings.max_length or length), 64, settings.prompt
        settings.check_length(length, tokenizer)
        objective, weights, pooling = "sentence_encoder", {}, settings.pooling
        make = partial(_sentences, tokenizer, length, prompt)
    elif kind == "next_token":
        length, batch = min(longest, 256), 16
        objective, weights, collate = "kngpt2", dict(CAUSAL), default_data_collator
        make = partial(_blocks, tokenizer, length)
    elif kind == "words":
        weights["supervised_weight"] = 0.05
        collate = collator_for(teacher, tokenizer)
        make = partial(_masked_text, tokenizer, length)
    elif kind == "choices":
        batch, collate = 16, DataCollatorForMultipleChoice(tokenizer)
        make = partial(_choices, tokenizer, length)
    else:
        make = partial(_sentences, tokenizer, length, prompt)
    if len(list(islice(source.documents(), FEWEST))) < FEWEST:  # a tenth of them would be nothing, or nearly all
        source = replace(source, by_line=True)
    held_out, train = source.part(0, HELD_OUT_SHARE), source.part(HELD_OUT_SHARE, 1)
    sentences = held_out.lines(HELD_OUT + WATCHED)
    kept = list(islice(make(held_out, seed, WHOLE), HELD_OUT + WATCHED))
    if len(sentences) < 10 or len(kept) < 2:
        raise ValueError(
            f"text {', '.join(source.names)!r} is too little: {len(sentences)} held-out lines, {len(kept)} held-out "
            "examples; give at least a few hundred lines, better some thousand"
        )
    memory, counted, examples = TeacherMemory(), list[str](), partial(make, train)
    if kind in (None, "sequence"):
        counted = train.lines(COUNTED)
        examples = augmented_sentences(train, AUGMENTED, seed, counted, teacher, tokenizer, length, prompt, memory)
    return Lesson(
        batch, length, objective, examples, collate, kept, sentences,
        calibration_lines(train, teacher, tokenizer, prompt),
        [prompt + line for line in counted] if kind is None else [], weights,
        factored_weights=SHARES if kind == "sequence" else None,
        memory=memory, muon=kind in (None, "sequence", "next_token"), pooling=pooling,
    )  # fmt: skip


def task_lesson(
    teacher: str, name: str, data_dir: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Lesson]:
    """A GLUE task, half of its texts augmented, and the teacher that was fine-tuned on it.

    Raises:
        ValueError: an unknown task, a teacher without a classifier for it, or a text without any token.
    """
    task = load_task(name, data_dir, None, None)
    dense, tokenizer, task, certain = load_classifier(teacher, task)
    if certain is None:
        raise ValueError(
            f"teacher {teacher!r} is no classifier yet; fine-tune it first, with examples/run_glue_kd.py --teacher_only"
        )
    length = min(longest_sequence(dense), 128)
    collate = DataCollatorWithPadding(tokenizer)
    splits = task.evaluation_splits
    data = DatasetDict({split: tokenized(task.data[split], task, tokenizer, length) for split in splits})
    if certain is False:
        check_unnamed_labels(dense, task, data, collate)
    held_out = list(islice(data[splits[0]], HELD_OUT + WATCHED))
    rows = task.rows()
    examples = augmented_examples(rows, AUGMENTED, dense, tokenizer, length)
    return dense, tokenizer, Lesson(
        32, length, "kronecker_bert", examples, collate, held_out, [], calibration_rows(rows, dense, tokenizer),
        weights=WEIGHTS, factored_weights=SHARES,
        scores=partial(judged, task=task, data=data, collator=collate), muon=True,
    )  # fmt: skip


def calibration_lines(
    source: TextSource,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    number: int | None = None,
) -> list[Text]:
    """Lines of a text, each after the prompt, on which a plan is searched and factors are fitted.

    So many from its start, or enough for this teacher, from all over the beginning of the text.
    """
    if number is not None:
        return [prompt + line for line in source.lines(number)]
    lines = [prompt + line for line in source.lines(20 * CALIBRATION)]
    return [*spread(lines, _enough(spread(lines, CALIBRATION), teacher, tokenizer))]


def calibration_rows(rows: Sequence[Row], teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Texts, or pairs of them, of a task, on which a plan is searched and factors are fitted."""
    number = _enough([" ".join(row) for row in spread(rows, CALIBRATION)], teacher, tokenizer)
    return [row[0] if len(row) == 1 else (row[0], row[1]) for row in spread(rows, number)]


def spread(rows: Sequence[_Row], number: int) -> list[_Row]:
    """So many of the rows, from all over them, since they may be sorted."""
    number = min(number, len(rows))
    return [rows[place * len(rows) // number] for place in range(number)]


def _enough(texts: Sequence[str], teacher: PreTrainedModel, tokenizer: Any) -> int:
    """How many texts like these to calibrate on."""
    cut = {"truncation": True, "max_length": longest_sequence(teacher)}
    tokens = sum(len(tokenizer(text, **cut).input_ids) for text in texts)
    needed = max(CALIBRATION_TOKENS, TOKENS_PER_INPUT * largest_inputs(teacher.base_model.modules()))
    return max(CALIBRATION, -(-needed * len(texts) // max(1, tokens)))


def augmented_examples(
    rows: Sequence[Row],
    augmented: float,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> Callable[[int, Share], Iterator[Example]]:
    """What makes the examples of an epoch, for `TextStream`: a task's rows in random order, without labels.

    Args:
        rows: all of the training set.
        augmented: share of them whose texts are augmented, 0 to 1; others in each epoch.
        teacher: of the embedding in which near words are looked up.
        tokenizer: of the teacher.
        length: tokens at which a text, or a pair of them, is cut.

    Raises:
        ValueError: a text without any token.
    """
    for _ in _encoded(rows, tokenizer, length):
        pass  # a text without tokens is refused now, not after hours
    augmentation = Augmentation(rows, teacher, tokenizer)

    def examples(seed: int, share: Share) -> Iterator[Example]:
        generator = random.Random(seed)
        order = share.of(generator.sample(rows, len(rows)))
        found = (augmentation.row(row, generator) if generator.random() < augmented else row for row in order)
        yield from _encoded(found, tokenizer, length)

    return examples


def augmented_sentences(
    source: TextSource,
    augmented: float,
    first: int,
    texts: Sequence[str],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    prompt: str = "",
    memory: TeacherMemory | None = None,
) -> Callable[[int, Share], Iterator[Example]]:
    """What makes the examples of an epoch, for `TextStream`: the sentences of a text, in the first epoch as they are.

    Args:
        source: the text.
        augmented: share of the sentences that are augmented in each later epoch, 0 to 1; others in each.
        first: seed of the first epoch.
        texts: their words are those that may be replaced; of a long text some of its lines.
        teacher: of the embedding in which near words are looked up.
        tokenizer: of the teacher.
        length: tokens at which a sentence is cut.
        prompt: before each sentence.
        memory: that of the teacher, which keeps nothing new in an epoch with augmented sentences.
    """
    augmentation = Augmentation([(text,) for text in texts] if augmented else [], teacher, tokenizer)

    def examples(seed: int, share: Share) -> Iterator[Example]:
        generator, now = random.Random(seed), 0.0 if seed == first else augmented
        if memory is not None:
            memory.keeps = not now

        def augment(text: str) -> str:
            return augmentation.text(text, generator) if generator.random() < now else text

        return sentence_examples(source.share(share), tokenizer, length, prompt, augment)

    return examples


def _encoded(rows: Iterable[Row], tokenizer: Any, length: int) -> Iterator[Example]:
    left = iter(rows)
    while some := list(islice(left, _ENCODED)):
        first, *second = zip(*some, strict=True)
        encoded = encode_texts(tokenizer, first, second[0] if second else None, length)
        yield from ({name: values[place] for name, values in encoded.items()} for place in range(len(some)))


def _sentences(
    tokenizer: Any, length: int, prompt: str, source: TextSource, seed: int, share: Share
) -> Iterator[Example]:
    return sentence_examples(source.share(share), tokenizer, length, prompt)


def _blocks(tokenizer: Any, length: int, source: TextSource, seed: int, share: Share) -> Iterator[Example]:
    return block_examples(source, tokenizer, length, share)


def _masked_text(tokenizer: Any, length: int, source: TextSource, seed: int, share: Share) -> Iterator[Example]:
    return masked_examples(source.share(share), tokenizer, length, next_sentence=False, seed=seed)


def _choices(tokenizer: Any, length: int, source: TextSource, seed: int, share: Share) -> Iterator[Example]:
    """Each line beside the one that follows it, as two choices."""
    for pair in pairwise(sentence_examples(source.share(share), tokenizer, length)):
        yield {**{name: [example[name] for example in pair] for name in pair[0]}, "labels": 0}  # nobody looks at it
