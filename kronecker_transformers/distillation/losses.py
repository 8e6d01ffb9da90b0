"""The losses of the distillation objectives, one pure function each, and the registry of them.

A loss of distillation has one value for each sequence: the mean over its real positions. What the trainer optimises is
the mean of these values over all sequences of a step, so that neither padding nor the split into micro-batches and
processes changes the objective; only `similarity_kl` compares the sequences of a micro-batch. A supervised loss is
a sum; the trainer divides it by the number of labels of a step.

KroneckerBERT (Tahaei et al., NAACL 2022, section 3.5) adds, for a teacher T and a student S of equal depth and width,

    MSE(E_S, E_T) + sum over layers of MSE(O_S, O_T) + sum over layers of MSE(H_S, H_T) + logits + supervised

where E is the output of the embedding layer, O = Q K^T / sqrt(d) are the attention scores before the softmax and H is
the output of a layer. KnGPT2 (Edalati et al., ACL 2022, section 3) has KL(softmax(O_T) || softmax(O_S)) in place of the
second.

Shapes: `mask` (S, L) is 1 or True at the real positions of S sequences of length L, 0 or False at padding. Every
sequence has at least one real position. Everything is computed in float32 or wider, whatever the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_rows import by_rows

IGNORED = -100
"""Label of a position without a target, as everywhere in transformers."""

SIMILARITY_TEMPERATURE = 0.05
"""Of `similarity_kl`: a cosine that is smaller by 0.05 makes a neighbour e times less likely."""


def hidden_state_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of hidden states over real positions and units: one layer, or the embedding layer.

    KroneckerBERT, section 3.5 ("embedding" and "FFN" terms); KnGPT2, section 3.

    Args:
        student, teacher: (S, L, hidden).
        mask: (S, L).

    Returns:
        (S,).
    """
    difference = (wide(student) - wide(teacher)).masked_fill(~mask.bool().unsqueeze(-1), 0)  # so is its gradient there
    return _mean_over_real(difference.square().mean(-1), mask)


def attention_scores(query: Tensor, key: Tensor, heads: int, scaling: float, bias: Tensor | None = None) -> Tensor:
    """The scores O = scaling Q K^T + bias before mask and softmax; in the papers, 1 / sqrt(d) and no bias.

    Args:
        query, key: (S, L, heads * d), head by head.
        heads: number of heads.
        scaling: factor of the scores.
        bias: of relative positions, (heads, L, L).

    Returns:
        (S, heads, L, L), row i for query i, column j for key j.
    """
    Q, K = (wide(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))  # (S, heads, L, d)
    scores = (scaling * Q) @ K.transpose(-1, -2)  # the smaller tensor is scaled
    return scores if bias is None else scores + bias


