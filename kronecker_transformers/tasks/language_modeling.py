"""Text for language modelling, read as a stream, and perplexity with its protocol beside it."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Document = list[str]
"""The sentences, or lines, of one document."""

_TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_LOOK_AHEAD = 10_000  # lines of a text file in which a blank line tells that it has documents
_BUFFERED = 1000  # documents from which a false next sentence is drawn


@dataclass(frozen=True)
class TextSource:
    """Text to read again and again from its start: files, or a dataset of the Hub.

    Attributes:
        names: files, or one name on the Hub, its configuration after a colon (``wikimedia/wikipedia:20231101.en``).
            A text file has one sentence on a line and a blank line between documents; a table (.json, .jsonl, .csv,
            .parquet) or dataset has one document in each row of `column`.
        fraction: share of the documents that is read, 0 < fraction <= 1; the same ones every time.
        column: name of the column of a table or dataset.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no source, a fraction out of range, or names of the Hub and files together.
    """

    names: tuple[str, ...]
    fraction: float = 1.0
    column: str = "text"

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no text was given; name a file or a dataset of the Hub")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be above 0 and at most 1; use 1 for the whole text")
        local = [Path(name).is_file() for name in self.names]
        if not all(local):
            missing = self.names[local.index(False)]
            if len(self.names) > 1 or Path(missing).suffix in (".txt", *_TABLES) or missing.startswith((".", "/")):
                raise FileNotFoundError(
                    f"text file {missing!r} does not exist; give an existing file or a name of the Hub"
                )

    def has_documents(self) -> bool:
        """Whether the text says where a document ends; in a text file, a blank line within the first 10,000 lines."""
        return not all(name.endswith(".txt") and not _has_blank_line(name) for name in self.names)

    def documents(self) -> Iterator[Document]:
        """Every document of the sample; for a text without documents, every line by itself."""
        found = chain.from_iterable(map(self._read, self.names))
        return found if self.fraction == 1 else filter(self._is_sampled, found)

    def _is_sampled(self, document: Document) -> bool:
        digest = hashlib.sha256("\n".join(document).encode()).digest()
        return int.from_bytes(digest[:8]) < self.fraction * 2**64

    def _read(self, name: str) -> Iterator[Document]:
        path = Path(name)
        if path.is_file() and path.suffix not in _TABLES:
            yield from _text_documents(path)
            return
        if path.is_file():
            rows = datasets.load_dataset(_TABLES[path.suffix], data_files=name, split="train", streaming=True)
        else:
            dataset, _, configuration = name.partition(":")
            rows = datasets.load_dataset(dataset, configuration or None, split="train", streaming=True)
        for row in rows:
            if self.column not in row:
                raise ValueError(
                    f"column {self.column!r} is not in {name!r}, which has {sorted(row)}; name the one that holds text"
                )
            if document := _lines(row[self.column].splitlines()):
                yield document


def _lines(lines: Iterable[str]) -> Document:
    return [line for line in map(str.strip, lines) if line]


def _has_blank_line(name: str) -> bool:
    with Path(name).open(encoding="utf-8") as file:
        lines = [line.strip() for line in islice(file, _LOOK_AHEAD)]
    inner = "\n".join(lines).strip()
    return "\n\n" in inner


def _text_documents(path: Path) -> Iterator[Document]:
    split = _has_blank_line(str(path))
    document: Document = []
    with path.open(encoding="utf-8") as file:
        for line in map(str.strip, file):
            if line:
                document.append(line)
            if document and (not line or not split):
                yield document
                document = []
    if document:
        yield document


def stream(examples: Callable[..., Iterator[dict[str, Any]]], *, seed: int = 0, **arguments: Any) -> Any:
    """An endless dataset of the examples that a generator function makes, shuffled within a buffer of 2,000."""
    dataset = datasets.IterableDataset.from_generator(examples, gen_kwargs=arguments)
    return dataset.shuffle(seed=seed, buffer_size=2000).repeat(None)


def sentence_examples(source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[dict[str, Any]]:
    """One example for each sentence or line, cut at `length` tokens."""
    for document in source.documents():
        for sentence in document:
            yield dict(tokenizer(sentence, truncation=True, max_length=length))


def block_examples(source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[dict[str, Any]]:
    """Blocks of exactly `length` tokens from documents that follow each other, for causal language modelling.

    A document ends with the end-of-text token; what is left at the very end is dropped.
    """
    buffer: list[int] = []
    for document in source.documents():
        buffer += [*tokenizer("\n".join(document), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        while len(buffer) >= length:
            block, buffer = buffer[:length], buffer[length:]
            yield {"input_ids": block, "attention_mask": [1] * length, "labels": list(block)}


def masked_examples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    next_sentence: bool,
    seed: int = 0,
    short: float = 0.1,
) -> Iterator[dict[str, Any]]:
    """Examples of at most `length` tokens for masked language modelling and next-sentence prediction, as for BERT.

    Sentences that follow each other fill an example. With `next_sentence` it has two segments, and in half of the cases
    the second comes from another document (label 1; 0 where it really follows). A share `short` of the examples aims at
    a random smaller length. Words are masked later, by the collator, anew each time.

    Raises:
        ValueError: `next_sentence` for a text without documents.
    """
    if next_sentence and not source.has_documents():
        raise ValueError(
            f"text {', '.join(source.names)!r} has no documents, so it has no next sentences; "
            "separate documents by a blank line, or set next_sentence=False"
        )
    generator = random.Random(seed)
    room = length - (3 if next_sentence else 2)
    seen: list[list[list[int]]] = []
    for document in source.documents():
        sentences = [ids for ids in tokenizer(document, add_special_tokens=False).input_ids if ids]
        for chunk in _chunks(sentences, room, short, generator):
            if not next_sentence:
                yield _masked_example(tokenizer, list(chain.from_iterable(chunk))[:room], None, None)
            elif len(chunk) > 1 or seen:
                cut = generator.randint(1, max(1, len(chunk) - 1))
                first, second = list(chain.from_iterable(chunk[:cut])), list(chain.from_iterable(chunk[cut:]))
                is_other = bool(seen) and (not second or generator.random() < 0.5)
                if is_other:
                    other = generator.choice(seen)
                    start = generator.randrange(len(other))
                    second = list(chain.from_iterable(other[start:]))
                _shorten(first, second, room)
                yield _masked_example(tokenizer, first, second, int(is_other))
        if sentences and next_sentence:
            if len(seen) < _BUFFERED:
                seen.append(sentences)
            else:
                seen[generator.randrange(_BUFFERED)] = sentences


def _chunks(
    sentences: Sequence[list[int]], room: int, short: float, generator: random.Random
) -> Iterator[list[list[int]]]:
    """Runs of sentences that fill the room, or now and then a smaller one."""

    def target() -> int:
        return generator.randint(2, room) if generator.random() < short else room

    chunk: list[list[int]] = []
    size, wanted = 0, target()
    for sentence in sentences:
        chunk.append(sentence)
        size += len(sentence)
        if size >= wanted:
            yield chunk
            chunk, size, wanted = [], 0, target()
    if chunk:
        yield chunk


def _shorten(first: list[int], second: list[int], room: int) -> None:
    """Drop tokens from the end of the longer segment until both fit."""
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()


def _masked_example(
    tokenizer: PreTrainedTokenizerBase, first: list[int], second: list[int] | None, label: int | None
) -> dict[str, Any]:
    ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id]
    types = [0] * len(ids)
    if second is not None:
        ids += [*second, tokenizer.sep_token_id]
        types += [1] * (len(second) + 1)
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    example: dict[str, Any] = {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)}
    example["special_tokens_mask"] = [int(i in special) for i in ids]
    if label is not None:
        example["next_sentence_label"] = label
    return example


# ---- perplexity ----


def _detokenized(text: str) -> str:
    """Undo the tokenisation of WikiText: hyphens, punctuation, quotes and brackets close up with their words."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([.,:;?!%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r" ('s|'re|'ve|'ll|'d|'m|n't)\b", r"\1", text)
    return re.sub(r'" ([^"]*?) "', r'"\1"', text)


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
        return math.exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float:
        """exp(nats / words); comparable between tokenizers."""
        return math.exp(self.nats / self.words)

    def __str__(self) -> str:
        return f"perplexity {self.per_token:.2f} per token, {self.per_word:.2f} per word ({self.protocol})"


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 1024,
    stride: int = 512,
    normalisation: str = "none",
    batch_size: int = 8,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a causal language model on a running text.

    The text is one stream of tokens after the begin-of-text token. Windows of `window` tokens move by `stride`; each
    token is predicted once, in the first window that holds it, so from at least window - stride tokens of context
    where there are as many before it.

    Args:
        model: with logits (batch, length, vocabulary), in evaluation mode.
        tokenizer: its tokenizer.
        text: not empty.
        window: tokens in a window, at most the model's maximum.
        stride: tokens by which it moves, 1 <= stride < window.
        normalisation: a name in `NORMALISATIONS`.
        batch_size: windows computed together; does not change the result.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of range, or a text without tokens.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation={normalisation!r} is not known; choose one of {', '.join(NORMALISATIONS)}")
    longest = model.config.max_position_embeddings
    if not 2 <= window <= longest:
        raise ValueError(f"window={window} must be from 2 to the model's maximum of {longest} tokens; choose another")
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must be at least 1 and below window={window}; choose another")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = tokenizer(NORMALISATIONS[normalisation](text), add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ValueError("text has no tokens to predict; give another")
    stream_ids = torch.tensor([start, *ids])
    nats = 0.0
    begins = range(0, max(len(stream_ids) - window, 0) + stride, stride)
    pieces = [(begin, stream_ids[begin : begin + window]) for begin in begins]
    whole = pieces[:-1]  # the last one may be shorter
    groups = [*(whole[i : i + batch_size] for i in range(0, len(whole), batch_size)), pieces[-1:]]
    for group in tqdm(groups, desc="perplexity", unit="batch", disable=not progress):
        batch = torch.stack([piece for _, piece in group]).to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(group), -1)
        for (begin, _), row in zip(group, losses.double(), strict=True):
            nats += float(row[0 if begin == 0 else window - stride - 1 :].sum())
    protocol = f"window {window}, stride {stride}, text normalisation: {normalisation}"
    return Perplexity(nats, len(ids), len(text.split()), protocol)
