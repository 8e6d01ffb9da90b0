"""Hidden states, queries and keys of a model, read by forward hooks while the model computes as it likes.

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


class QueryKey(NamedTuple):
    """Query and key of one layer, both (batch, length, heads * d), and what turns them into scores."""

    query: Tensor
    key: Tensor
    heads: int
    scaling: float
    bias: Tensor | None = None
    """Added to the scores, (heads, length, length)."""


@dataclass
class Recording:
    """What one forward pass showed; what was not asked for is empty.

    Attributes:
        states: the output of the embedding layer, or of the projection after it, then of each layer, then of the norm
            after the last layer if there is one, (batch, length, hidden) each.
        depth: number of layers.
        attention: query and key of each layer.
    """

    states: list[Tensor] = field(default_factory=list)
    depth: int = 0
    attention: list[QueryKey] = field(default_factory=list)

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
    """Reads hidden states, queries and keys of one model.

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
                if family.query == family.key:
                    self._hook(layer.get_submodule(family.query), f"query {i}", f"key {i}")
                else:
                    self._hook(layer.get_submodule(family.query), f"query {i}")
                    self._hook(layer.get_submodule(family.key), f"key {i}")

    def _hook(self, module: nn.Module, *names: str) -> None:
        """Keep the output of a module under a name, or the first thirds of a joint output under two."""

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._recording:
                output = output[0] if isinstance(output, tuple) else output
                parts = (output,) if len(names) == 1 else output.chunk(3, -1)
                self._found.update(zip(names, parts, strict=False))

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
                    query, key = self._take(f"query {i}"), self._take(f"key {i}")
                    trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
                    if trained and not query.requires_grad:
                        raise RuntimeError(
                            f"query of layer {i} carries no gradient, so its loss would not train anything; "
                            "checkpoint with use_reentrant=False"
                        )
                    result.attention.append(QueryKey(query, key, self._heads, _scaling(layer), bias))
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
