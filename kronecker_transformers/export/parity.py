"""How near a graph of ONNX Runtime comes to the model in PyTorch that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.teachers import check_vocabulary
from ..models.kronecker_family import has_choices, heads_of, longest_sequence
from .runtimes import open_session

FORMS = {
    "fp32": "onnx/model.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "openvino": "openvino/openvino_model.xml",
    "openvino_int8": "openvino/openvino_model_qint8_quantized.xml",
}
"""Names in the folder, as transformers.js, sentence-transformers and others look for them."""
TOLERANCES = {"fp32": 1e-4, "int8": 0.5, "int4": 0.5, "fp16": 0.02, "openvino": 1e-4, "openvino_int8": 0.5}
"""Of the outputs: in fp32 the largest difference from PyTorch's, relative to the largest output; in others the norm of
the differences, relative to that of the outputs. More means that something is wrong, not rounded."""
LENGTH, BATCH = 128, 8
"""Tokens of a text, and texts at a time, that are compared: the logits of a language model are large."""
SENTENCES = (
    "A man is playing a guitar on the street, and nobody listens.",
    "The quarterly report shows that sales in Europe fell by three per cent while costs rose.",
    "Is it going to rain tomorrow?",
    "She had been reading for hours when the lights went out; the book lay open on her knees until the morning came.",
)
"""What graphs are compared on where no text is given."""


@dataclass(frozen=True)
class ExportedFile:
    """A graph that was written, and how near it comes."""

    name: str
    size: int
    """Bytes."""
    difference: float
    """Largest difference of an output from PyTorch's, relative to the largest output."""
    relative_error: float
    """Norm of the differences of all outputs, relative to the norm of the outputs."""


def has_past(model: PreTrainedModel) -> bool:
    """Whether its graph takes and gives keys and values."""
    return any(head.kind == "next_token" for head in heads_of(model))


def text_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Batches of texts, and the first text alone: `input_ids` and `attention_mask`, padded on the right.

    Args:
        model: for which they are.
        tokenizer: without one, tokens are drawn at random, as many sequences as there are texts.
        texts: at least one; of each the first `LENGTH` tokens are taken. Those without any token are left out.

    Raises:
        ValueError: no text has a token, or one is beyond the vocabulary.
    """
    longest = min(LENGTH, longest_sequence(model))
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        lengths = [min(longest, 5 + 6 * i) for i in range(len(texts))]
        rows = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    else:
        rows = [ids for text in texts if (ids := tokenizer(text, truncation=True, max_length=longest).input_ids)]
        if not rows:
            raise ValueError(f"texts={list(texts)[:3]} have no tokens to compare the graphs on; give some sentences")
        check_vocabulary(model, max(map(max, rows)))
    batches = []
    for part in (rows[:1], *(rows[start : start + BATCH] for start in range(0, len(rows), BATCH))):
        ids, mask = torch.zeros(2, len(part), max(map(len, part)), dtype=torch.long)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ids[mask == 0] = model.config.pad_token_id or 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if has_choices(model):
            batch = {name: value.unsqueeze(1) for name, value in batch.items()}
        batches.append(batch)
    return batches


@torch.no_grad()
def checked_graph(
    model: PreTrainedModel, folder: Path, form: str, batches: Sequence[Mapping[str, Tensor]]
) -> ExportedFile:
    """Compare the graph of a form in a folder with the model, in fp32 on the CPU.

    Raises:
        ValueError: it gives other outputs.
    """
    name = FORMS[form]
    session = open_session(folder / name)
    peaks, norms = np.zeros(2), np.zeros(2)  # of the differences and of what PyTorch gives; NaN stays NaN
    for batch in batches:
        expected, found = model(**batch), run(session, batch)
        if has_past(model):
            found["logits"] = _token_by_token(session, batch, found["logits"])
        real = batch["attention_mask"].bool().numpy()
        for key, output in found.items():
            wanted = expected[key].double().numpy()
            if wanted.shape[: real.ndim] == real.shape:
                wanted, output = wanted[real], output[real]
            pair = (wanted - output, wanted)
            peaks = np.maximum(peaks, [np.abs(values).max() for values in pair])
            norms = np.hypot(norms, [np.linalg.norm(values) for values in pair])
    difference, relative_error = (float(gap / max(whole, 1e-30)) for gap, whole in (peaks, norms))
    file = ExportedFile(name, graph_bytes(folder / name), difference, relative_error)
    exact = form in ("fp32", "openvino")
    measured, limit = file.difference if exact else file.relative_error, TOLERANCES[form]
    if not measured <= limit:
        remedy = "report this, with the model's config.json"
        if not exact:  # a model that was not distilled may be as fragile as that
            remedy = f"{form} is too coarse for its weights: distil it first, or export it without {form}"
        raise ValueError(
            f"outputs of {name} differ from PyTorch's by {measured:.2g} of their size, more than {limit:g}; {remedy}"
        )
    return file


def graph_bytes(path: Path) -> int:
    """Size of a graph with its weights, which OpenVINO has in a file beside it."""
    return sum(file.stat().st_size for file in {path, path.with_suffix(".bin")} if file.exists())


def run(session: Any, batch: Mapping[str, Any], with_past: bool = False) -> dict[str, np.ndarray]:
    """What a session of ONNX Runtime gives for token ids and a mask, its outputs by name.

    What else its graph takes is added: segments 0, and with an empty past the positions from 0 on.

    Args:
        session: of a graph that `export_onnx` has written.
        batch: tensors or arrays by name: `input_ids` (batch, length), or (batch, choices, length); `attention_mask`,
            (batch, past and length); "present.0.key" (batch, heads, past, size) and so on of an earlier result.
        with_past: return keys and values too.
    """
    feed = {name.replace("present.", "past_key_values."): np.asarray(value) for name, value in batch.items()}
    ids = feed["input_ids"]
    for value in session.get_inputs():
        if value.name in feed:
            continue
        if value.name == "token_type_ids":
            feed[value.name] = np.zeros_like(ids)
        elif value.name == "position_ids":
            start = feed["attention_mask"].shape[-1] - ids.shape[-1]
            feed[value.name] = np.broadcast_to(np.arange(start, start + ids.shape[-1]), ids.shape)
        else:
            feed[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    names = [value.name for value in session.get_outputs() if with_past or not value.name.startswith("present.")]
    return dict(zip(names, session.run(names, feed), strict=True))


def _token_by_token(session: Any, batch: Mapping[str, Tensor], logits: np.ndarray) -> np.ndarray:
    """The logits of a batch again, the second half of its tokens read one by one after the first half."""
    logits, ids, mask = logits.copy(), batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    start, past = 0, dict[str, np.ndarray]()
    for end in range(max(1, ids.shape[1] // 2), ids.shape[1] + 1):
        step = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **past}
        past = run(session, step, with_past=True)
        logits[:, start:end] = past.pop("logits")
        start = end
    return logits
