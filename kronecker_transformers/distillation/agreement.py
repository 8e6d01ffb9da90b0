"""What a student is worth beside its teacher, on text without labels, in the terms of what the teacher is used for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.sentence_modules import encoder_settings
from ..models.kronecker_family import Head, family_of, heads_of
from ..tasks.sentences import encode, neighbour_agreement, similarity_fidelity
from .heads import Output, outputs_of, real_positions
from .losses import IGNORED

Judge = Callable[[PreTrainedModel], dict[str, float]]
"""Values of a model by their names; the first is the one that is shown while a student learns."""


_DECISIONS = {
    "words": "masked words", "next_token": "next words", "tokens": "labels of tokens", "choices": "choices",
    "replaced": "words",
}  # fmt: skip
"""What a head decides, by its kind; others give labels."""


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
    outputs = dict(zip(heads, outputs_of(model), strict=True))
    decided: dict[Head, list[Tensor]] = {head: [] for head in heads if head.kind != "next_sentence"}
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        found = model(**{name: value for name, value in batch.items() if "label" not in name}, **causal)
        for head, decisions in decided.items():
            decisions.append(_decision(head, outputs[head], batch, found[head.logits].float()).cpu())
        if heads[0].kind in ("words", "next_token"):
            first = outputs[heads[0]]
            total += float(first.supervised(found[first.logits], batch))
            count += first.count(batch)
    return decided, total / max(count, 1)


def _decision(head: Head, output: Output, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Classes, for the tokens that count one after the other; or scores."""
    if output.kind == "values":
        return logits.flatten()
    if output.kind == "binary":
        return logits > 0
    if output.kind == "span":
        return logits.masked_fill(~real_positions(batch), -torch.inf).argmax(-1)
    if output.kind == "replaced":
        return (logits > 0)[real_positions(batch)]
    if output.kind == "next_token":
        return logits[:, :-1].argmax(-1)[output.targets(batch) != IGNORED]
    if output.kind == "tokens":
        return logits.argmax(-1)[batch[head.labels] != IGNORED if head.kind == "words" else real_positions(batch)]
    return logits.argmax(-1)


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
        if ours.is_floating_point():
            values["scores (Spearman with the teacher's)"] = float(spearmanr(ours, theirs).statistic)
        else:
            name = _DECISIONS.get(head.kind, "labels")
            values[f"{name} as the teacher's"] = float((ours == theirs).float().mean())
    return values
