"""What the heads of a model put out, and how it is compared with a teacher's output and with labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..models.kronecker_family import Head, heads_of
from . import losses


def real_positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """True where a batch has a token, False at its padding, (..., length)."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@dataclass(frozen=True)
class Output(Head):
    """A head of one model, with the losses that its kind of labels has.

    `kind` is "classes" (examples, classes); "values", a regression, and "binary", many labels, both (examples,
    outputs); "tokens" and "next_token" (examples, length, classes); "span" or "replaced" (examples, length).
    """

    def targets(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The labels in the form in which the supervised loss counts and compares them.

        Raises:
            ValueError: they are numbers where classes are needed, or no truth values of several labels.
        """
        labels = inputs[self.labels]
        if self.kind == "binary" and (labels.ndim != 2 or not labels.is_floating_point()):
            raise ValueError(
                f"{self.labels} of shape {tuple(labels.shape)} and {labels.dtype} must be floating-point truth values "
                "(examples, labels) for problem_type='multi_label_classification'; convert them, or set another type"
            )
        if self.kind in ("classes", "tokens", "next_token") and labels.is_floating_point():
            raise ValueError(
                f"{self.labels} of {labels.dtype} must be integers, the numbers of classes; convert them, or set the "
                "config's problem_type to 'multi_label_classification' or 'regression' before the teacher is compressed"
            )
        if self.kind == "next_token":
            return labels[:, 1:]
        if self.kind == "span":  # an answer that was cut off points beyond the last real position
            mask = real_positions(inputs)
            inside = labels.clamp(0, mask.shape[-1] - 1)
            found = mask.gather(-1, inside.unsqueeze(-1)).squeeze(-1) & (labels == inside)
            return labels.masked_fill(~found, losses.IGNORED)
        if self.kind == "replaced":
            return labels.long().masked_fill(~real_positions(inputs), losses.IGNORED)  # they may be truth values
        return labels

    def count(self, inputs: Mapping[str, Tensor]) -> int:
        """Number of labels that a supervised loss adds up."""
        targets = self.targets(inputs)
        return targets.numel() if self.kind in ("values", "binary") else int((targets != losses.IGNORED).sum())

    def supervised(self, logits: Tensor, inputs: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
        """Sum of the losses of all labels."""
        targets = self.targets(inputs)
        if self.kind == "values":
            return losses.supervised_values(logits, targets)
        if self.kind == "binary":
            return losses.supervised_binary(logits, targets)
        if self.kind == "replaced":
            return losses.supervised_binary(logits[counted := targets != losses.IGNORED], targets[counted])
        if self.kind == "next_token":  # what follows the last token is not known
            targets = F.pad(targets, (0, 1), value=losses.IGNORED)
        elif self.kind == "span":  # padding is no candidate, else the loss would depend on how much of it there is
            logits = logits.masked_fill(~real_positions(inputs), torch.finfo(logits.dtype).min)
        return losses.supervised_classes(logits, targets, smoothing)

    def distance(self, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """Distance from the teacher's logits for each example, (examples,)."""
        if self.kind == "values":
            return losses.logit_mse(student, teacher)
        if self.kind == "binary":
            return losses.logit_binary_kl(student, teacher, temperature)
        if self.kind == "classes":
            return losses.logit_kl(student, teacher, temperature)
        if self.kind == "span":
            return losses.span_logit_kl(student, teacher, mask, temperature)
        if self.kind == "replaced":  # two classes, of which the first has the logit 0
            student, teacher = (torch.stack((torch.zeros_like(x), x), -1) for x in (student, teacher))
        return losses.token_logit_kl(student, teacher, mask, temperature)


_KINDS = {
    "regression": "values",
    "single_label_classification": "classes",
    "multi_label_classification": "binary",
    "choices": "classes",
    "next_sentence": "classes",
    "words": "tokens",
}
"""Of outputs, by the kind of a head or by the `problem_type` of one for sequences; others have one of the same name."""


def outputs_of(model: PreTrainedModel) -> tuple[Output, ...]:
    """What a dense or factored model gives beside hidden states; nothing for a base model.

    Raises:
        ValueError: not one of the classes that this package knows.
    """
    default = "regression" if model.config.num_labels == 1 else "single_label_classification"
    kinds = {"sequence": model.config.problem_type or default}
    found = []
    for head in heads_of(model):
        kind = kinds.get(head.kind, head.kind)
        found.append(Output(_KINDS.get(kind, kind), head.logits, head.labels, head.share))
    return tuple(found)
