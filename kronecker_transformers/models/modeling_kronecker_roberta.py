"""RoBERTa with Kronecker-factored layers: configuration, every head, one plan."""

from __future__ import annotations

from typing import Any

from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    RobertaPreTrainedModel,
)

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_blocks import in_blocks
from .kronecker_family import SPAN, Family, Head, register_family
from .kronecker_presets import encoder_presets
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerRobertaConfig(KroneckerConfigMixin, RobertaConfig):
    """The stock `RobertaConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model.
        **kwargs: as for `RobertaConfig`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

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
        value="value",
        pooler="pooler.dense",
        pads_positions=True,
        default_ratio=7.7,
        presets=encoder_presets(),
    )

    factor_plan: Any = None


class KroneckerRobertaPreTrainedModel(KroneckerPreTrainedModel, RobertaPreTrainedModel):
    """Base class of the factored RoBERTa models."""

    config: KroneckerRobertaConfig
    config_class = KroneckerRobertaConfig


class KroneckerRobertaModel(KroneckerRobertaPreTrainedModel, RobertaModel):
    """`RobertaModel` with the factored layers of its plan."""

    forward = in_blocks(RobertaModel.forward)


class KroneckerRobertaForMaskedLM(KroneckerRobertaPreTrainedModel, RobertaForMaskedLM):
    """`RobertaForMaskedLM` on a factored RoBERTa; a tied head uses the embedding's factors."""


class KroneckerRobertaForSequenceClassification(KroneckerRobertaPreTrainedModel, RobertaForSequenceClassification):
    """`RobertaForSequenceClassification` on a factored RoBERTa."""


class KroneckerRobertaForTokenClassification(KroneckerRobertaPreTrainedModel, RobertaForTokenClassification):
    """`RobertaForTokenClassification` on a factored RoBERTa."""


class KroneckerRobertaForQuestionAnswering(KroneckerRobertaPreTrainedModel, RobertaForQuestionAnswering):
    """`RobertaForQuestionAnswering` on a factored RoBERTa."""


class KroneckerRobertaForMultipleChoice(KroneckerRobertaPreTrainedModel, RobertaForMultipleChoice):
    """`RobertaForMultipleChoice` on a factored RoBERTa."""


register_family(
    KroneckerRobertaConfig,
    {
        "AutoModel": (KroneckerRobertaModel, ()),
        "AutoModelForMaskedLM": (KroneckerRobertaForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerRobertaForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerRobertaForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerRobertaForQuestionAnswering, SPAN),
        "AutoModelForMultipleChoice": (KroneckerRobertaForMultipleChoice, (Head("choices"),)),
    },
)