def relation_scores(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scores between the queries of a layer, between its keys, and between its values, each 1 / sqrt(d) X X^T.

    MiniLMv2 (Wang et al., Findings of ACL 2021, section 3.1), with the heads of the model.

    Args:
        query, key, value: (S, L, heads * d), head by head.
        heads: number of heads.

    Returns:
        (S, 3 * heads, L, L).
    """
    scaling = (query.shape[-1] // heads) ** -0.5
    return torch.cat([attention_scores(X, X, heads, scaling) for X in (query, key, value)], 1)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor, causal: bool = False) -> Tensor:
    """Mean squared difference of attention scores before softmax over heads and pairs of real positions.

    KroneckerBERT, section 3.5 ("attention" term), one layer.

    Args:
        student, teacher: (S, heads, L, L).
        mask: (S, L).
        causal: count only the pairs with j <= i.

    Returns:
        (S,).
    """
    return by_rows(_attention_mse, student, teacher, _visible(mask, causal))


def _attention_mse(student: Tensor, teacher: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    difference = (wide(student) - wide(teacher)).masked_fill_(~visible, 0)
    pairs = student.shape[1] * visible.sum((1, 2, 3))
    return difference.square().sum((1, 2, 3)) / pairs, difference.mul_(2 / _per_sequence(pairs))


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor, causal: bool = False) -> Tensor:
    """KL(teacher || student) between attention distributions over the visible keys, mean over heads and real queries.

    KnGPT2, section 3 ("attention" term), one layer.

    Args:
        student, teacher: scores before softmax (S, heads, L, L).
        mask: (S, L).
        causal: query i sees only the keys j <= i.

    Returns:
        (S,), in nats.
    """
    return by_rows(_attention_kl, student, teacher, _visible(mask, causal))


def _attention_kl(student: Tensor, teacher: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    hidden, lowest = ~visible, torch.finfo(torch.float32).min  # not -inf: a row without visible keys would turn to NaN
    log_s, log_t = (torch.log_softmax(wide(x).masked_fill(hidden, lowest), -1) for x in (student, teacher))
    # what is hidden is the same in both and adds nothing; and the exponential of 0 is fast, unlike one that underflows
    p = log_t.masked_fill_(hidden, 0).exp()
    difference = log_t.sub_(log_s.masked_fill_(hidden, 0))
    queries = student.shape[1] * visible.any(-1).sum((1, 2))
    return (p * difference).sum((1, 2, 3)) / queries, log_s.exp_().sub_(p).div_(_per_sequence(queries))


def _per_sequence(values: Tensor) -> Tensor:
    """(S,) as (S, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


def pooled_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity of sentence embeddings.

    Not of the papers: it is what a sentence encoder is used for.

    Args:
        student, teacher: sentence embeddings (S, width).

    Returns:
        (S,), from 0 to 2.
    """
    s, t = (F.normalize(wide(embeddings), dim=-1) for embeddings in (student, teacher))
    return 1 - (s * t).sum(-1)


def similarity_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence between where teacher and student see a sentence among the teacher's embeddings of a micro-batch.

    Each sees it as a distribution over all sentences, itself included: the softmax of its cosine similarities to the
    teacher's embeddings at temperature 0.05. What all similarities have in common plays no part, near neighbours play
    the most. Not of the papers; after Fang et al., "SEED: Self-supervised Distillation for Visual Representation"
    (ICLR 2021).

    Args:
        student, teacher: sentence embeddings (S, width).

    Returns:
        (S,), in nats; 0 for a sentence that is alone.
    """
    s, t = (F.normalize(wide(embeddings), dim=-1) for embeddings in (student, teacher))
    return logit_kl(s @ t.t() / SIMILARITY_TEMPERATURE, t @ t.t() / SIMILARITY_TEMPERATURE)


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) between the class distributions at temperature T.

    KroneckerBERT, section 3.5 ("logit" term), in the form of Hinton et al. (2015): T^2 keeps the scale of the gradient.

    Args:
        student, teacher: logits (..., classes); a class that cannot be chosen has -inf in both. The teacher's get no
            gradient.
        temperature: T > 0.

    Returns:
        (...), in nats.
    """
    rows = (logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher))
    return by_rows(partial(_logit_kl, temperature), *rows).reshape(student.shape[:-1])


def _logit_kl(temperature: float, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if temperature != 1:
        student, teacher = wide(student) / temperature, wide(teacher) / temperature
    log_s, log_t = (torch.log_softmax(wide(logits), -1) for logits in (student, teacher))
    impossible, p = log_t.isneginf(), log_t.exp()
    difference = log_t.sub_(log_s).masked_fill_(impossible, 0)
    return temperature**2 * (p * difference).sum(-1), log_s.exp_().sub_(p).mul_(temperature)


def logit_binary_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """As `logit_kl` where every label is on or off by itself (multi-label classification), mean over the labels.

    Args:
        student, teacher: logits (..., labels).
        temperature: T > 0.

    Returns:
        (...), in nats.
    """
    s, t = (torch.stack((wide(logits), torch.zeros_like(wide(logits))), -1) for logits in (student, teacher))
    return logit_kl(s, t, temperature).mean(-1)


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the outputs of a regression.

    Args:
        student, teacher: (..., outputs).

    Returns:
        (...).
    """
    return (wide(student) - wide(teacher)).square().mean(-1)


def token_logit_kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """`logit_kl` of every real position, mean over the real positions of each sequence.

    Args:
        student, teacher: logits (S, L, classes).
        mask: (S, L).
        temperature: T > 0.

    Returns:
        (S,), in nats.
    """
    real = mask.bool()
    if real.all():  # without a copy of all logits
        return logit_kl(student, teacher, temperature).mean(-1)
    divergence = logit_kl(student[real], teacher[real], temperature)  # (real positions,)
    return _mean_over_real(torch.zeros_like(mask, dtype=divergence.dtype).masked_scatter(real, divergence), mask)


def span_logit_kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """`logit_kl` of the distribution of a span's first or last token over the real positions of each sequence.

    Args:
        student, teacher: logits (S, L).
        mask: (S, L).
        temperature: T > 0.

    Returns:
        (S,), in nats.
    """
    padding = ~mask.bool()
    s, t = (wide(logits).masked_fill(padding, -torch.inf) for logits in (student, teacher))
    return logit_kl(s, t, temperature)


def supervised_classes(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum of the cross entropies of all labels that are not -100.

    Args:
        logits: (..., classes).
        labels: integers (...).
        smoothing: share of the target that is spread over all classes, 0 <= smoothing < 1.

    Returns:
        A scalar, in nats.
    """
    return by_rows(partial(_cross_entropy, smoothing), logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)).sum()


def _cross_entropy(smoothing: float, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    counted = labels != IGNORED
    if not counted.all():
        values, slopes = wide(torch.zeros_like(logits[:, 0])), torch.zeros_like(wide(logits))
        values[counted], slopes[counted] = _cross_entropy(smoothing, logits[counted], labels[counted])
        return values, slopes
    log_p, targets = torch.log_softmax(wide(logits), -1), labels.unsqueeze(1)
    values = -log_p.gather(1, targets).squeeze(1)
    if smoothing:
        values = (1 - smoothing) * values - smoothing * log_p.mean(-1)
    chosen = torch.full_like(targets, smoothing - 1, dtype=log_p.dtype)
    return values, log_p.exp_().sub_(smoothing / logits.shape[-1]).scatter_add_(1, targets, chosen)


def supervised_binary(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the binary cross entropies of all labels, for multi-label classification.

    Args:
        logits, labels: (..., labels).

    Returns:
        A scalar, in nats.
    """
    return F.binary_cross_entropy_with_logits(wide(logits), labels.to(wide(logits)), reduction="sum")


def supervised_values(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of the squared errors of a regression.

    Args:
        outputs: (examples, 1) or as `targets`.
        targets: (examples,) or (examples, outputs).

    Returns:
        A scalar.
    """
    return (wide(outputs).reshape(targets.shape) - wide(targets)).square().sum()


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _mean_over_real(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (S, L) over the real positions of each sequence; what stands at padding may be anything."""
    real = mask.bool()
    return values.masked_fill(~real, 0).sum(-1) / real.sum(-1)


def _visible(mask: Tensor, causal: bool) -> Tensor:
    """Which real query i sees which real key j, (S, 1, L, L)."""
    real = mask.bool()
    pairs = (real[:, :, None] & real[:, None, :]).unsqueeze(1)
    return pairs.tril() if causal else pairs


# ---- the registry ----


@dataclass(frozen=True)
class Loss:
    """A loss as an objective uses it.

    Attributes:
        reads: "embeddings", "layers", "attention" and "relations", of which each layer has one value, "sentences",
            embeddings that are pooled from the last hidden states, "logits" or "labels".
        text: what it is, for the help of its weight.
        function: of student, teacher, mask and, for scores, whether it is causal; for sentences, of student and
            teacher. None for logits and labels, whose losses depend on the head (`heads`).
    """

    reads: str
    text: str
    function: Callable[..., Tensor] | None = None


LOSSES = {
    "embedding_mse": Loss("embeddings", "the MSE between the outputs of the embedding layers", hidden_state_mse),
    "attention_mse": Loss("attention", "the MSE between attention scores before softmax, all layers", attention_mse),
    "attention_kl": Loss("attention", "the KL divergence between attention distributions, all layers", attention_kl),
    "relation_kl": Loss(
        "relations", "the KL divergence between relations of queries, of keys and of values, all layers", attention_kl
    ),
    "hidden_mse": Loss("layers", "the MSE between the outputs of the layers, all layers", hidden_state_mse),
    "pooled": Loss("sentences", "the cosine distance between sentence embeddings", pooled_distance),
    "similarity_kl": Loss(
        "sentences", "the KL divergence between nearness to the sentences of a micro-batch", similarity_kl
    ),
    "logits": Loss("logits", "the KL divergence (regression: MSE) between the outputs of the heads"),
    "supervised": Loss("labels", "the loss on the labels"),
}
"""Every loss by its name, as it is logged; its weight is the argument ``<name>_weight``."""
