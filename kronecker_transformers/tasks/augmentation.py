"""More texts for a student, made from those of a task or from the sentences of a text, for the teacher to label.

A small task or text shows a student few of the words that its teacher knows. Here some words of a text are replaced by
others that lie near them in the teacher's embedding; in some texts a word is dropped, or two words are swapped, which
matters to judges of grammar. A label may no longer be right after that, so a student should learn the teacher's outputs
alone. After TinyBERT (Jiao et al., Findings of EMNLP 2020, section 3.2), which takes its words from a masked language
model and GloVe.
"""

from __future__ import annotations

import random
import re
from collections.abc import Container, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPLACED, BROKEN = 0.3, 0.3
"""Share of the words that are replaced; share of the texts in which a word is dropped, or two words are swapped."""
CANDIDATES = 15
"""Nearest words, of which a replacement is drawn."""
KINDS = {"first": 5, "second": 5, "both": 5, "copy": 3, "stranger": 2}
"""How often a pair has its first text augmented, its second, or both; becomes a text beside its augmented copy; or gets
the second text of another pair."""
_AT_ONCE = 512
"""Words whose nearest words are found together."""
_PIECES = re.compile(r"\w+|\W+")
"""A text as words and what is between them."""

Row = tuple[str, ...]
"""A text, or a pair of them."""


class Augmentation:
    """Augments texts.

    Two words are near if the cosine of their centred vectors in the teacher's embedding is high. A word of several
    tokens stays.

    Args:
        rows: all of a task, or sentences of a text, each in a tuple; only words that occur in them are replaced.
        teacher: with an embedding of words.
        tokenizer: of the teacher.
    """

    def __init__(self, rows: Sequence[Row], teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._rows = rows
        words = {piece for row in rows for text in row for piece in _PIECES.findall(text)}
        self._nearest = nearest_words(words | set(map(str.lower, words)), teacher, tokenizer)

    def row(self, row: Row, generator: random.Random) -> Row:
        """A row like this one of the task."""
        if len(row) == 1:
            return (self.text(row[0], generator),)
        (kind,) = generator.choices(tuple(KINDS), tuple(KINDS.values()))
        first, second = row
        if kind == "stranger":
            return first, generator.choice(self._rows)[1]
        if kind == "copy":
            text = generator.choice(row)
            return text, self.text(text, generator)
        return (
            self.text(first, generator) if kind != "second" else first,
            self.text(second, generator) if kind != "first" else second,
        )

    def text(self, text: str, generator: random.Random) -> str:
        """A text like this one."""
        pieces = _PIECES.findall(text)
        for place, piece in enumerate(pieces):
            near = self._nearest.get(piece) or self._nearest.get(piece.lower())
            if near and generator.random() < REPLACED:
                word = generator.choice(near)
                pieces[place] = word[:1].upper() + word[1:] if piece[0].isupper() else word
        words = [place for place, piece in enumerate(pieces) if piece[0].isalnum()]
        if len(words) > 2 and generator.random() < BROKEN:
            number = generator.randrange(len(words) - 1)
            one, following = words[number : number + 2]
            if generator.random() < 0.5:
                del pieces[one:following]
            else:
                pieces[one], pieces[following] = pieces[following], pieces[one]
        return "".join(pieces)


@torch.no_grad()
def nearest_words(
    words: Container[str], teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[str]]:
    """The `CANDIDATES` nearest words of each word that is one token, the nearest first."""
    known = whole_words(tokenizer)
    names, ids = list(known), list(known.values())
    embedding: Any = teacher.get_input_embeddings()
    weight = embedding.weight.detach().float()[ids]
    vectors = torch.nn.functional.normalize(weight - weight.mean(0), dim=-1)
    found: dict[str, list[str]] = {}
    wanted = torch.tensor([place for place, name in enumerate(names) if name in words], dtype=torch.long)
    for places in wanted.split(_AT_ONCE) if len(names) > 1 else ():
        cosines = vectors[places] @ vectors.mT
        cosines[torch.arange(len(places)), places] = -torch.inf
        nearest = cosines.topk(min(CANDIDATES, len(names) - 1)).indices
        for place, row in zip(places.tolist(), nearest.tolist(), strict=True):
            found[names[place]] = [names[other] for other in row]
    return found


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The words that are one token where they follow a space, in alphabetical order, and this token."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = {tokenizer.convert_tokens_to_string([token]).strip() for token in tokens}
    words = sorted(text for text in texts if text.isalpha())
    encoded = tokenizer([f" {word}" for word in words], add_special_tokens=False).input_ids if words else []
    pairs = zip(words, encoded, strict=True)
    return {word: ids[0] for word, ids in pairs if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}
