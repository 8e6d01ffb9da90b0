"""What to distil: the objective, as weights of losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from .losses import LOSSES, Loss

OBJECTIVES: dict[str, dict[str, float]] = {
    # NAACL 2022, section 3.5: all losses with weight 1
    "kronecker_bert": dict.fromkeys(("embedding_mse", "attention_mse", "hidden_mse", "logits", "supervised"), 1.0),
    # ACL 2022, section 3: a1 to a4; the paper does not print their values
    "kngpt2": dict.fromkeys(("embedding_mse", "attention_kl", "hidden_mse", "supervised"), 1.0),
    # not of the papers: what a sentence encoder is used for; hidden states beside it make no difference
    "sentence_encoder": {"pooled": 20.0, "similarity_kl": 10.0},
}
"""Weights of losses by objective; a loss that is not listed has weight 0."""


def _weight(loss: Loss) -> Any:
    return field(default=None, metadata={"help": f"Weight >= 0 of {loss.text}; default: that of the objective."})


_Weights: Any = make_dataclass(
    "_Weights", [(f"{name}_weight", float | None, _weight(loss)) for name, loss in LOSSES.items()]
)


@dataclass
class DistillationArguments(_Weights, TrainingArguments):
    """`TrainingArguments`, and the objective of a distillation.

    Raises:
        ValueError: an unknown objective, a weight below 0 or not finite, all weights 0, a temperature or limit of
            minutes that is not above 0, or Muon without AdamW or without rates by factor.
    """

    objective: str = field(
        default="kronecker_bert",
        metadata={"help": f"Which weights to start from: {', '.join(OBJECTIVES)}.", "choices": list(OBJECTIVES)},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature > 0 of the KL divergence between the outputs of the heads."}
    )
    layer_map: list[int] | None = field(
        default=None,
        metadata={"help": "Teacher's layer, from 0, for each layer of the student; default: equal depth, one to one."},
    )
    dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout of the student while it trains, 0 <= dropout < 1; default: that of its config."},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Minutes > 0 after which the training ends, with the learning rate of its end; max_steps may end "
            "it before. Default: no limit."
        },
    )
    balanced: bool = field(
        default=False,
        metadata={
            "help": "Divide each weight by the norm of its loss's gradient in the first step: a weight is the loss's "
            "share of the gradient then, whatever its unit."
        },
    )
    factor_learning_rates: bool = field(
        default=True,
        metadata={
            "help": "Scale the learning rate of each factor (see kronecker_transformers.distillation.optimizer)."
        },
    )
    muon: bool = field(
        default=False,
        metadata={"help": "Update the factors of linear layers by Muon; all else by AdamW, which optim must be."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn of it
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not known; choose one of {', '.join(OBJECTIVES)}")
        for loss in LOSSES:
            name = f"{loss}_weight"
            if getattr(self, name) is None:
                setattr(self, name, OBJECTIVES[self.objective].get(loss, 0.0))
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number >= 0; use 0 to leave the loss out")
        if not self.weights():
            raise ValueError("all weights are 0, so there is nothing to train on; give one loss a weight above 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature} must be a finite number > 0; 1 leaves the logits as they are"
            )

        if self.max_minutes is not None and not (math.isfinite(self.max_minutes) and self.max_minutes > 0):
            raise ValueError(f"max_minutes={self.max_minutes} must be a finite number > 0; leave it out for no limit")
        optim = getattr(self.optim, "value", self.optim)
        if self.muon and optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"muon=True goes with optim='adamw_torch', not {optim!r}; leave one of both out")
        if self.muon and not self.factor_learning_rates:
            raise ValueError("muon=True needs factor_learning_rates=True; leave one of both out")
        if self.muon and self.deepspeed_plugin is not None:
            raise ValueError(
                "muon=True needs whole factors, and DeepSpeed gives the optimizer flat pieces of all parameters; use "
                "FSDP2 in its place, or set muon to False"
            )
        self.check_whole(self.deepspeed_plugin is None and not self.fsdp)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout} must be at least 0 and below 1; leave it out to keep the config's"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the token for the Hub: the Trainer pickles its arguments into each checkpoint."""
        return {**self.__dict__, "hub_token": None}

    def check_whole(self, whole: bool) -> None:
        """Refuse `balanced` where the parameters are not whole.

        Raises:
            ValueError: it is set, and they are divided.
        """
        if self.balanced and not whole:
            raise ValueError(
                "balanced=True needs the gradients of whole parameters, which FSDP and DeepSpeed divide; set balanced "
                "to False"
            )

    def weights(self) -> dict[str, float]:
        """Weight of every loss that has one above 0, by the loss's name."""
        return {name: weight for name in LOSSES if (weight := getattr(self, f"{name}_weight"))}
