"""MPNet with Kronecker-factored layers: configuration, every head, one plan."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetForMultipleChoice,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetForTokenClassification,
    MPNetModel,
    MPNetPreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_blocks import in_blocks
from .kronecker_family import SPAN, Family, Head, register_family
from .kronecker_presets import EncoderModules, encoder_presets
from .modeling_kronecker import KroneckerPreTrainedModel

MODULES = EncoderModules(
    attention=("encoder.layer.*.attention.attn.*",),
)


class KroneckerMPNetConfig(KroneckerConfigMixin, MPNetConfig):
    """The stock `MPNetConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model.
        **kwargs: as for `MPNetConfig`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

    model_type = "kronecker_mpnet"
    dense_config_class = MPNetConfig
    family = Family(
        layers="encoder.layer",
        words="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        embedded="embeddings",
        attention="attention.attn",
        query="q",
        key="k",
        value="v",
        position_bias="encoder.relative_attention_bias",
        pooler="pooler.dense",
        pads_positions=True,
        default_ratio=7.7,
        presets=encoder_presets(MODULES),
    )

    factor_plan: Any = None


class KroneckerMPNetPreTrainedModel(KroneckerPreTrainedModel, MPNetPreTrainedModel):
    """Base class of the factored MPNet models."""

    config: KroneckerMPNetConfig
    config_class = KroneckerMPNetConfig


class KroneckerMPNetSelfAttention(MPNetSelfAttention):
    """The stock attention of MPNet, which knows one way to compute, by the attention functions of transformers.

    The relative position bias goes into their mask. PyTorch's own (SDPA) takes the place of eager attention.
    """

    config: KroneckerMPNetConfig

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the stock method."""
        if output_attentions or position_bias is None:
            return super().forward(hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
        kind = self.config._attn_implementation
        attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa" if kind in ("eager", None) else kind]
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        q, k, v = (layer(hidden_states).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = position_bias
        if attention_mask is not None and attention_mask.dtype == torch.bool:  # True where a token may be looked at
            mask = mask.masked_fill(~attention_mask, torch.finfo(mask.dtype).min)
        elif attention_mask is not None:
            mask = mask + attention_mask
        dropout, scaling = self.dropout.p if self.training else 0.0, self.attention_head_size**-0.5
        found, _ = attend(self, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=False)
        return (self.o(found.flatten(-2)),)


class KroneckerMPNetModel(KroneckerMPNetPreTrainedModel, MPNetModel):
    """`MPNetModel` with the factored layers of its plan."""

    forward = in_blocks(MPNetModel.forward)

    def _factor_layers(self) -> None:
        super()._factor_layers()
        layers: Any = self.encoder.layer
        for layer in layers:
            layer.attention.attn.__class__, layer.attention.attn.config = KroneckerMPNetSelfAttention, self.config


class KroneckerMPNetForMaskedLM(KroneckerMPNetPreTrainedModel, MPNetForMaskedLM):
    """`MPNetForMaskedLM` on a factored MPNet; a tied head uses the embedding's factors."""


class KroneckerMPNetForSequenceClassification(KroneckerMPNetPreTrainedModel, MPNetForSequenceClassification):
    """`MPNetForSequenceClassification` on a factored MPNet."""


class KroneckerMPNetForTokenClassification(KroneckerMPNetPreTrainedModel, MPNetForTokenClassification):
    """`MPNetForTokenClassification` on a factored MPNet."""


class KroneckerMPNetForQuestionAnswering(KroneckerMPNetPreTrainedModel, MPNetForQuestionAnswering):
    """`MPNetForQuestionAnswering` on a factored MPNet."""


class KroneckerMPNetForMultipleChoice(KroneckerMPNetPreTrainedModel, MPNetForMultipleChoice):
    """`MPNetForMultipleChoice` on a factored MPNet."""


register_family(
    KroneckerMPNetConfig,
    {
        "AutoModel": (KroneckerMPNetModel, ()),
        "AutoModelForMaskedLM": (KroneckerMPNetForMaskedLM, (Head("words"),)),
        "AutoModelForSequenceClassification": (KroneckerMPNetForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerMPNetForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerMPNetForQuestionAnswering, SPAN),
        "AutoModelForMultipleChoice": (KroneckerMPNetForMultipleChoice, (Head("choices"),)),
    },
)
