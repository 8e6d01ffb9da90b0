"""What a student is worth beside its teacher, on text without labels, in the terms of what the teacher is used for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

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
IGNORED = -100  # label of a position without a target


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
    wanted, _ = _look(teacher, heads, batches)
    return partial(_agreement, heads, wanted, batches)


def _similarity(embedded: Callable[..., Tensor], wanted: Tensor, model: PreTrainedModel) -> dict[str, float]:
    found = embedded(model)
    return {
        "similarity fidelity (Spearman)": similarity_fidelity(wanted, found),
        "nearest 10 neighbours in common": neighbour_agreement(wanted, found),
    }


@torch.no_grad()
def _look(
    model: PreTrainedModel, heads: Sequence[Head], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[Head, list[Tensor]], float]:
    """What the heads decide, batch by batch, in one pass; and the mean loss of a language model, else 0."""
    causal = {"use_cache": False} if family_of(model).causal else {}
    decided: dict[Head, list[Tensor]] = {head: [] for head in heads if head.kind not in ("next_token", "next_sentence")}
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if "label" not in name}
        output = model(**inputs, **causal)
        for head in decided:
            decided[head].append(_decision(model, head, batch, output[head.logits].float()).cpu())
        if heads[0].kind in ("words", "next_token"):
            logits, labels = output[heads[0].logits].float(), batch[heads[0].labels].to(model.device)
            if heads[0].kind == "next_token":
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            total += float(loss)
            count += int((labels != IGNORED).sum())
    return decided, total / max(count, 1)


def _decision(model: PreTrainedModel, head: Head, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Classes, for the tokens that count one after the other; or scores."""
    if head.kind == "sequence" and _is_score(model):
        return logits.flatten()
    if head.kind == "sequence" and model.config.problem_type == "multi_label_classification":
        return logits > 0
    if head.kind == "span":
        return logits.masked_fill(batch["attention_mask"].to(logits.device) == 0, -torch.inf).argmax(-1)
    if head.kind == "tokens":
        return logits.argmax(-1)[batch["attention_mask"].to(logits.device) == 1]
    if head.kind == "words":
        return logits.argmax(-1)[batch[head.labels].to(logits.device) != IGNORED]
    return logits.argmax(-1)


def _is_score(model: PreTrainedModel) -> bool:
    return model.config.problem_type == "regression" or (model.config.num_labels == 1 and not model.config.problem_type)


def _agreement(
    heads: Sequence[Head],
    wanted: Mapping[Head, list[Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    model: PreTrainedModel,
) -> dict[str, float]:
    found, loss = _look(model, heads, batches)
    if heads[0].kind == "span":
        same = [torch.cat(found[head]) == torch.cat(wanted[head]) for head in heads]
        return {"answers as the teacher's": float(torch.stack(same).all(0).float().mean())}
    values: dict[str, float] = {}
    if heads[0].kind in ("words", "next_token"):
        name = "perplexity" if heads[0].kind == "next_token" else "perplexity at masked words"
        values[name] = math.exp(min(700.0, loss))
    for head, decisions in found.items():
        ours, theirs = torch.cat(decisions).flatten(), torch.cat(wanted[head]).flatten()
        if head.kind == "sequence" and _is_score(model):
            values["scores (Spearman with the teacher's)"] = float(spearmanr(ours, theirs).statistic)
        else:
            names = {"words": "masked words", "tokens": "labels of tokens", "choices": "choices"}
            values[f"{names.get(head.kind, 'labels')} as the teacher's"] = float((ours == theirs).float().mean())
    return values
