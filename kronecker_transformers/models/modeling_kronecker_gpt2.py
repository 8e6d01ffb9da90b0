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
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from .configuration_kronecker_gpt2 import KroneckerGPT2Config
from .kronecker_family import SPAN, Head, register_family
from .kronecker_layers import KroneckerLinear
from .modeling_kronecker import KroneckerPreTrainedModel


class KroneckerGPT2PreTrainedModel(KroneckerPreTrainedModel, GPT2PreTrainedModel):
    """Base class of the factored GPT-2 models."""

    config: KroneckerGPT2Config
    config_class = KroneckerGPT2Config

    def _factor_layers(self) -> None:
        super()._factor_layers()
        for name, module in list(self.named_modules()):
            if type(module) is NewGELUActivation:  # eight passes over memory, and as many tensors for the gradient
                self.set_submodule(name, ACT2FN["gelu_pytorch_tanh"])  # the same function in one

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


NEXT_TOKEN = (Head("next_token"),)
register_family(
    KroneckerGPT2Config,
    {
        "AutoModel": (KroneckerGPT2Model, ()),
        "AutoModelForCausalLM": (KroneckerGPT2LMHeadModel, NEXT_TOKEN),
        "AutoModelForPreTraining": (KroneckerGPT2LMHeadModel, NEXT_TOKEN),
        "AutoModelForSequenceClassification": (KroneckerGPT2ForSequenceClassification, (Head("sequence"),)),
        "AutoModelForTokenClassification": (KroneckerGPT2ForTokenClassification, (Head("tokens"),)),
        "AutoModelForQuestionAnswering": (KroneckerGPT2ForQuestionAnswering, SPAN),
    },
)
