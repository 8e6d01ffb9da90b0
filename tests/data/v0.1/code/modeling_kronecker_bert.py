"""BERT with Kronecker-factored layers (KroneckerBERT, Tahaei et al., NAACL 2022): every head, one plan."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
)

from .configuration_kronecker_bert import KroneckerBertConfig
from .modeling_kronecker import KroneckerPreTrainedModel, in_blocks


class KroneckerBertPreTrainedModel(KroneckerPreTrainedModel, BertPreTrainedModel):
    """Base class of the factored BERT models."""

    config: KroneckerBertConfig
    config_class = KroneckerBertConfig

    def _make_base_model(self) -> KroneckerBertModel:
        return KroneckerBertModel(self.config, add_pooling_layer=getattr(self.bert, "pooler", None) is not None)


class KroneckerBertModel(KroneckerBertPreTrainedModel, BertModel):
    """`BertModel` with the factored layers of its plan; for inference on a CPU a large batch goes through in blocks."""

    @functools.wraps(BertModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the stock method; see `modeling_kronecker.in_blocks`."""
        named = dict(zip(_FORWARD_ARGUMENTS, args, strict=False))
        if len(named) < len(args) or named.keys() & kwargs.keys():
            return super().forward(*args, **kwargs)  # which refuses them
        return in_blocks(self, super().forward, named | kwargs)


_FORWARD_ARGUMENTS = tuple(inspect.signature(BertModel.forward).parameters)[1:]


class KroneckerBertForPreTraining(KroneckerBertPreTrainedModel, BertForPreTraining):
    """`BertForPreTraining` (masked language model and next-sentence prediction) on a factored BERT."""


class KroneckerBertForMaskedLM(KroneckerBertPreTrainedModel, BertForMaskedLM):
    """`BertForMaskedLM` on a factored BERT; a tied head uses the embedding's factors."""


class KroneckerBertForSequenceClassification(KroneckerBertPreTrainedModel, BertForSequenceClassification):
    """`BertForSequenceClassification` on a factored BERT."""


class KroneckerBertForTokenClassification(KroneckerBertPreTrainedModel, BertForTokenClassification):
    """`BertForTokenClassification` on a factored BERT."""


class KroneckerBertForQuestionAnswering(KroneckerBertPreTrainedModel, BertForQuestionAnswering):
    """`BertForQuestionAnswering` on a factored BERT."""


class KroneckerBertForMultipleChoice(KroneckerBertPreTrainedModel, BertForMultipleChoice):
    """`BertForMultipleChoice` on a factored BERT."""


KroneckerBertModel.register_for_auto_class("AutoModel")
KroneckerBertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
KroneckerBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
KroneckerBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
KroneckerBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
KroneckerBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
KroneckerBertForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
