"""What a model is used for, as rows: how far a student's are from its teacher's on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..models.kronecker_family import family_of, heads_of, pooler_of
from .activations import CalibrationBatch, layers_of, recording

FEWEST_ROWS = 3
"""Outputs of which something is left when their mean is taken away, and more than a sign."""
PROBE_TOKENS, PROBE_VALUES = 4096, 2**27
"""Held-out tokens on which outputs are compared, at most; of a language model so many that they have these values."""


def check_held_out(model: Any, batches: Sequence[CalibrationBatch]) -> None:
    """Refuse calibration text that leaves too little to compare outputs on.

    Raises:
        ValueError: with what is needed.
    """
    kinds = {head.kind for head in heads_of(model)} or {"sequence"}  # without a head, of means over sequences too
    held_out = [batch for batch in batches if batch.held_out]
    if kinds & {"sequence", "next_sentence", "choices"}:
        rows, what = sum(len(batch.input_ids) for batch in held_out), "sequences"
    else:
        rows, what = sum(int(batch.attention_mask.sum()) for batch in held_out), "tokens"
    if rows < FEWEST_ROWS:
        raise ValueError(
            f"calibration text leaves {rows} held-out {what} to compare outputs on, and at least {FEWEST_ROWS} are "
            "needed; give some hundred sentences"
        )


def has_few_outputs(model: Any) -> bool:
    """Whether a model's heads give a handful of numbers for a text or token, as a classifier's do.

    They hardly tell what layers lose: on some fifty texts one number for each is mostly chance. Hidden states tell.
    """
    heads = heads_of(model)
    return bool(heads) and not {head.kind for head in heads} & {"words", "next_token"}


class HeldOutOutputs:
    """The outputs that count of a teacher on held-out text, centred.

    These are the logits of a classifier or for question answering, the roots of the probabilities of a language model,
    the pooled output for multiple choice, and without a head the last hidden states and their means over each sequence.

    Args:
        teacher: dense, with any head that is supported.
        batches: from `calibration_batches`; of what is held out, all, or of every length the share that gives
            `PROBE_TOKENS`, or `PROBE_VALUES`.
        keep_layers: keep what each layer puts out, so that `lost` can leave layers out.
        states: compare the last hidden states where there are few outputs.

    Raises:
        ValueError: too few of them.
    """

    def __init__(
        self, teacher: Any, batches: Sequence[CalibrationBatch], keep_layers: bool = False, states: bool = False
    ) -> None:
        held_out = [batch for batch in batches if batch.held_out]
        most = PROBE_TOKENS
        if {head.kind for head in heads_of(teacher)} & {"words", "next_token"}:
            most = max(1, min(most, PROBE_VALUES // teacher.config.vocab_size))
        every = -(-sum(int(batch.attention_mask.sum()) for batch in held_out) // most)
        self._batches = [_thinned(batch, every) for batch in held_out]
        check_held_out(teacher, batches)
        self._of = _states if states and has_few_outputs(teacher) else _outputs_that_count
        self._kept: list[list[Any]] = []
        if keep_layers:
            with torch.no_grad():
                self._kept = [_layer_outputs(teacher, batch) for batch in self._batches]
        self._wanted = self._outputs(teacher)

    def lost(self, model: Any, unchanged: int = 0) -> list[float]:
        """Relative error of a model's outputs, up to a common factor and their mean, of each kind.

        That is the root of 1 - the square of their correlation with the teacher's: 0 for the teacher's own, 1 for
        outputs that say nothing of these, above 1 where they run against them. So many `unchanged` layers, of a model
        that is the teacher's own up to there, are not computed again.
        """
        return [_lost(*pair) for pair in zip(self._wanted, self._outputs(model, unchanged), strict=True)]

    @torch.no_grad()
    def _outputs(self, model: Any, unchanged: int = 0) -> list[Tensor]:
        found = []
        for index, batch in enumerate(self._batches):
            known = self._kept[index][:unchanged] if unchanged else []
            with _put_out(layers_of(model.base_model)[1], known):
                found.append(self._of(model, batch))
        return [torch.cat(kind) - torch.cat(kind).mean(0) for kind in zip(*found, strict=True)]


def _thinned(batch: CalibrationBatch, every: int) -> CalibrationBatch:
    """One row in so many of a batch, the rows of which are sorted by length; at least one."""
    start = min(every, len(batch.input_ids)) // 2
    length = int(batch.attention_mask[start::every].sum(1).max())
    ids, mask = (rows[start::every, :length] for rows in (batch.input_ids, batch.attention_mask))
    types = None if batch.token_type_ids is None else batch.token_type_ids[start::every, :length]
    return CalibrationBatch(ids, mask, batch.held_out, types)


def _layer_outputs(model: Any, batch: CalibrationBatch) -> list[Any]:
    """What each layer puts out, whatever that is in its family."""
    _, layers = layers_of(model.base_model)
    with recording({str(index): layer for index, layer in enumerate(layers)}) as seen:
        model.base_model(**batch.inputs(model.device), use_cache=False)
    return [seen[str(index)][1] for index in range(len(layers))]


@contextmanager
def _put_out(layers: Iterable[nn.Module], known: Sequence[Any]) -> Iterator[None]:
    """Let the first layers put out what is known, without computing it."""
    first = list(islice(layers, len(known)))
    before = [vars(layer).get("forward") for layer in first]
    for layer, output in zip(first, known, strict=True):
        vars(layer)["forward"] = lambda *args, _output=output, **kwargs: _output
    try:
        yield
    finally:
        for layer, forward in zip(first, before, strict=True):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


def _lost(wanted: Tensor, got: Tensor) -> float:
    """Relative error of the best multiple of what was got, both centred: root of 1 - their correlation squared."""
    power, product, own = (float((a * b).sum()) for a, b in ((wanted, wanted), (wanted, got), (got, got)))
    if power == 0:
        return 0.0  # nothing to lose
    if not (math.isfinite(product) and 0 < own < math.inf):
        return 1.0
    if product < 0:
        return math.sqrt(1 + product**2 / (power * own))
    rest = wanted - product / own * got  # 1 - the correlation would lose the digits of a small error
    return math.sqrt(float(rest.square().sum()) / power)


def _states(model: Any, batch: CalibrationBatch) -> list[Tensor]:
    """The last hidden states, a row for each token."""
    causal = {"use_cache": False} if family_of(model).causal else {}
    hidden: Tensor = model.base_model(**batch.inputs(model.device), **causal, return_dict=True).last_hidden_state
    return [hidden[batch.real.to(hidden.device)].float()]


def _outputs_that_count(model: Any, batch: CalibrationBatch) -> list[Tensor]:
    """A row for each token or sequence, of each kind of outputs."""
    inputs, heads = batch.inputs(model.device), heads_of(model)
    real = inputs["attention_mask"].bool()
    if any(head.kind == "choices" for head in heads):
        output = model.base_model(**inputs, return_dict=True)
        pooled = output.last_hidden_state[:, 0] if pooler_of(model.base_model) is None else output.pooler_output
        return [pooled.float()]
    output = model(**inputs, return_dict=True, **({"use_cache": False} if family_of(model).causal else {}))
    if not heads:
        hidden = output.last_hidden_state.float()
        return [hidden[real], torch.stack([row[kept].mean(0) for row, kept in zip(hidden, real, strict=True)])]
    if heads[0].kind == "span":
        return [torch.stack([output[head.logits] for head in heads], -1).float()[real]]
    found = []
    for head in heads:
        logits = output[head.logits]
        rows = logits if head.kind in ("sequence", "next_sentence") else logits[real]
        if head.kind == "replaced":
            rows = rows.unsqueeze(-1)
        found.append(_distributions(rows) if head.kind in ("words", "next_token", "next_sentence") else rows.float())
    return found


def _distributions(logits: Tensor) -> Tensor:
    """Roots of probabilities, the distance of which is that of Hellinger."""
    return logits.float().softmax(-1).sqrt()
