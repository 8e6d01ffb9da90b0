"""A family in one file, for the tests: RoBERTa with Kronecker-factored layers."""

from __future__ import annotations

from typing import Any

from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaPreTrainedModel,
)

from .configuration_kronecker import KroneckerConfigMixin
from .configuration_kronecker_bert import BERT_PRESETS
from .kronecker_blocks import in_blocks
from .kronecker_family import Family, Head, register_family
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerRobertaConfig(KroneckerConfigMixin, RobertaConfig):
    """The stock `RobertaConfig` and a factor plan."""

    model_type = "kronecker_roberta"
    dense_config_class = RobertaConfig
    family = Family(
        layers="encoder.layer",
        words="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        embedded="embeddings",
        attention="attention.self",
        query="query",
        key="key",
        pooler="pooler.dense",
        pads_positions=True,
        default_ratio=7.7,
        presets=BERT_PRESETS,
    )

    factor_plan: Any = None


class KroneckerRobertaPreTrainedModel(KroneckerPreTrainedModel, RobertaPreTrainedModel):
    """Base class of the factored RoBERTa models."""

    config_class = KroneckerRobertaConfig


class KroneckerRobertaModel(KroneckerRobertaPreTrainedModel, RobertaModel):
    """`RobertaModel` with the factored layers of its plan."""

    forward = in_blocks(RobertaModel.forward)


class KroneckerRobertaForMaskedLM(KroneckerRobertaPreTrainedModel, RobertaForMaskedLM):
    """`RobertaForMaskedLM` on a factored RoBERTa."""


class KroneckerRobertaForSequenceClassification(KroneckerRobertaPreTrainedModel, RobertaForSequenceClassification):
    """`RobertaForSequenceClassification` on a factored RoBERTa."""


register_family(
    KroneckerRobertaConfig,
    {
        "AutoModel": (KroneckerRobertaModel, ()),
        "AutoModelForMaskedLM": (KroneckerRobertaForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerRobertaForSequenceClassification, (Head("sequence"),)),
    },
)
