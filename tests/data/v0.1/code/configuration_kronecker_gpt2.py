"""Configuration of GPT-2 with Kronecker-factored layers (KnGPT2, Edalati et al., ACL 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import GPT2Config

from .configuration_kronecker import KroneckerConfigMixin
from .factor_plan import FactorPlan as FactorPlan  # older transformers copy only what this file itself imports


class KroneckerGPT2Config(KroneckerConfigMixin, GPT2Config):
    """The stock `GPT2Config` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`kngpt2`), or None for an all-dense model. Kept as plain
            numbers: pattern to ``{"m1": .., "n1": .., "terms": ..}``.
        **kwargs: as for `GPT2Config`.

    Raises:
        ValueError: the plan does not fit this model; see `FactorPlan.match`.
    """

    model_type = "kronecker_gpt2"
    dense_config_class = GPT2Config
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_kronecker_gpt2.KroneckerGPT2Config",
        "AutoModel": "modeling_kronecker_gpt2.KroneckerGPT2Model",
        "AutoModelForPreTraining": "modeling_kronecker_gpt2.KroneckerGPT2LMHeadModel",
        "AutoModelForCausalLM": "modeling_kronecker_gpt2.KroneckerGPT2LMHeadModel",
        "AutoModelForSequenceClassification": "modeling_kronecker_gpt2.KroneckerGPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_kronecker_gpt2.KroneckerGPT2ForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_kronecker_gpt2.KroneckerGPT2ForQuestionAnswering",
    }

    factor_plan: Any = None

    def factorable_modules(self) -> dict[str, tuple[int, int]]:
        """Weight shape (m outputs, n inputs) of every module that a plan may name; m counts outputs for Conv1D too."""
        hidden, inner = self.hidden_size, self.n_inner or 4 * self.hidden_size
        modules = {"wte": (self.vocab_size, hidden), "wpe": (self.max_position_embeddings, hidden)}
        for i in range(self.num_hidden_layers):
            modules[f"h.{i}.attn.c_attn"] = (3 * hidden, hidden)
            modules[f"h.{i}.attn.c_proj"] = (hidden, hidden)
            if self.add_cross_attention:
                modules[f"h.{i}.crossattention.c_attn"] = (2 * hidden, hidden)
                modules[f"h.{i}.crossattention.q_attn"] = (hidden, hidden)
                modules[f"h.{i}.crossattention.c_proj"] = (hidden, hidden)
            modules[f"h.{i}.mlp.c_fc"] = (inner, hidden)
            modules[f"h.{i}.mlp.c_proj"] = (hidden, inner)
        return modules


KroneckerGPT2Config.register_for_auto_class()
