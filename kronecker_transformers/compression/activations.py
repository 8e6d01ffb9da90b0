"""Text on its way through a model, layer after layer, for what looks at its layers.

Hidden states of all text are kept between two layers, so nothing is computed from the start again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..checkpoint.teachers import check_pad_token, check_vocabulary
from ..models.kronecker_family import family_of, longest_sequence

Text = str | tuple[str, str]
"""Calibration text: a sentence or document, or a pair of texts that a model reads together."""

LENGTH = 128
"""Tokens of a calibration sequence, at most."""
BATCH_TOKENS = 4096
"""Tokens that go through a model at a time, at most, padding included."""
HELD_OUT = 10
"""One sequence in ten is held out."""
COUNTED = 20_000
"""Texts whose words are counted, where there are so many."""
_COUNTED_AT_ONCE = 1000


class CalibrationBatch(NamedTuple):
    """Sequences of similar length, padded on the right."""

    input_ids: Tensor
    """(batch, length)"""
    attention_mask: Tensor
    """(batch, length), 1 for what is not padding."""
    held_out: bool
    token_type_ids: Tensor | None = None
    """(batch, length); of pairs, for models that tell the second text from the first by them."""

    @property
    def real(self) -> Tensor:
        """Positions that are not padding, (batch, length), bool."""
        return self.attention_mask.bool()

    def inputs(self, device: Any) -> dict[str, Tensor]:
        """What a model on this device is called with."""
        named = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "token_type_ids")}
        return {name: value.to(device) for name, value in named.items() if value is not None}


def calibration_batches(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int = LENGTH
) -> list[CalibrationBatch]:
    """Encode calibration text: text by text, or in whole blocks for a causal model.

    Longer texts are cut into pieces; of a pair the longer text loses its end, as it does in front of a classifier.

    Args:
        texts: sentences or documents, or pairs of them (a causal model reads both with a line break between).
        tokenizer: of the teacher.
        model: the teacher, or its student.
        length: tokens of a sequence, at most; cut to what the model can take.

    Returns:
        Batches of sequences of similar length, some of them held out.

    Raises:
        TypeError: a text is neither a string nor a pair of them, or all is one string.
        ValueError: too few texts, words that the embedding does not have, or a causal classifier that does not know its
            padding token.
    """
    checked = list(_parts(texts, "calibration"))
    check_pad_token(model)
    texts = [parts if len(parts) == 2 else parts[0] for parts in checked if "".join(parts).strip()]
    length = min(length, longest_sequence(model))
    rows: list[_Row] = []
    if family_of(model).causal:
        whole = [text if isinstance(text, str) else "\n".join(text) for text in texts]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = list(chain.from_iterable([*row, *end] for row in tokenizer(whole)["input_ids"])) if texts else []
        rows = [_Row(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    else:
        if single := [text for text in texts if isinstance(text, str)]:
            rows += map(_Row, _pieces(single, tokenizer, length))
        if pairs := [text for text in texts if not isinstance(text, str)]:
            rows += _pairs(pairs, tokenizer, length, "token_type_ids" in inspect.signature(model.forward).parameters)
    check_vocabulary(model, max((max(row.ids) for row in rows), default=0))
    if len(rows) < HELD_OUT:
        raise ValueError(
            f"calibration text of {len(texts)} texts gives {len(rows)} sequences of at most {length} tokens; at least "
            f"{HELD_OUT} are needed, and some thousand sentences do well"
        )
    rows.sort(key=lambda row: len(row.ids))
    held_out = rows[HELD_OUT // 2 :: HELD_OUT]
    del rows[HELD_OUT // 2 :: HELD_OUT]
    return [*_batches(rows, False), *_batches(held_out, True)]


def word_counts(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """How often each word of the vocabulary occurs in texts, (vocabulary,) float64; of a pair in both.

    Raises:
        TypeError: a text is neither a string nor a pair of them, or all is one string.
        ValueError: no words at all, or words that the embedding does not have.
    """
    embedding: Any = model.get_input_embeddings()
    counts = torch.zeros(embedding.num_embeddings, dtype=torch.float64)
    left = chain.from_iterable(_parts(texts, "counted"))
    while some := list(islice(left, _COUNTED_AT_ONCE)):
        ids = list(chain.from_iterable(tokenizer(some, verbose=False)["input_ids"]))  # long texts too, as a whole
        check_vocabulary(model, max(ids, default=0))
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(counts))
    if not counts.any():
        raise ValueError("counted text has no words; give some ten thousand texts, or leave it out")
    return counts


def _parts(texts: Iterable[Text], what: str) -> Iterator[tuple[str, ...]]:
    """Texts as tuples of one or two strings.

    Raises:
        TypeError: as `calibration_batches`.
    """
    if isinstance(texts, str):
        raise TypeError(f"{what} text is one string; give a list of strings")
    for index, text in enumerate(texts):
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(f"{what} text {index} is of type {type(text).__name__}; give strings, or tuples of two")
        yield parts


class _Row(NamedTuple):
    ids: list[int]
    types: list[int] | None = None


def _pieces(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """The ids of texts, each piece of a longer one with the special tokens."""
    if tokenizer.is_fast:
        cut = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        rows: list[list[int]] = tokenizer(texts, **cut)["input_ids"]
        return rows
    room = length - tokenizer.num_special_tokens_to_add()
    plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = chain.from_iterable([row[i : i + room] for i in range(0, max(1, len(row)), room)] for row in plain)
    return [tokenizer.build_inputs_with_special_tokens(piece) for piece in pieces]


def _pairs(
    pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, length: int, with_types: bool
) -> list[_Row]:
    """Pairs of texts, with the types of their tokens where tokenizer and model have them."""
    sides = [one for one, _ in pairs], [other for _, other in pairs]
    encoded = tokenizer(*sides, truncation=True, max_length=length, verbose=False)
    types = encoded.get("token_type_ids") if with_types else None
    return [_Row(ids, types[i] if types else None) for i, ids in enumerate(encoded["input_ids"])]


def _batches(rows: list[_Row], held_out: bool) -> Iterator[CalibrationBatch]:
    """Batches of sorted rows; padded with 0, since the mask hides what stands there."""
    while rows:
        size = next((n for n in range(1, len(rows)) if (n + 1) * len(rows[n].ids) > BATCH_TOKENS), len(rows))
        batch, rows = rows[:size], rows[size:]
        ids, mask, types = torch.zeros(3, size, len(batch[-1].ids), dtype=torch.long)
        for i, row in enumerate(batch):
            number = len(row.ids)
            ids[i, :number], mask[i, :number] = torch.tensor(row.ids), 1
            if row.types is not None:
                types[i, :number] = torch.tensor(row.types)
        yield CalibrationBatch(ids, mask, held_out, types if types.any() else None)


@dataclass
class Stream:
    """A batch on its way through one model: what its next layer is called with."""

    real: Tensor
    """Positions that are not padding, (batch, length), bool."""
    held_out: bool
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def through(self, layer: nn.Module) -> Tensor:
        """What a layer makes of it, (batch, length, hidden)."""
        output = layer(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def advance(self, layer: nn.Module) -> None:
        """Go through a layer."""
        self.hidden = self.through(layer)


class _Seen(Exception):  # noqa: N818 - not an error
    """All that was wanted has been seen; the rest of the forward pass is not needed."""


@contextmanager
def seeing(modules: Mapping[str, nn.Module], outputs: bool = False) -> Iterator[dict[str, Any]]:
    """Run something in this block until all modules were called: their (args, kwargs), or their outputs, by name."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            found[name] = output if outputs else (args, kwargs)
            if len(found) == len(modules):
                raise _Seen

        return hook

    register = nn.Module.register_forward_hook if outputs else nn.Module.register_forward_pre_hook
    handles = [register(module, keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with suppress(_Seen):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """Run something in this block, whole: the first input and the output of each module, by name."""
    found: dict[str, tuple[Tensor, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = args[0], output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def weight_of(module: Any) -> Tensor:
    """The weight of a dense linear layer or embedding as (m outputs, n inputs), or (rows, n)."""
    weight: Tensor = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return weight


def modules_named(base: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Those of a base model with these names; a pooler may be named that it does not have."""
    modules = dict(base.named_modules())
    return [modules[name] for name in names if name in modules]


def layers_of(base: Any) -> tuple[str, nn.ModuleList]:
    """Name and modules of the stack of layers of a base model."""
    place = family_of(base).layers
    return place, base.get_submodule(place)


def enter(base: Any, batches: Iterable[CalibrationBatch]) -> list[Stream]:
    """All batches before the first layer of a base model."""
    streams = []
    for batch in batches:
        inputs = batch.inputs(base.device)
        with seeing({"first": layers_of(base)[1][0]}) as seen:
            base(**inputs, use_cache=False)
        (hidden, *args), kwargs = seen["first"]
        streams.append(Stream(inputs["attention_mask"].bool(), batch.held_out, hidden, tuple(args), kwargs))
    return streams


def groups_of(layer: nn.Module, names: Sequence[str], stream: Stream) -> list[list[str]]:
    """Modules of a layer in the order in which they compute; those that share their input together."""
    if not names:
        return []
    with seeing({name: layer.get_submodule(name) for name in names}) as seen:
        stream.through(layer)
    groups: list[list[str]] = []
    last = None
    for name, ((x, *_), _) in seen.items():
        if x is last:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return groups
