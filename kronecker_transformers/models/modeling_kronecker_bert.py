"""BERT with Kronecker-factored layers (KroneckerBERT, Tahaei et al., NAACL 2022): every head, one plan."""

from __future__ import annotations

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
from .kronecker_blocks import in_blocks
from .kronecker_family import SPAN, Head, register_family
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerBertPreTrainedModel(KroneckerPreTrainedModel, BertPreTrainedModel):
    """Base class of the factored BERT models."""

    config: KroneckerBertConfig
    config_class = KroneckerBertConfig


class KroneckerBertModel(KroneckerBertPreTrainedModel, BertModel):
    """`BertModel` with the factored layers of its plan; for inference on a CPU a large batch goes through in blocks."""

    forward = in_blocks(BertModel.forward)


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


PRE_TRAINING = (
    Head("words", "prediction_logits"),
    Head("next_sentence", "seq_relationship_logits", "next_sentence_label"),
)
register_family(
    KroneckerBertConfig,
    {
        "AutoModel": (KroneckerBertModel, ()),
        "AutoModelForPreTraining": (KroneckerBertForPreTraining, PRE_TRAINING),
        "AutoModelForMaskedLM": (KroneckerBertForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerBertForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerBertForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerBertForQuestionAnswering, SPAN),
        "AutoModelForMultipleChoice": (KroneckerBertForMultipleChoice, (Head("choices"),)),
    },
)
