"""Text, read as a stream, and endless streams of the examples that are made of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import datasets
import pyarrow.parquet
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import TrainingArguments

from .tables import read_table

logger = logging.getLogger(__name__)

Document = list[str]
"""The sentences, or lines, of one document."""
Example = dict[str, Any]
"""One example without padding, by the names of the model's inputs."""
_T = TypeVar("_T")
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")
BUFFERED = 1000
"""Documents that are looked at, or held, at a time."""

_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_LOOK_AHEAD = 10_000  # lines of a text file in which a blank line tells that it has documents
_SORTED = 50  # groups of examples of similar length that are made at once


@dataclass(frozen=True)
class Share:
    """One of `number` equal shares of a stream, that of one process or worker."""

    index: int = 0
    number: int = 1

    def of(self, things: Iterable[_T]) -> Iterator[_T]:
        """Every `number`-th thing."""
        return islice(things, self.index, None, self.number)

    def divided(self, inner: Share) -> Share:
        """A share of this one."""
        return Share(self.index * inner.number + inner.index, self.number * inner.number)


WHOLE = Share()


@dataclass(frozen=True)
class TextSource:
    """Text to read again and again from its start: files, or a dataset of the Hub.

    Attributes:
        names: files, or one name on the Hub, its configuration after a colon (``wikimedia/wikipedia:20231101.en``).
            A text file has one sentence on a line and a blank line between documents, in UTF-8; a table (.json,
            .jsonl, .csv, .tsv, .parquet) or dataset has one document in each row of `column`. Tables of the kinds
            .jsonl and .parquet, text files and datasets are read bit by bit, the other tables are held in memory.
        fraction: share of the documents that is read, 0 < fraction <= 1; the same ones every time.
        column: name of the column of a table or dataset.
        split: of a dataset of the Hub.
        skipped: share of the documents that comes before that fraction, in an order that the documents themselves give.
        by_line: take every line for a document of its own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no source, or a fraction out of range.
    """

    names: tuple[str, ...]
    fraction: float = 1.0
    column: str = "text"
    split: str = "train"
    skipped: float = 0.0
    by_line: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no text was given; name a file or a dataset of the Hub")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be above 0 and at most 1; use 1 for the whole text")
        if not (self.skipped >= 0 and self.skipped + self.fraction <= 1 + 1e-9):
            raise ValueError(
                f"skipped={self.skipped} and fraction={self.fraction} must be at most 1 together; lower one"
            )
        for name in self.names:
            is_path = len(self.names) > 1 or _suffix(name) in (".txt", *_TABLES) or name.startswith((".", "/"))
            if Path(name).is_dir():
                raise FileNotFoundError(f"text {name!r} is a folder; name the files in it")
            if is_path and not Path(name).is_file():
                raise FileNotFoundError(
                    f"text file {name!r} does not exist; give existing files or one dataset of the Hub"
                )

    def has_documents(self) -> bool:
        """Whether all of the text says where a document ends; in a text file, a blank line within 10,000 lines."""
        return not self.by_line and all(_has_blank_line(Path(name)) for name in self.names if _is_plain(name))

    def has_following_sentences(self) -> bool:
        """Whether a document has a sentence that follows another: one of the first 1,000 documents, of several."""
        return self.has_documents() and any(
            len(document) > 1 or len(SENTENCE_END.split(document[0])) > 1
            for document in islice(self.documents(), BUFFERED)
        )

    def text(self) -> str:
        """All of it as one text: files of text as they stand, documents of tables and datasets a blank line apart."""
        parts = []
        for name in self.names:
            if not _is_plain(name):
                parts.append("\n\n".join(map("\n".join, self._read(name))))
                continue
            with _utf8(Path(name)) as file:
                parts.append(file.read())
        return "\n\n".join(parts)

    def documents(self) -> Iterator[Document]:
        """Every document of the sample; in a text file without documents, every line by itself."""
        found: Iterator[Document] = chain.from_iterable(map(self._read, self.names))
        if self.by_line:
            found = ([line] for document in found for line in document)
        return found if self.fraction == 1 else filter(self._is_sampled, found)

    def lines(self, limit: int | None = None) -> list[str]:
        """The sentences, or lines, of its documents; the first `limit` of them, or all."""
        return list(islice(chain.from_iterable(self.documents()), limit))

    def _is_sampled(self, document: Document) -> bool:
        digest = hashlib.sha256("\n".join(document).encode()).digest()
        return self.skipped <= int.from_bytes(digest[:8]) / 2**64 < self.skipped + self.fraction

    def part(self, begin: float, end: float) -> TextSource:
        """The documents between two shares of this one, 0 <= begin < end <= 1; parts that meet have none in common."""
        share = end - begin
        return replace(self, fraction=share * self.fraction, skipped=self.skipped + begin * self.fraction)

    def share(self, share: Share) -> TextSource:
        """The documents of one share; which ones, the documents themselves tell, so that no other needs to be known."""
        return self.part(share.index / share.number, (share.index + 1) / share.number)

    def _read(self, name: str) -> Iterator[Document]:
        if _is_plain(name):
            yield from _text_documents(Path(name))
            return
        for row in _rows(name, self.split):
            if self.column not in row:
                raise ValueError(
                    f"column {self.column!r} is not in {name!r}, which has {sorted(row)}; name the one that holds text"
                )
            value = row[self.column]
            if isinstance(value, (list, dict)) or value != value:  # NaN is not itself
                raise ValueError(
                    f"column {self.column!r} of {name!r} holds {value!r}, which is no text; write one text in each row"
                )
            text = "" if value is None else str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            lines = map(str.strip, text.splitlines())  # without halves of characters, which JSON may hold
            if document := [line for line in lines if line]:
                yield document


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _is_plain(name: str) -> bool:
    return Path(name).is_file() and _suffix(name) not in _TABLES


