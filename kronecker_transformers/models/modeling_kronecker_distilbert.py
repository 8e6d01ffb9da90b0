"""DistilBERT with Kronecker-factored layers: configuration, every head, one plan."""

from __future__ import annotations

from typing import Any

from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    DistilBertPreTrainedModel,
)

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_blocks import in_blocks
from .kronecker_family import SPAN, Family, Head, register_family
from .kronecker_layers import KroneckerEmbedding
from .kronecker_presets import EncoderModules, encoder_presets
from .modeling_kronecker import KroneckerPreTrainedModel

MODULES = EncoderModules(
    attention=("transformer.layer.*.attention.*_lin",),
    up="transformer.layer.*.ffn.lin1",
    down="transformer.layer.*.ffn.lin2",
    pooler=None,
    inner="hidden_dim",
)


class KroneckerDistilBertConfig(KroneckerConfigMixin, DistilBertConfig):
    """The stock `DistilBertConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model.
        **kwargs: as for `DistilBertConfig`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

    model_type = "kronecker_distilbert"
    dense_config_class = DistilBertConfig
    family = Family(
        layers="transformer.layer",
        words="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        embedded="embeddings",
        attention="attention",
        query="q_lin",
        key="k_lin",
        value="v_lin",
        default_ratio=7.7,
        presets=encoder_presets(MODULES),
    )

    factor_plan: Any = None


class KroneckerDistilBertPreTrainedModel(KroneckerPreTrainedModel, DistilBertPreTrainedModel):
    """Base class of the factored DistilBERT models."""

    config: KroneckerDistilBertConfig
    config_class = KroneckerDistilBertConfig

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """As in DistilBERT.

        Raises:
            ValueError: the positions are factored; nothing is changed.
        """
        positions = self.base_model.get_submodule(self.config.family.positions)
        if isinstance(positions, KroneckerEmbedding):
            raise ValueError(
                f"new_num_position_embeddings={new_num_position_embeddings} is not possible, since the positions are "
                "factored; resize the teacher's, and compress it again"
            )
        super().resize_position_embeddings(new_num_position_embeddings)


class KroneckerDistilBertModel(KroneckerDistilBertPreTrainedModel, DistilBertModel):
    """`DistilBertModel` with the factored layers of its plan."""

    forward = in_blocks(DistilBertModel.forward)


class KroneckerDistilBertForMaskedLM(KroneckerDistilBertPreTrainedModel, DistilBertForMaskedLM):
    """`DistilBertForMaskedLM` on a factored DistilBERT; a tied head uses the embedding's factors."""


class KroneckerDistilBertForSequenceClassification(
    KroneckerDistilBertPreTrainedModel, DistilBertForSequenceClassification
):
    """`DistilBertForSequenceClassification` on a factored DistilBERT."""


class KroneckerDistilBertForTokenClassification(KroneckerDistilBertPreTrainedModel, DistilBertForTokenClassification):
    """`DistilBertForTokenClassification` on a factored DistilBERT."""


class KroneckerDistilBertForQuestionAnswering(KroneckerDistilBertPreTrainedModel, DistilBertForQuestionAnswering):
    """`DistilBertForQuestionAnswering` on a factored DistilBERT."""


class KroneckerDistilBertForMultipleChoice(KroneckerDistilBertPreTrainedModel, DistilBertForMultipleChoice):
    """`DistilBertForMultipleChoice` on a factored DistilBERT."""


register_family(
    KroneckerDistilBertConfig,
    {
        "AutoModel": (KroneckerDistilBertModel, ()),
        "AutoModelForMaskedLM": (KroneckerDistilBertForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerDistilBertForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerDistilBertForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerDistilBertForQuestionAnswering, SPAN),
        "AutoModelForMultipleChoice": (KroneckerDistilBertForMultipleChoice, (Head("choices"),)),
    },
)
