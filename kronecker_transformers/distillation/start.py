"""Where a student starts from."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.load import load_model
from ..compression.activations import Text
from ..compression.compress import compress
from ..models.kronecker_family import FACTORED_CLASSES, FAMILIES, family_of, longest_sequence
from ..modes import evaluating

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Of the hidden states of an earlier student, relative to their norm; 0.1 in half precision."""


def start_student(
    teacher: PreTrainedModel,
    plan: str | Mapping[str, Any] = "7.7x",
    start: str | os.PathLike[str] | None = None,
    *,
    ratio: float | None = None,
    calibration: Iterable[Text] | None = None,
    counted: Iterable[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """A student of `teacher`: factored from it, or the student of an earlier stage with the teacher's head.

    KroneckerBERT, section 3.5: for a task the student comes from the first stage and its prediction layer from the
    teacher. What the earlier student lacks comes from the teacher as well, and so does the pooler of one without a
    head: no loss of its stage has reached it, where the teacher's belongs to the prediction layer.

    Args:
        teacher: with the head that the student will have.
        plan: as for `compress`; not used with `start`, which has its own.
        start: folder or Hub name of a model of the same family and sizes, with any head, factored or dense, of as many
            layers or fewer.
        ratio: as for `compress`; not with `start`.
        calibration: texts for which the factors are fitted, as for `compress`; not with `start`.
        counted: texts of which only the words are counted, as for `compress`; not with `start`.
        tokenizer: of the teacher; needed with `calibration`.
        progress: show a progress bar of the calibration.

    Returns:
        A student whose parameters all train.

    Raises:
        ValueError, OSError: as `compress`; or `start` is of another family, of other sizes or of other settings, has
            more layers, or was given beside calibration text or a ratio.
    """
    if start is None:
        result = compress(
            teacher, plan, ratio=ratio, calibration=calibration, counted=counted, tokenizer=tokenizer, progress=progress
        )
        return result.model.requires_grad_(True).train()
    if ratio is not None:
        raise ValueError(f"start={os.fspath(start)!r} has its own plan, and ratio={ratio} was given; leave one out")
    if calibration is not None or counted is not None:
        raise ValueError(
            f"start={os.fspath(start)!r} has factors of its own, and calibration would replace them; give one of both"
        )
    earlier, _ = load_model(start)
    kinds = [FAMILIES[model.config.model_type].dense_config_class.model_type for model in (earlier, teacher)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"start={os.fspath(start)!r} is of the family {kinds[0]!r}, its teacher of {kinds[1]!r}; take another"
        )
    depth, whole = (model.config.num_hidden_layers for model in (earlier, teacher))
    if depth > whole:
        raise ValueError(f"start={os.fspath(start)!r} has {depth} layers, its teacher only {whole}; take another")
    student = keep_layers(teacher, range(depth))
    if type(earlier) not in FACTORED_CLASSES:
        student = compress(student, earlier.config.factor_plan).model
    wanted, found = student.base_model.state_dict(), earlier.base_model.state_dict()
    if earlier.base_model is earlier:
        pooler = family_of(earlier).pooler_module
        found = {name: value for name, value in found.items() if name.partition(".")[0] != pooler}
    for name, value in found.items():
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"{name!r} in {os.fspath(start)!r} has shape {tuple(value.shape)}, not {tuple(wanted[name].shape)} as "
                "a student of this teacher; start from a student of a teacher of the same sizes"
            )
    student.base_model.load_state_dict(found, strict=False)
    if (difference := _difference(earlier.float(), student)) > _TOLERANCE.get(student.dtype, 0.1):
        raise ValueError(
            f"start={os.fspath(start)!r} has other hidden states with its teacher's config than with its own (by "
            f"{difference:.2g} of their norm), so a setting differs, such as num_attention_heads or the activation; "
            "take a student of this teacher"
        )
    return student.requires_grad_(True).train()


@torch.no_grad()
def _difference(earlier: PreTrainedModel, student: PreTrainedModel) -> float:
    """Of the last hidden states of both on some tokens, relative to their norm."""
    length = min(16, longest_sequence(student))
    ids = torch.randint(student.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    found = []
    with evaluating(earlier, student):
        for model in (earlier, student):
            here = ids.to(model.device)
            output = model.base_model(here, attention_mask=torch.ones_like(here), return_dict=True)
            found.append(output.last_hidden_state.double().cpu())
    one, other = found
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one).clamp_min(1e-30))


def keep_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A dense student that has some of the teacher's layers and all that is not a layer, as DistilGPT2 has.

    It is distilled with ``layer_map=layers``.

    Args:
        teacher: a dense model with any head; it is not changed.
        layers: which of its layers, from 0, in ascending order.

    Returns:
        A model of the teacher's class whose parameters all train.

    Raises:
        ValueError: no layers, not in ascending order, or layers that the teacher does not have; or fewer layers of a
            teacher whose layers compute by their number.
    """
    depth, layers = teacher.config.num_hidden_layers, list(layers)
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(
            f"layers={layers} must be layers of the teacher, from 0 to {depth - 1}, in ascending order; correct them"
        )
    if layers != list(range(len(layers))) and getattr(teacher.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            f"layers={layers} would get other numbers, by which the teacher's attention is divided "
            "(scale_attn_by_inverse_layer_idx=True); keep its first layers, or all"
        )
    student = copy.deepcopy(teacher)
    base: Any = student.base_model
    owner, _, name = family_of(student).layers.rpartition(".")
    stack = nn.ModuleList(base.get_submodule(family_of(student).layers)[layer] for layer in layers)
    setattr(base.get_submodule(owner), name, stack)
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in the cache of generation
                vars(module)["layer_idx"] = index
    student.config.num_hidden_layers = len(layers)
    return student.requires_grad_(True).train()
