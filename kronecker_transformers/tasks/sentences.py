"""Sentence embeddings, and how far a student's agree with its teacher's."""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.sentence_modules import DEFAULT, EncoderSettings


@torch.no_grad()
def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    batch_size: int = 64,
    max_length: int = 128,
    settings: EncoderSettings = DEFAULT,
) -> Tensor:
    """Embeddings of sentences, by default the mean of the last hidden states over the tokens, at length 1.

    Args:
        model: a base model, in evaluation mode.
        tokenizer: its tokenizer.
        sentences: texts, at least one, cut at `max_length` tokens.
        batch_size: sentences, of similar length, computed together.
        max_length: tokens.
        settings: prompt, pooling, and whether embeddings have length 1; its `max_length` is not used.

    Returns:
        (sentences, hidden), float32, on the CPU.

    Raises:
        ValueError: a prompt that leaves no room for a sentence.
    """
    settings.check_length(max_length, tokenizer)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [settings.prompt + sentences[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        hidden = model(**batch).last_hidden_state.float()  # (batch, length, hidden)
        embeddings = settings.pooling(hidden, batch["attention_mask"]).cpu()
        parts.append(torch.nn.functional.normalize(embeddings, dim=-1) if settings.normalize else embeddings)
    embeddings = torch.cat(parts)
    return torch.empty_like(embeddings).index_copy_(0, torch.tensor(order), embeddings)


def pair_similarities(embeddings: Tensor, pairs: Tensor) -> Tensor:
    """Products of embeddings (sentences, hidden) for index pairs (2, pairs): cosines where these have length 1."""
    return (embeddings[pairs[0]] * embeddings[pairs[1]]).sum(-1)


def random_pairs(sentences: int, pairs: int = 20_000, seed: int = 0) -> Tensor:
    """About `pairs` random pairs of different sentences, (2, pairs); always the same ones."""
    drawn = torch.randint(sentences, (2, pairs), generator=torch.Generator().manual_seed(seed))
    return drawn[:, drawn[0] != drawn[1]]


def similarity_fidelity(teacher: Tensor, student: Tensor) -> float:
    """Spearman correlation between the similarities that both give to the same 20,000 random pairs of sentences.

    Args:
        teacher, student: embeddings of the same sentences, (sentences, hidden), compared by their products.
    """
    pairs = random_pairs(len(teacher))
    return float(spearmanr(pair_similarities(teacher, pairs), pair_similarities(student, pairs)).statistic)


def neighbour_agreement(teacher: Tensor, student: Tensor, neighbours: int = 10) -> float:
    """Share of the nearest neighbours of each sentence on which both agree, from 0 to 1.

    Args:
        teacher, student: embeddings of the same sentences, (sentences, hidden), compared by their products.
        neighbours: number of nearest other sentences; all others where there are fewer.

    Raises:
        ValueError: fewer than two sentences.
    """
    if len(teacher) < 2:
        raise ValueError(f"{len(teacher)} sentences have no neighbours; at least 2 are needed; give more text")
    nearest = []
    for embeddings in (teacher, student):
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
        chosen = torch.zeros_like(similarity, dtype=torch.bool)
        nearest.append(chosen.scatter_(1, similarity.topk(min(neighbours, len(teacher) - 1)).indices, True))
    return float((nearest[0] & nearest[1]).sum() / nearest[0].sum())
