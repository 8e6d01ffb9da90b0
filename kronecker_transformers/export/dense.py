"""The dense twin of a factored model: a stock model with the same outputs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.convert import copy_rest, is_tied, model_like, set_parameter
from ..checkpoint.sentence_modules import modules_of, share_modules
from ..checkpoint.teachers import check_finite, needs_pad_token
from ..models import DENSE_CLASSES
from ..models.kronecker_family import has_choices, longest_sequence
from ..models.kronecker_layers import KroneckerEmbedding, KroneckerLinear
from ..modes import evaluating


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense twin of a factored model: factors multiplied out, a stock class.

    It gives the same outputs, runs wherever the stock model runs, and saves no space. Its output head is tied if that
    of the model is, whatever the config says of it.

    Raises:
        ValueError: the model is not one of this package's factored classes, its weights are not finite, or the twin
            gives other outputs.
    """
    if type(model) not in DENSE_CLASSES:
        raise ValueError(
            f"model of class {type(model).__module__}.{type(model).__name__} is not one of this package's factored "
            "models; import kronecker_transformers before loading it, so that its own classes are used"
        )
    check_finite(model)
    dense_class = DENSE_CLASSES[type(model)]
    config = model.config.to_dense_config()
    config.tie_word_embeddings = is_tied(model)
    with torch.device("meta"):
        dense = model_like(model, dense_class, config)
    factored_modules = dict(model.named_modules())
    for name, module in dense.named_modules():
        source = factored_modules[name]
        tied = f"{name}.weight" in dense.all_tied_weights_keys
        if isinstance(source, (KroneckerLinear, KroneckerEmbedding)) and not tied:
            weight = source.to_dense().detach()
            set_parameter(module, "weight", weight.t().contiguous() if isinstance(module, Conv1D) else weight, source.A)
    copy_rest(model, dense)
    _check_outputs(model, dense)
    share_modules(modules_of(model), dense)
    return dense


_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the outputs of a dense twin, relative to their norm; 0.1 in half precision, in which its products are rounded."""


@torch.no_grad()
def _check_outputs(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Compare the outputs of both on some tokens.

    Raises:
        ValueError: they differ by more than rounding.
    """
    length, rows = min(16, longest_sequence(model)), 1 if needs_pad_token(model) else 2
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = ids.unsqueeze(0) if has_choices(model) else ids
    batch = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    with evaluating(model, dense):
        ours, twins = (dict(m(**batch, return_dict=True)) for m in (model, dense))
    tolerance = _TOLERANCE.get(model.dtype, 0.1)
    for name, output in ours.items():
        if isinstance(output, torch.Tensor):
            difference = (twins[name] - output).double().norm() / output.double().norm().clamp_min(1e-30)
            if not difference <= tolerance:
                raise ValueError(
                    f"the dense twin's {name} differ from the model's by {difference:.2g} of their norm, more than "
                    f"{tolerance:g}; report this, with the model's config.json"
                )
