"""What the heads of BERT and GPT-2 put out, and how it is compared with a teacher's output and with labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)

from ..models import DENSE_CLASSES
from . import losses


def real_positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """True where a batch has a token, False at its padding, (..., length)."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@dataclass(frozen=True)
class Head:
    """One output of a model.

    Attributes:
        logits: its name in the model's output.
        labels: its name in the model's input.
        kind: "classes" (examples, classes); "values", a regression, and "binary", many labels, both (examples,
            outputs); "tokens" and "next_token" (examples, length, classes); "span" (examples, length).
        share: factor of its losses in the sum over all heads of the model, as in transformers.
    """

    logits: str
    labels: str
    kind: str
    share: float = 1.0

    def targets(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The labels in the form in which the supervised loss counts and compares them."""
        labels = inputs[self.labels]
        if self.kind == "next_token":
            return labels[:, 1:]
        if self.kind == "span":  # an answer that was cut off points beyond the last real position
            mask = real_positions(inputs)
            inside = labels.clamp(0, mask.shape[-1] - 1)
            found = mask.gather(-1, inside.unsqueeze(-1)).squeeze(-1) & (labels == inside)
            return labels.masked_fill(~found, losses.IGNORED)
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
        if self.kind == "next_token":
            logits = logits[:, :-1]
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
        return losses.token_logit_kl(student, teacher, mask, temperature)


_SPAN = (
    Head("start_logits", "start_positions", "span", share=0.5),
    Head("end_logits", "end_positions", "span", share=0.5),
)
_TOKENS = Head("logits", "labels", "tokens")
_HEADS: dict[type[PreTrainedModel], tuple[Head, ...]] = {
    BertModel: (),
    BertForPreTraining: (
        Head("prediction_logits", "labels", "tokens"),
        Head("seq_relationship_logits", "next_sentence_label", "classes"),
    ),
    BertForMaskedLM: (_TOKENS,),
    BertForMultipleChoice: (Head("logits", "labels", "classes"),),
    BertForTokenClassification: (_TOKENS,),
    BertForQuestionAnswering: _SPAN,
    GPT2Model: (),
    GPT2LMHeadModel: (Head("logits", "labels", "next_token"),),
    GPT2ForTokenClassification: (_TOKENS,),
    GPT2ForQuestionAnswering: _SPAN,
}
_SEQUENCE_KINDS = {
    "regression": "values",
    "single_label_classification": "classes",
    "multi_label_classification": "binary",
}


def heads_of(model: PreTrainedModel) -> tuple[Head, ...]:
    """The outputs of a dense or factored model; none for a base model.

    Raises:
        ValueError: not one of the classes that this package knows.
    """
    stock = DENSE_CLASSES.get(type(model), type(model))
    if stock in (BertForSequenceClassification, GPT2ForSequenceClassification):
        default = "regression" if model.config.num_labels == 1 else "single_label_classification"
        return (Head("logits", "labels", _SEQUENCE_KINDS[model.config.problem_type or default]),)
    if stock not in _HEADS:
        known = ", ".join(sorted(cls.__name__ for cls in DENSE_CLASSES.values()))
        raise ValueError(
            f"model of class {type(model).__name__} cannot be distilled; supported are {known}, "
            "and their factored classes"
        )
    return _HEADS[stock]
