"""Hidden states, queries, keys and values of a model, read by forward hooks while the model computes as it likes.

SDPA and other fused attentions go on computing the attention: scores before softmax are a product of query and key. A
model that is asked for its attentions by `output_attentions` under SDPA gives none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..models.kronecker_family import family_of, projection_of
from . import losses


class Projections(NamedTuple):
    """Query, key and value of one layer, all (batch, length, heads * d), and what turns query and key into scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    scaling: float
    bias: Tensor | None = None
    """Added to the scores, (heads, length, length)."""

    def scores(self) -> Tensor:
        """Of the attention, before mask and softmax, (batch, heads, length, length)."""
        return losses.attention_scores(self.query, self.key, self.heads, self.scaling, self.bias)

    def relations(self) -> Tensor:
        """Of queries, of keys and of values with each other, (batch, 3 * heads, length, length)."""
        return losses.relation_scores(self.query, self.key, self.value, self.heads)


@dataclass
class Recording:
    """What one forward pass showed; what was not asked for is empty.

    Attributes:
        states: the output of the embedding layer, or of the projection after it, then of each layer, then of the norm
            after the last layer if there is one, (batch, length, hidden) each.
        depth: number of layers.
        attention: query, key and value of each layer.
    """

    states: list[Tensor] = field(default_factory=list)
    depth: int = 0
    attention: list[Projections] = field(default_factory=list)

    @property
    def embeddings(self) -> Tensor:
        """What goes into the first layer."""
        return self.states[0]

    @property
    def layers(self) -> list[Tensor]:
        """Output of each layer."""
        return self.states[1 : self.depth + 1]

    @property
    def last(self) -> Tensor:
        """The last hidden state of the model."""
        return self.states[-1]


class Recorder:
    """Reads hidden states, queries, keys and values of one model.

    The hooks stay on the model from `attach` to `detach` and do nothing outside `recording`, so that a compiled forward
    pass keeps one graph for training.

    Args:
        hidden_states, attention: what to read.
    """

    def __init__(self, hidden_states: bool = True, attention: bool = True) -> None:
        self._wants_hidden = hidden_states
        self._wants_attention = attention
        self._recording = False
        self._found: dict[str, Tensor] = {}
        self._heads = 0
        self._bias: nn.Module | None = None
        self._layers: list[Any] = []
        self._states: list[Any] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, model: PreTrainedModel) -> None:
        """Put the hooks on `model`."""
        self.detach()
        base, family = model.base_model, family_of(model)
        layers: Any = base.get_submodule(family.layers)
        norms = [base.get_submodule(family.norm)] if family.norm else []
        self._heads = model.config.num_attention_heads
        self._layers = [layer.get_submodule(family.attention) for layer in layers]
        embedded = base.get_submodule(family.embedded)
        self._states = [projection_of(base) or embedded, *layers, *norms]
        self._bias = base.get_submodule(family.position_bias) if family.position_bias else None
        if self._wants_hidden:
            for i, module in enumerate(self._states):
                self._hook(module, f"hidden {i}")
        if self._wants_attention:
            if self._bias is not None:
                self._hook(self._bias, "bias 0")
            for i, layer in enumerate(self._layers):
                names = {"query": family.query, "key": family.key, "value": family.value}
                if family.query == family.key:
                    self._hook(layer.get_submodule(family.query), *(f"{name} {i}" for name in names))
                    continue
                for name, module in names.items():
                    self._hook(layer.get_submodule(module), f"{name} {i}")

    def _hook(self, module: nn.Module, *names: str) -> None:
        """Keep the output of a module under a name, or the thirds of a joint output under three."""

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._recording:
                output = output[0] if isinstance(output, tuple) else output
                self._found.update(zip(names, output.chunk(len(names), -1), strict=True))

        self._handles.append(module.register_forward_hook(keep))

    def detach(self) -> None:
        """Take the hooks off again."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Run the model once in this block; what it showed is there when the block ends.

        Raises:
            RuntimeError: a module was not run, or no gradient can flow back from a query.
        """
        result = Recording(depth=len(self._layers))
        self._recording = True
        try:
            yield result
            if self._wants_hidden:
                result.states += [self._take(f"hidden {i}") for i in range(len(self._states))]
            if self._wants_attention:
                bias = None if self._bias is None else self._take("bias 0").permute(2, 0, 1)
                for i, layer in enumerate(self._layers):
                    query, key, value = (self._take(f"{name} {i}") for name in ("query", "key", "value"))
                    trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
                    if trained and not query.requires_grad:
                        raise RuntimeError(
                            f"query of layer {i} carries no gradient, so its loss would not train anything; "
                            "checkpoint with use_reentrant=False"
                        )
                    result.attention.append(Projections(query, key, value, self._heads, _scaling(layer), bias))
        finally:
            self._recording = False
            self._found.clear()

    def _take(self, name: str) -> Tensor:
        if name not in self._found:
            what, layer = name.split()
            raise RuntimeError(
                f"{what} of layer {layer} was not seen in the forward pass; use a model that runs every module of its "
                "class, or set the weights of the losses that need it to 0"
            )
        return self._found[name]


def _scaling(attention: Any) -> float:
    """The factor of the scores; where a class does not keep it, that of its source, 1 / sqrt(d)."""
    scaling: float = getattr(attention, "scaling", None) or attention.attention_head_size**-0.5
    return scaling
