"""From the hidden states of a sentence to its embedding, as sentence-transformers does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
"""As sentence-transformers calls them: mean over the tokens, first token, maximum, last token, mean with the weights 1,
2, 3 ..., and sum divided by the square root of the number of tokens."""


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of the tokens become one vector.

    Attributes:
        modes: one or more of `MODES`; the vectors of several are put side by side.
        skip: tokens at the start that do not count: those of a prompt.

    Raises:
        ValueError: an unknown mode, or none.
    """

    modes: tuple[str, ...] = ("mean",)
    skip: int = 0

    def __post_init__(self) -> None:
        if unknown := [mode for mode in self.modes if mode not in MODES] or not self.modes:
            raise ValueError(f"pooling modes {self.modes} must be one or more of {', '.join(MODES)}: {unknown}")

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, not normalised.

        Args:
            hidden: (S, L, hidden); what stands at padding may be anything.
            mask: (S, L), 1 or True at the tokens, 0 or False at padding.

        Returns:
            (S, len(modes) * hidden), in the dtype of `hidden`.
        """
        position = mask.bool().cumsum(-1)  # 1 at the first token of a sentence, (S, L)
        counted = mask.bool() & (position > self.skip)
        states = hidden.masked_fill(~counted.unsqueeze(-1), 0)
        return torch.cat([_pooled(mode, states, counted, position) for mode in self.modes], -1)


def _pooled(mode: str, states: Tensor, counted: Tensor, position: Tensor) -> Tensor:
    if mode == "max":
        return states.masked_fill(~counted.unsqueeze(-1), -torch.inf).amax(1)
    if mode in ("cls", "lasttoken"):
        index = counted.int().argmax(-1) if mode == "cls" else (counted * position).argmax(-1)
        return states[torch.arange(len(states), device=states.device), index]
    weights = (counted * (position if mode == "weightedmean" else 1)).to(states.dtype)  # (S, L)
    total = weights.sum(-1, keepdim=True).clamp_min(1)
    summed = (states * weights.unsqueeze(-1)).sum(1)
    return summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


MEAN = Pooling()
"""What most sentence encoders have."""