def _rows(name: str, split: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a table, or of a dataset of the Hub."""
    path = Path(name)
    if not path.is_file():
        dataset, _, configuration = name.partition(":")
        try:
            yield from datasets.load_dataset(dataset, configuration or None, split=split, streaming=True)
        except Exception as error:  # of many kinds
            raise OSError(
                f"text {name!r} is neither an existing file nor a dataset with a split {split!r} on the Hub that can "
                f"be read ({error}); correct the name, or download the text and name its files"
            ) from error
    elif _suffix(name) == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif _suffix(name) == ".jsonl":
        for number, line in enumerate(_text_lines(path), 1):
            try:
                row = json.loads(line or "null")
            except ValueError as error:
                raise ValueError(f"line {number} of {name!r} is not JSON ({error}); mend the file") from error
            if row is not None:
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} of {name!r} holds no object; write one on each line")
                yield row
    else:
        yield from read_table(path)


@contextmanager
def _utf8(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is not UTF-8 ({error}); convert it first") from error


def _text_lines(path: Path) -> Iterator[str]:
    with _utf8(path) as file:
        for line in file:
            if "\0" in line:
                raise ValueError(f"text file {str(path)!r} is binary or UTF-16; convert it to UTF-8 text first")
            yield line.strip()


def _has_blank_line(path: Path) -> bool:
    return "\n\n" in "\n".join(islice(_text_lines(path), _LOOK_AHEAD)).strip()


def _text_documents(path: Path) -> Iterator[Document]:
    split = _has_blank_line(path)
    document: Document = []
    for line in chain(_text_lines(path), [""]):
        if line:
            document.append(line)
        if document and (not line or not split):
            yield document
            document = []


# ---- examples ----


class TextStream(IterableDataset[Example]):
    """An endless dataset of the examples that a generator function makes, shuffled within a buffer.

    Processes and workers divide each epoch: each makes its own share of the examples, so that no text is tokenized
    twice. Groups of all shares have about the same length in the same step, so that no process waits for another.

    Args:
        examples: makes a share of the examples of one epoch, given a seed that is another one for each.
        seed: of the first epoch and of the order; the same seed gives the same stream.
        buffer: examples.
        group: number of examples of similar length of one epoch that follow each other, so that a batch of them needs
            little padding; 1 leaves them in random order.
        share: of the process.

    Raises:
        ValueError: in the first step, if there are no examples.
    """

    def __init__(
        self,
        examples: Callable[[int, Share], Iterable[Example]],
        seed: int = 0,
        buffer: int = 2000,
        group: int = 1,
        share: Share = WHOLE,
    ) -> None:
        self._examples, self._seed, self._buffer, self._group, self._share = examples, seed, buffer, group, share

    def share(self, index: int, number: int) -> TextStream:
        """The stream of one of `number` processes."""
        share = self._share.divided(Share(index, number))
        return TextStream(self._examples, self._seed, self._buffer, self._group, share)

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        share = self._share.divided(Share(worker.id, worker.num_workers)) if worker else self._share
        for seed in count(self._seed):
            found = _shuffled(self._examples(seed, share), self._buffer, random.Random(seed))
            first = next(found, None)
            if first is None:
                divided = f" for share {share.index + 1} of {share.number}" if share.number > 1 else ""
                fewer = ", fewer processes or workers" if share.number > 1 else ""
                raise ValueError(
                    f"the text gives 0 examples{divided}; give more text, a larger fraction or a smaller length{fewer}"
                )
            found = chain([first], found)
            yield from _grouped(found, self._group, random.Random(seed)) if self._group > 1 else found


def _shuffled(examples: Iterable[Example], buffer: int, generator: random.Random) -> Iterator[Example]:
    held: list[Example] = []
    for example in examples:
        if len(held) < buffer:
            held.append(example)
        else:
            place = generator.randrange(buffer)
            yield held[place]
            held[place] = example
    generator.shuffle(held)
    yield from held


def _grouped(examples: Iterator[Example], size: int, generator: random.Random) -> Iterator[Example]:
    """Groups of similar length out of `_SORTED` of them at a time, in random order; what makes no group comes last."""
    while held := sorted(islice(examples, _SORTED * size), key=lambda example: len(example["input_ids"])):
        rest = held[len(held) // size * size :]
        groups = [held[start : start + size] for start in range(0, len(held) - len(rest), size)]
        generator.shuffle(groups)
        yield from chain(*groups, rest)


def stream_seed(arguments: TrainingArguments) -> int:
    """The `seed` of a `TextStream`: that of the data, where there is one of its own."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def length_group(arguments: TrainingArguments) -> int:
    """The `group` of a `TextStream` for ``train_sampling_strategy``, which the Trainer ignores for streams."""
    return arguments.train_batch_size if arguments.train_sampling_strategy == "group_by_length" else 1


def training_steps(arguments: TrainingArguments, examples: Iterable[Any]) -> int:
    """The steps of a training: `max_steps`, or those of `num_train_epochs` epochs of examples that are counted here.

    Args:
        arguments: with the size of a batch.
        examples: one epoch; not read if `max_steps` is given.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    bar = tqdm(examples, desc="counting examples (--max_steps skips this)", disable=arguments.disable_tqdm)
    number = sum(1 for _ in bar)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = max(1, math.ceil(number * arguments.num_train_epochs / batch))
    seconds = bar.format_dict["elapsed"]
    logger.info("%d examples in one epoch, counted in %.0f s, so %d steps", number, seconds, steps)
    return steps
