"""XLM-RoBERTa with Kronecker-factored layers: configuration, every head, one plan."""

from __future__ import annotations

from typing import Any

from transformers import (
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
    XLMRobertaPreTrainedModel,
)

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_blocks import in_blocks
from .kronecker_family import SPAN, Family, Head, register_family
from .kronecker_presets import encoder_presets
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerXLMRobertaConfig(KroneckerConfigMixin, XLMRobertaConfig):
    """The stock `XLMRobertaConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model.
        **kwargs: as for `XLMRobertaConfig`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

    model_type = "kronecker_xlm-roberta"
    dense_config_class = XLMRobertaConfig
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


class KroneckerXLMRobertaPreTrainedModel(KroneckerPreTrainedModel, XLMRobertaPreTrainedModel):
    """Base class of the factored XLM-RoBERTa models."""

    config: KroneckerXLMRobertaConfig
    config_class = KroneckerXLMRobertaConfig


class KroneckerXLMRobertaModel(KroneckerXLMRobertaPreTrainedModel, XLMRobertaModel):
    """`XLMRobertaModel` with the factored layers of its plan."""

    forward = in_blocks(XLMRobertaModel.forward)


class KroneckerXLMRobertaForMaskedLM(KroneckerXLMRobertaPreTrainedModel, XLMRobertaForMaskedLM):
    """`XLMRobertaForMaskedLM` on a factored XLM-RoBERTa; a tied head uses the embedding's factors."""


class KroneckerXLMRobertaForSequenceClassification(
    KroneckerXLMRobertaPreTrainedModel, XLMRobertaForSequenceClassification
):
    """`XLMRobertaForSequenceClassification` on a factored XLM-RoBERTa."""


class KroneckerXLMRobertaForTokenClassification(KroneckerXLMRobertaPreTrainedModel, XLMRobertaForTokenClassification):
    """`XLMRobertaForTokenClassification` on a factored XLM-RoBERTa."""


class KroneckerXLMRobertaForQuestionAnswering(KroneckerXLMRobertaPreTrainedModel, XLMRobertaForQuestionAnswering):
    """`XLMRobertaForQuestionAnswering` on a factored XLM-RoBERTa."""


class KroneckerXLMRobertaForMultipleChoice(KroneckerXLMRobertaPreTrainedModel, XLMRobertaForMultipleChoice):
    """`XLMRobertaForMultipleChoice` on a factored XLM-RoBERTa."""


register_family(
    KroneckerXLMRobertaConfig,
    {
        "AutoModel": (KroneckerXLMRobertaModel, ()),
        "AutoModelForMaskedLM": (KroneckerXLMRobertaForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerXLMRobertaForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerXLMRobertaForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerXLMRobertaForQuestionAnswering, SPAN),
        "AutoModelForMultipleChoice": (KroneckerXLMRobertaForMultipleChoice, (Head("choices"),)),
    },
)
