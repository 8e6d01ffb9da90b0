"""What passes from a dense model to a factored one, and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.kronecker_family import family_of, pooler_of
from ..models.kronecker_layers import FrequentWords


def model_like(source: PreTrainedModel, model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A new model of another class, with the kind of attention and the pooler of `source`, or without one."""
    config._attn_implementation = source.config._attn_implementation
    choices = {}
    if source.base_model is source and family_of(source).pooler:
        choices["add_pooling_layer"] = pooler_of(source) is not None
    return model_class(config, **choices)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether everything that a model's class ties is one parameter; what the config says where there is nothing."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return bool(model.config.tie_word_embeddings)
    own, table = dict(head.named_parameters()), dict(embedding.named_parameters(recurse=False))
    ties = type(model)._tied_weights_keys  # what transformers itself reads
    biases = [(model.get_parameter(a), model.get_parameter(b)) for a, b in ties.items() if a.endswith(".bias")]
    return all(torch.equal(*pair) for pair in biases) and all(own.get(name) is p for name, p in table.items())


def copy_rest(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy to `target` the parameters and buffers that it shares with `source`, bit by bit, then its settings."""
    source_modules = dict(source.named_modules())
    shapes = {name: parameter.shape for name, parameter in target.named_parameters()}
    for name, module in target.named_modules():
        if isinstance(module, FrequentWords):  # a dense embedding has none apart
            continue
        other = source_modules[name]
        for key, parameter in other.named_parameters(recurse=False):
            if getattr(module._parameters.get(key), "is_meta", False):
                set_parameter(module, key, parameter.detach().clone(), parameter)
        for key, buffer in other.named_buffers(recurse=False):
            module._buffers[key] = buffer.detach().clone()
    target.tie_weights()
    for name, parameter in target.named_parameters():
        if parameter.is_meta or (name in shapes and shapes[name] != parameter.shape):
            raise ValueError(
                f"parameter {name!r} of the {type(source).__name__} does not have the shape of its config; "
                "remove parametrizations, adapters and quantization first"
            )
    if source.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    target.eval()


def set_parameter(module: nn.Module, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Make `value` a parameter of a module, which trains if `like` does."""
    setattr(module, name, nn.Parameter(value, requires_grad=like.requires_grad))
