"""ELECTRA with Kronecker-factored layers: configuration, every head, one plan."""

from __future__ import annotations

from typing import Any

from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
    ElectraPreTrainedModel,
)

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_blocks import in_blocks
from .kronecker_family import SPAN, Family, Head, register_family
from .kronecker_presets import EncoderModules, encoder_presets
from .modeling_kronecker import KroneckerPreTrainedModel

MODULES = EncoderModules(
    pooler=None,
    projection="embeddings_project",
    embedding="embedding_size",
)


class KroneckerElectraConfig(KroneckerConfigMixin, ElectraConfig):
    """The stock `ElectraConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model.
        **kwargs: as for `ElectraConfig`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

    model_type = "kronecker_electra"
    dense_config_class = ElectraConfig
    family = Family(
        layers="encoder.layer",
        words="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        embedded="embeddings",
        attention="attention.self",
        query="query",
        key="key",
        value="value",
        projection="embeddings_project",
        default_ratio=7.7,
        presets=encoder_presets(MODULES),
    )

    factor_plan: Any = None


class KroneckerElectraPreTrainedModel(KroneckerPreTrainedModel, ElectraPreTrainedModel):
    """Base class of the factored ELECTRA models."""

    config: KroneckerElectraConfig
    config_class = KroneckerElectraConfig


class KroneckerElectraModel(KroneckerElectraPreTrainedModel, ElectraModel):
    """`ElectraModel` with the factored layers of its plan."""

    forward = in_blocks(ElectraModel.forward)


class KroneckerElectraForPreTraining(KroneckerElectraPreTrainedModel, ElectraForPreTraining):
    """`ElectraForPreTraining` on a factored ELECTRA."""


class KroneckerElectraForMaskedLM(KroneckerElectraPreTrainedModel, ElectraForMaskedLM):
    """`ElectraForMaskedLM` on a factored ELECTRA; a tied head uses the embedding's factors."""


class KroneckerElectraForSequenceClassification(KroneckerElectraPreTrainedModel, ElectraForSequenceClassification):
    """`ElectraForSequenceClassification` on a factored ELECTRA."""


class KroneckerElectraForTokenClassification(KroneckerElectraPreTrainedModel, ElectraForTokenClassification):
    """`ElectraForTokenClassification` on a factored ELECTRA."""


class KroneckerElectraForQuestionAnswering(  # type: ignore[misc]  # both of its bases say what their config is
    KroneckerElectraPreTrainedModel, ElectraForQuestionAnswering
):
    """`ElectraForQuestionAnswering` on a factored ELECTRA."""


class KroneckerElectraForMultipleChoice(KroneckerElectraPreTrainedModel, ElectraForMultipleChoice):
    """`ElectraForMultipleChoice` on a factored ELECTRA."""


register_family(
    KroneckerElectraConfig,
    {
        "AutoModel": (KroneckerElectraModel, ()),
        "AutoModelForPreTraining": (KroneckerElectraForPreTraining, (Head("replaced"),)),
        "AutoModelForMaskedLM": (KroneckerElectraForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerElectraForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerElectraForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerElectraForQuestionAnswering, SPAN),
        "AutoModelForMultipleChoice": (KroneckerElectraForMultipleChoice, (Head("choices"),)),
    },
)
