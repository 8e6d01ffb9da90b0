"""GPT-2 with Kronecker-factored layers (KnGPT2, Edalati et al., ACL 2022): every head, one plan."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .configuration_kronecker_gpt2 import KroneckerGPT2Config
from .kronecker_layers import KroneckerLinear
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerGPT2PreTrainedModel(KroneckerPreTrainedModel, GPT2PreTrainedModel):
    """Base class of the factored GPT-2 models."""

    config: KroneckerGPT2Config
    config_class = KroneckerGPT2Config

    def _make_base_model(self) -> KroneckerGPT2Model:
        return KroneckerGPT2Model(self.config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The stock class draws the residual projections when it meets their parent. For classes outside transformers a
        # parent without parameters of its own is passed over, and a factored projection has no weight: so do it here.
        residual = {projection for name, projection in self.named_modules() if name.endswith(".c_proj")}
        std = self.config.initializer_range / (math.sqrt(2 * self.config.n_layer) if module in residual else 1)
        if isinstance(module, KroneckerLinear):
            module.init_factors(std)
        elif isinstance(module, Conv1D):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        elif any(True for _ in module.parameters(recurse=False)):
            super()._init_weights(module)


class KroneckerGPT2Model(KroneckerGPT2PreTrainedModel, GPT2Model):
    """`GPT2Model` with the factored layers of its plan."""


class KroneckerGPT2LMHeadModel(KroneckerGPT2PreTrainedModel, GPT2LMHeadModel):
    """`GPT2LMHeadModel` on a factored GPT-2; a tied head uses the embedding's factors."""


class KroneckerGPT2ForSequenceClassification(KroneckerGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` on a factored GPT-2."""


class KroneckerGPT2ForTokenClassification(KroneckerGPT2PreTrainedModel, GPT2ForTokenClassification):
    """`GPT2ForTokenClassification` on a factored GPT-2."""


class KroneckerGPT2ForQuestionAnswering(KroneckerGPT2PreTrainedModel, GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering` on a factored GPT-2."""


KroneckerGPT2Model.register_for_auto_class("AutoModel")
KroneckerGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
KroneckerGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
KroneckerGPT2ForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
KroneckerGPT2ForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
