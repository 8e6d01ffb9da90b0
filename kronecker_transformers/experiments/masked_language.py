"""Stage 1 of KroneckerBERT (section 3.5): heads for a teacher that has none, batches, and how models are judged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..checkpoint.load import load_teacher
from ..distillation import DistillationArguments
from ..distillation.losses import IGNORED, hidden_state_mse
from ..models.kronecker_family import DENSE_CLASSES, FAMILIES, heads_of, pooler_of
from ..tasks.text import Example, TextSource, TextStream
from .run import TEACHER, save_once, train_plainly

Batch = dict[str, torch.Tensor]
Collator = Callable[[list[Example]], Any]

_SEEDS_APART = 1000
"""Of two processes: those between are for the workers of a data loader, each of which adds its number."""
_STAGES = (("words", "next_sentence"), ("words",), ())
"""Kinds of the heads of a teacher that this stage is for."""


def _classes(teacher: PreTrainedModel) -> dict[tuple[str, ...], Any]:
    """The stock classes of the teacher's family that this stage is for, by the kinds of their heads."""
    by_class = FAMILIES[teacher.config.model_type].heads
    found = {tuple(head.kind for head in heads): DENSE_CLASSES[factored] for factored, heads in by_class.items()}
    return {kinds: found[kinds] for kinds in _STAGES if kinds in found}


def check_teacher(teacher: PreTrainedModel, source: str, train_heads: int) -> None:
    """Refuse a teacher that this stage is not for."""
    classes = _classes(teacher)
    if ("words",) not in classes:
        raise ValueError(
            f"teacher {source!r} is a {type(teacher).__name__}, whose family predicts no masked words; distil it with "
            "run_clm_kd.py"
        )
    if type(teacher) not in classes.values():
        *others, last = (cls.__name__ for cls in classes.values())
        raise ValueError(
            f"teacher {source!r} is a {type(teacher).__name__}; this stage needs a {', '.join(others)} or {last}; give "
            "the model from before its fine-tuning"
        )
    if train_heads and heads_of(teacher):
        raise ValueError(
            f"train_heads={train_heads} is for a teacher without heads, not a {type(teacher).__name__}; leave it out"
        )


def has_next_sentence(
    teacher: PreTrainedModel, text: TextSource, gets_heads: bool, note: Callable[[str], None]
) -> bool:
    """Whether there is next-sentence prediction; if not, it is noted why."""
    fresh = not heads_of(teacher)
    if fresh and not gets_heads:
        return False
    if _STAGES[0] not in _classes(teacher):
        note(f"no next-sentence prediction: no model of the family of {type(teacher).__name__} has a head for it")
    elif pooler_of(teacher) is None if fresh else len(heads_of(teacher)) == 1:
        part = "the pooler" if fresh else "a head"
        note(f"no next-sentence prediction: the teacher is a {type(teacher).__name__} without {part} for it")
    elif not text.has_documents():
        note("no next-sentence prediction: the text has no documents (a blank line between two of them)")
    elif not text.has_following_sentences():
        note("no next-sentence prediction: the documents of the text are single sentences")
    else:
        return True
    return False


def collator_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments | None = None
) -> Collator:
    """Makes a batch for this model: masks anew each time for one with a head, no masks for one without.

    With the arguments of a training, masks are drawn from its seed, in each process others, and from nothing else:
    batches are fetched before their step, so the state of torch's generator in a checkpoint is not that of its step.
    """
    seed = None if training is None else training.seed + _SEEDS_APART * training.process_index
    names = {"input_ids", "token_type_ids", "attention_mask"}
    mask, pad = DataCollatorForLanguageModeling(tokenizer, seed=seed), DataCollatorWithPadding(tokenizer)
    heads = heads_of(model)

    def collate(examples: list[Example]) -> Any:
        if not heads:
            return pad([{name: example[name] for name in names} for example in examples])
        batch = mask(examples)
        for head in heads[1:]:  # next-sentence prediction, for text without it
            batch.setdefault(head.labels, torch.full((len(examples),), IGNORED))
        return batch

    return collate


def headed(base: PreTrainedModel, next_sentence: bool) -> PreTrainedModel:
    """The teacher with new heads, which alone require a gradient.

    The words' embeddings are also the output layer of the new head.
    """
    cls = _classes(base)[_STAGES[0] if next_sentence else _STAGES[1]]
    config: Any = copy.deepcopy(base.config)
    config.tie_word_embeddings = True
    model: PreTrainedModel = cls(config)
    model.base_model.load_state_dict(base.state_dict(), strict=False)  # a masked LM has no pooler
    model.base_model.requires_grad_(False)
    return model


def train_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: TextStream,
    steps: int,
    like: DistillationArguments,
    folder: Path,
) -> PreTrainedModel:
    """The teacher with its new heads trained, saved in ``folder/teacher``; if that is there already, that one.

    All that it had before stays bit by bit as it was.
    """
    saved = folder / TEACHER
    if not saved.exists():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # what is frozen needs none
        train_plainly(
            model,
            stream,
            collator_for(model, tokenizer, like),
            like,
            max_steps=steps,
            learning_rate=like.learning_rate,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},
        )
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
