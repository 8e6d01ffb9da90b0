"""What a student is worth beside its teacher, on text without labels, in the terms of what the teacher is used for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.sentence_modules import encoder_settings
from ..models.kronecker_family import Head, family_of, heads_of
from .sentences import encode, neighbour_agreement, similarity_fidelity

Judge = Callable[[PreTrainedModel], dict[str, float]]
"""Values of a model by their names; the first is the one that is shown while a student learns."""
IGNORED = -100


def judge_for(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    batches: Sequence[Mapping[str, Tensor]],
    length: int,
) -> Judge:
    """How near a student is to this teacher on held-out text.

    Args:
        teacher: dense, with any head that is supported.
        tokenizer: its tokenizer.
        sentences: for a teacher without a head, whose sentence embeddings are compared.
        batches: for one with a head, what the collator of its training makes of the same sentences.
        length: tokens at which sentences are cut.
    """
    heads = heads_of(teacher)
    if not heads:
        settings = encoder_settings(teacher, tokenizer)
        embedded = partial(encode, tokenizer=tokenizer, sentences=sentences, max_length=length, settings=settings)
        return partial(_similarity, embedded, embedded(teacher))
    wanted = [list(_decisions(teacher, head, batches)) for head in heads]
    return partial(_agreement, heads, wanted, batches)


def _similarity(embedded: Callable[..., Tensor], wanted: Tensor, model: PreTrainedModel) -> dict[str, float]:
    found = embedded(model)
    return {
        "similarity fidelity (Spearman)": similarity_fidelity(wanted, found),
        "nearest 10 neighbours in common": neighbour_agreement(wanted, found),
    }


@torch.no_grad()
def _outputs(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Iterable[tuple[Any, Any]]:
    """Batches and what the model gives for them."""
    causal = {"use_cache": False} if family_of(model).causal else {}
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if "label" not in name}
        yield batch, model(**inputs, **causal)


def _decisions(model: PreTrainedModel, head: Head, batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Tensor]:
    """What a head decides for each batch: classes, for the tokens that count one after the other; or scores."""
    for batch, output in _outputs(model, batches):
        logits = output[head.logits].float().cpu()
        if head.kind == "sequence" and _is_score(model):
            yield logits.flatten()
        elif head.kind == "sequence" and model.config.problem_type == "multi_label_classification":
            yield logits > 0
        elif head.kind == "span":
            yield logits.masked_fill(batch["attention_mask"] == 0, -torch.inf).argmax(-1)
        elif head.kind == "tokens":
            yield logits.argmax(-1)[batch["attention_mask"] == 1]
        elif head.kind == "words":
            yield logits.argmax(-1)[batch[head.labels] != IGNORED]
        else:
            yield logits.argmax(-1)


def _is_score(model: PreTrainedModel) -> bool:
    return model.config.problem_type == "regression" or (model.config.num_labels == 1 and not model.config.problem_type)


def _agreement(
    heads: Sequence[Head], wanted: Sequence[Sequence[Tensor]], batches: Sequence[Mapping[str, Tensor]], model: Any
) -> dict[str, float]:
    found = [list(_decisions(model, head, batches)) for head in heads if head.kind != "next_token"]
    values: dict[str, float] = {}
    if heads[0].kind in ("words", "next_token"):
        name = "perplexity" if heads[0].kind == "next_token" else "perplexity at masked words"
        values[name] = math.exp(min(700.0, _mean_loss(model, heads[0], batches)))
    if heads[0].kind == "span":
        same = [
            (torch.stack(ours) == torch.stack(theirs)).all(0)
            for ours, theirs in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True)
        ]
        return {"answers as the teacher's": float(torch.cat(same).float().mean())}
    for head, ours, theirs in zip(heads, found, wanted, strict=False):
        if head.kind == "sequence" and _is_score(model):
            values["scores (Spearman with the teacher's)"] = float(
                spearmanr(torch.cat(ours), torch.cat(list(theirs))).statistic
            )
        elif head.kind != "next_sentence":
            name = {"words": "masked words", "tokens": "labels of tokens", "choices": "choices"}.get(
                head.kind, "labels"
            )
            same = [(a == b).flatten() for a, b in zip(ours, theirs, strict=True)]
            values[f"{name} as the teacher's"] = float(torch.cat(same).float().mean())
    return values


def _mean_loss(model: PreTrainedModel, head: Head, batches: Iterable[Mapping[str, Tensor]]) -> float:
    total, count = 0.0, 0
    for batch, output in _outputs(model, batches):
        logits, labels = output[head.logits].float().cpu(), batch[head.labels]
        if head.kind == "next_token":
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / max(count, 1)
