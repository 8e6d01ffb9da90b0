"""The files that travel with a checkpoint: layers, configurations and models of all families.

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
from .modeling_kronecker_distilbert import (
    KroneckerDistilBertConfig,
    KroneckerDistilBertForMaskedLM,
    KroneckerDistilBertForMultipleChoice,
    KroneckerDistilBertForQuestionAnswering,
    KroneckerDistilBertForSequenceClassification,
    KroneckerDistilBertForTokenClassification,
    KroneckerDistilBertModel,
)
from .modeling_kronecker_electra import (
    KroneckerElectraConfig,
    KroneckerElectraForMaskedLM,
    KroneckerElectraForMultipleChoice,
    KroneckerElectraForPreTraining,
    KroneckerElectraForQuestionAnswering,
    KroneckerElectraForSequenceClassification,
    KroneckerElectraForTokenClassification,
    KroneckerElectraModel,
)
from .modeling_kronecker_gpt2 import (
    KroneckerGPT2ForQuestionAnswering,
    KroneckerGPT2ForSequenceClassification,
    KroneckerGPT2ForTokenClassification,
    KroneckerGPT2LMHeadModel,
    KroneckerGPT2Model,
)
from .modeling_kronecker_mpnet import (
    KroneckerMPNetConfig,
    KroneckerMPNetForMaskedLM,
    KroneckerMPNetForMultipleChoice,
    KroneckerMPNetForQuestionAnswering,
    KroneckerMPNetForSequenceClassification,
    KroneckerMPNetForTokenClassification,
    KroneckerMPNetModel,
)
from .modeling_kronecker_roberta import (
    KroneckerRobertaConfig,
    KroneckerRobertaForMaskedLM,
    KroneckerRobertaForMultipleChoice,
    KroneckerRobertaForQuestionAnswering,
    KroneckerRobertaForSequenceClassification,
    KroneckerRobertaForTokenClassification,
    KroneckerRobertaModel,
)
from .modeling_kronecker_xlm_roberta import (
    KroneckerXLMRobertaConfig,
    KroneckerXLMRobertaForMaskedLM,
    KroneckerXLMRobertaForMultipleChoice,
    KroneckerXLMRobertaForQuestionAnswering,
    KroneckerXLMRobertaForSequenceClassification,
    KroneckerXLMRobertaForTokenClassification,
    KroneckerXLMRobertaModel,
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
    "KroneckerDistilBertConfig",
    "KroneckerDistilBertForMaskedLM",
    "KroneckerDistilBertForMultipleChoice",
    "KroneckerDistilBertForQuestionAnswering",
    "KroneckerDistilBertForSequenceClassification",
    "KroneckerDistilBertForTokenClassification",
    "KroneckerDistilBertModel",
    "KroneckerElectraConfig",
    "KroneckerElectraForMaskedLM",
    "KroneckerElectraForMultipleChoice",
    "KroneckerElectraForPreTraining",
    "KroneckerElectraForQuestionAnswering",
    "KroneckerElectraForSequenceClassification",
    "KroneckerElectraForTokenClassification",
    "KroneckerElectraModel",
    "KroneckerEmbedding",
    "KroneckerGPT2Config",
    "KroneckerGPT2ForQuestionAnswering",
    "KroneckerGPT2ForSequenceClassification",
    "KroneckerGPT2ForTokenClassification",
    "KroneckerGPT2LMHeadModel",
    "KroneckerGPT2Model",
    "KroneckerLinear",
    "KroneckerMPNetConfig",
    "KroneckerMPNetForMaskedLM",
    "KroneckerMPNetForMultipleChoice",
    "KroneckerMPNetForQuestionAnswering",
    "KroneckerMPNetForSequenceClassification",
    "KroneckerMPNetForTokenClassification",
    "KroneckerMPNetModel",
    "KroneckerRobertaConfig",
    "KroneckerRobertaForMaskedLM",
    "KroneckerRobertaForMultipleChoice",
    "KroneckerRobertaForQuestionAnswering",
    "KroneckerRobertaForSequenceClassification",
    "KroneckerRobertaForTokenClassification",
    "KroneckerRobertaModel",
    "KroneckerXLMRobertaConfig",
    "KroneckerXLMRobertaForMaskedLM",
    "KroneckerXLMRobertaForMultipleChoice",
    "KroneckerXLMRobertaForQuestionAnswering",
    "KroneckerXLMRobertaForSequenceClassification",
    "KroneckerXLMRobertaForTokenClassification",
    "KroneckerXLMRobertaModel",
    "register_family",
]
