"""A family in one file, for the tests: CamemBERT with Kronecker-factored layers."""

from __future__ import annotations

from typing import Any

from transformers import (
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertForSequenceClassification,
    CamembertModel,
    CamembertPreTrainedModel,
)

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_blocks import in_blocks
from .kronecker_family import Family, Head, register_family
from .kronecker_presets import encoder_presets
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerCamembertConfig(KroneckerConfigMixin, CamembertConfig):
    """The stock `CamembertConfig` and a factor plan."""

    model_type = "kronecker_camembert"
    dense_config_class = CamembertConfig
    family = Family(
        layers="encoder.layer",
        words="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        embedded="embeddings",
        attention="attention.self",
        query="query",
        key="key",
        value="value",
        pooler="pooler.dense",
        pads_positions=True,
        default_ratio=7.7,
        presets=encoder_presets(),
    )

    factor_plan: Any = None


class KroneckerCamembertPreTrainedModel(KroneckerPreTrainedModel, CamembertPreTrainedModel):
    """Base class of the factored CamemBERT models."""

    config_class = KroneckerCamembertConfig


class KroneckerCamembertModel(KroneckerCamembertPreTrainedModel, CamembertModel):
    """`CamembertModel` with the factored layers of its plan."""

    forward = in_blocks(CamembertModel.forward)


class KroneckerCamembertForMaskedLM(KroneckerCamembertPreTrainedModel, CamembertForMaskedLM):
    """`CamembertForMaskedLM` on a factored CamemBERT."""


class KroneckerCamembertForSequenceClassification(
    KroneckerCamembertPreTrainedModel, CamembertForSequenceClassification
):
    """`CamembertForSequenceClassification` on a factored CamemBERT."""


register_family(
    KroneckerCamembertConfig,
    {
        "AutoModel": (KroneckerCamembertModel, ()),
        "AutoModelForMaskedLM": (KroneckerCamembertForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerCamembertForSequenceClassification, (Head("sequence"),)),
    },
)
