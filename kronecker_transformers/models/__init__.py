"""The files that travel with a checkpoint: layers, configurations and models of both families.

Importing this package registers every class with its Auto class.
"""

import transformers
from transformers import PreTrainedModel

from .configuration_kronecker_bert import KroneckerBertConfig
from .configuration_kronecker_gpt2 import KroneckerGPT2Config
from .factor_plan import PRESETS, FactorEntry, FactorPlan
from .kronecker_layers import KroneckerEmbedding, KroneckerLinear
from .modeling_kronecker import KroneckerPreTrainedModel
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
    "PRESETS",
    "FactorEntry",
    "FactorPlan",
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
]

DENSE_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    value: getattr(transformers, name.removeprefix("Kronecker"))
    for name, value in list(globals().items())
    if name in __all__ and isinstance(value, type) and issubclass(value, KroneckerPreTrainedModel)
}
"""Stock class by its factored class."""

for _config in (KroneckerBertConfig, KroneckerGPT2Config):
    transformers.AutoConfig.register(_config.model_type, _config)
    for _auto_class, _reference in _config.auto_classes.items():
        if _auto_class != "AutoConfig":
            getattr(transformers, _auto_class).register(_config, globals()[_reference.split(".")[1]])
