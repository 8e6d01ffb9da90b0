"""Examples for language modelling, and for sentence encoders, made of a text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise, takewhile

from transformers import PreTrainedTokenizerBase

from .text import BUFFERED, SENTENCE_END, WHOLE, Document, Example, Share, TextSource

_ENCODED = 256  # sentences at a time: one by one they take a third longer


def sentence_examples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    prompt: str = "",
    augment: Callable[[str], str] = str,
) -> Iterator[Example]:
    """One example for each sentence or line, which `augment` may change, after the prompt, cut at `length` tokens."""
    sentences = chain.from_iterable(source.documents())
    while some := [prompt + augment(sentence) for sentence in islice(sentences, _ENCODED)]:
        encoded = tokenizer(some, truncation=True, max_length=length)
        for values in zip(*encoded.values(), strict=True):
            yield dict(zip(encoded, values, strict=True))


def block_examples(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int, share: Share = WHOLE
) -> Iterator[Example]:
    """Blocks of exactly `length` tokens from documents that follow each other, for causal language modelling.

    A document ends with the end-of-text token; a text without documents is one running text, of which every share reads
    the whole and takes its own blocks. What is left at the very end is dropped.
    """
    has_documents = source.has_documents()
    if not has_documents:
        return share.of(_blocks(source, tokenizer, length, has_documents))
    return _blocks(source.share(share), tokenizer, length, has_documents)


def _blocks(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int, has_documents: bool
) -> Iterator[Example]:
    buffer: list[int] = []
    for document in source.documents():
        text = "\n".join(document) + ("" if has_documents else "\n")
        buffer += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if has_documents:
            buffer.append(tokenizer.eos_token_id)
        whole = len(buffer) // length * length
        for start in range(0, whole, length):
            block = buffer[start : start + length]
            yield {"input_ids": block, "attention_mask": [1] * length, "labels": list(block)}
        del buffer[:whole]


def masked_examples(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    next_sentence: bool,
    seed: int = 0,
    short: float = 0.1,
) -> Iterator[Example]:
    """Examples of at most `length` tokens for masked language modelling and next-sentence prediction, as for BERT.

    Sentences that follow each other fill an example; a line longer than half of it is divided, at the ends of its
    sentences where it has any. With `next_sentence` an example has two segments, and for half of them the second comes
    from another document (label 1; 0 where it really follows). A share `short` of the examples aims at a random smaller
    length. Words are masked later, by the collator, anew each time.

    Raises:
        ValueError: `length` or `short` out of range, or `next_sentence` for a text without documents.
    """
    if length < 8:
        raise ValueError(f"length={length} must be at least 8 tokens; choose a larger one")
    if not 0 <= short <= 1:
        raise ValueError(f"short={short} is a share, from 0 to 1; 0.1 is that of BERT")
    if next_sentence and not source.has_documents():
        raise ValueError(
            f"text {', '.join(source.names)!r} has no documents, so it has no next sentences; "
            "separate documents by a blank line, or set next_sentence=False"
        )
    generator = random.Random(seed)
    room = length - (3 if next_sentence else 2)
    documents = filter(None, (_pieces(tokenizer, document, room // 2) for document in source.documents()))
    earlier: list[_Pieces] = []
    for pieces, following in pairwise(chain(documents, [[]])):
        if next_sentence:
            others = [*earlier, following] if following else earlier
            for first, second, label in _pairs(pieces, others, room, short, generator):
                yield _masked_example(tokenizer, first, second, label)
        else:
            position = 0
            while position < len(pieces):
                run = _run(pieces, position, _wanted(room, short, generator))
                yield _masked_example(tokenizer, _flat(run))
                position += len(run)
        if len(earlier) < BUFFERED:
            earlier.append(pieces)
        else:
            earlier[generator.randrange(BUFFERED)] = pieces


_Pieces = list[list[int]]  # the sentences of a document, or parts of them, as token ids


def _pieces(tokenizer: PreTrainedTokenizerBase, document: Document, longest: int) -> _Pieces:
    """The lines of a document; a longer one divided into its sentences, and these into parts of `longest` tokens.

    What follows begins with a space, for tokenizers that have other tokens there.
    """

    def encoded(lines: list[str]) -> _Pieces:
        return tokenizer(lines, add_special_tokens=False, verbose=False).input_ids

    first, *following = document
    lines = [first, *(f" {line}" for line in following)]
    pieces = []
    for line, ids in zip(lines, encoded(lines), strict=True):
        for part in [ids] if len(ids) <= longest else encoded(SENTENCE_END.split(line)):
            pieces += [part[start : start + longest] for start in range(0, len(part), longest)]
    return pieces


def _wanted(room: int, short: float, generator: random.Random) -> int:
    return generator.randint(2, room) if generator.random() < short else room


def _run(pieces: _Pieces, start: int, size: int) -> _Pieces:
    """As many pieces from `start` on as fit into `size` tokens, but at least one."""
    candidates = pieces[start : start + size]
    fitting = takewhile(lambda total: total <= size, accumulate(map(len, candidates)))
    return candidates[: max(1, sum(1 for _ in fitting))]


def _flat(pieces: _Pieces) -> list[int]:
    return list(chain.from_iterable(pieces))


def _pairs(
    pieces: _Pieces, others: Sequence[_Pieces], room: int, short: float, generator: random.Random
) -> Iterator[tuple[list[int], list[int], int]]:
    """Two segments and whether the second is from another document; so each is about as long in both cases."""
    if not others:
        raise ValueError("the text has only 1 document, so no false next sentences; set next_sentence=False")
    position = 0
    while position < len(pieces):
        run = _run(pieces, position, _wanted(room, short, generator))
        if len(run) == 1:  # it has no sentences to divide it by
            (piece,) = run
            if len(piece) == 1:
                position += 1
                continue
            cut = generator.randint(1, len(piece) - 1)
            pieces[position : position + 1] = run = [piece[:cut], piece[cut:]]
        cut = generator.randint(1, len(run) - 1)
        first, second = _flat(run[:cut]), _flat(run[cut:])
        if generator.random() < 0.5:
            other = generator.choice(others)
            false = _flat(_run(other, generator.randrange(len(other)), len(second)))
            yield first, false[: room - len(first)], 1
            position += cut  # what the other took the place of comes next
        else:
            yield first, second, 0
            position += len(run)


def _masked_example(
    tokenizer: PreTrainedTokenizerBase, first: list[int], second: list[int] | None = None, label: int | None = None
) -> Example:
    segments = [[tokenizer.cls_token_id, *first, tokenizer.sep_token_id]]
    if second is not None:
        segments.append([*second, tokenizer.sep_token_id])
    ids = _flat(segments)
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    example: Example = {
        "input_ids": ids,
        "token_type_ids": [kind for kind, segment in enumerate(segments) for _ in segment],
        "attention_mask": [1] * len(ids),
        "special_tokens_mask": [int(i in special) for i in ids],
    }
    if label is not None:
        example["next_sentence_label"] = label
    return example
