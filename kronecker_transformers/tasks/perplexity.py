"""Perplexity of a causal language model, with the protocol of its measurement beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.kronecker_family import longest_sequence
from ..modes import evaluating


def _detokenized(text: str) -> str:
    """Undo the tokenisation of WikiText: hyphens, punctuation, quotes and brackets close up with their words."""
    text = re.sub(r" *\n *", "\n", text)
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,:;?!%)\]])(?!\S)", r"\1", text)
    text = re.sub(r"(?<!\S)([(\[$£]) ", r"\1", text)
    text = re.sub(r" ('s|'t|'re|'ve|'ll|'d|'m|n't)\b", r"\1", text)
    return re.sub(r'(?<!\S)" ([^"\n]*?) "', r'"\1"', text)


NORMALISATIONS: dict[str, Callable[[str], str]] = {"none": str, "wikitext": _detokenized}
"""What may be done to a text before it is tokenised."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, and how it was measured.

    Attributes:
        nats: negative log-likelihood of the whole text.
        tokens: number of predicted tokens.
        words: number of words of the text before its normalisation, separated by white space.
        protocol: window, stride and normalisation, in words.
    """

    nats: float
    tokens: int
    words: int
    protocol: str

    @property
    def per_token(self) -> float:
        """exp(nats / tokens); depends on the tokenizer."""
        return _exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float:
        """exp(nats / words); comparable between tokenizers."""
        return _exp(self.nats / self.words)

    def __str__(self) -> str:
        return f"perplexity {self.per_token:.2f} per token, {self.per_word:.2f} per word ({self.protocol})"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 1024,
    stride: int = 512,
    normalisation: str = "none",
    batch_size: int = 4,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a causal language model on a running text.

    The text is one stream of tokens after the begin-of-text token. Windows of `window` tokens move by `stride`; each
    token is predicted once, in the first window that holds it, so from at least window - stride tokens of context
    where there are as many before it.

    Args:
        model: with logits (batch, length, vocabulary); put into evaluation mode for this.
        tokenizer: its tokenizer.
        text: with a word at least.
        window: tokens in a window, at most the model's maximum.
        stride: tokens by which it moves, 1 <= stride < window.
        normalisation: a name in `NORMALISATIONS`.
        batch_size: windows computed together; does not change the result. Each takes `window` times the vocabulary
            times 4 bytes, 200 MB for GPT-2.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of range, a text without words, or a tokenizer without a token to begin with.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation={normalisation!r} is not known; choose one of {', '.join(NORMALISATIONS)}")
    longest = longest_sequence(model)
    if not 2 <= window <= longest:
        raise ValueError(f"window={window} must be from 2 to the model's maximum of {longest} tokens; choose another")
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must be at least 1 and below window={window}; choose another")
    if not text.split():
        raise ValueError("text has 0 words, so there is nothing to predict; give another")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("tokenizer has neither a bos nor an eos token for the text to begin with; set its bos_token")
    ids = tokenizer(NORMALISATIONS[normalisation](text), add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor([start, *ids])
    begins = range(0, max(len(tokens) - window, 0) + stride, stride)
    pieces = [(begin, tokens[begin : begin + window]) for begin in begins]
    whole = pieces[:-1]  # the last one may be shorter
    groups = [*(whole[i : i + batch_size] for i in range(0, len(whole), batch_size)), pieces[-1:]]
    nats = 0.0
    with evaluating(model):
        for group in tqdm(groups, desc="perplexity", unit="batch", disable=not progress):
            batch = torch.stack([piece for _, piece in group]).to(model.device)
            found = model(input_ids=batch, use_cache=False).logits
            for (begin, _), row, logits in zip(group, batch, found, strict=True):
                new = window - stride if begin else 1  # its first token that no window before had
                logits = logits[new - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
                nats += float(F.cross_entropy(logits, row[new:], reduction="none").double().sum())
    protocol = f"window {window}, stride {stride}, text normalisation: {normalisation}"
    return Perplexity(nats, len(ids), len(text.split()), protocol)
