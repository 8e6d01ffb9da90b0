"""The files that travel with a checkpoint: layers, configurations and models of both families.

Importing this package registers every class with its Auto class.
"""

from .configuration_kronecker_bert import KroneckerBertConfig
from .configuration_kronecker_gpt2 import KroneckerGPT2Config
from .factor_plan import FactorEntry, FactorPlan
from .kronecker_family import DENSE_CLASSES, FACTORED_CLASSES, Family, Head, register_family
from .kronecker_layers import KroneckerEmbedding, KroneckerLinear
from .modeling_kronecker_bert import (
    KroneckerBertForMaskedLM,
    KroneckerBertForMultipleChoice,
    KroneckerBertForPreTraining,
    KroneckerBertForQuestionAnswering,
    KroneckerBertForSequenceClassification,
    KroneckerBertForTokenClassification,
    KroneckerBertModel,
)
from .modeling_kronecker_gpt2 import (
    KroneckerGPT2ForQuestionAnswering,
    KroneckerGPT2ForSequenceClassification,
    KroneckerGPT2ForTokenClassification,
    KroneckerGPT2LMHeadModel,
    KroneckerGPT2Model,
)

__all__ = [
    "DENSE_CLASSES",
    "FACTORED_CLASSES",
    "FactorEntry",
    "FactorPlan",
    "Family",
    "Head",
    "KroneckerBertConfig",
    "KroneckerBertForMaskedLM",
    "KroneckerBertForMultipleChoice",
    "KroneckerBertForPreTraining",
    "KroneckerBertForQuestionAnswering",
    "KroneckerBertForSequenceClassification",
    "KroneckerBertForTokenClassification",
    "KroneckerBertModel",
    "KroneckerEmbedding",
    "KroneckerGPT2Config",
    "KroneckerGPT2ForQuestionAnswering",
    "KroneckerGPT2ForSequenceClassification",
    "KroneckerGPT2ForTokenClassification",
    "KroneckerGPT2LMHeadModel",
    "KroneckerGPT2Model",
    "KroneckerLinear",
    "register_family",
]
