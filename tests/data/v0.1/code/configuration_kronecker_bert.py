"""Configuration of BERT with Kronecker-factored layers (KroneckerBERT, Tahaei et al., NAACL 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import BertConfig

from .configuration_kronecker import KroneckerConfigMixin
from .factor_plan import FactorPlan as FactorPlan  # older transformers copy only what this file itself imports


class KroneckerBertConfig(KroneckerConfigMixin, BertConfig):
    """The stock `BertConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model. Kept as
            plain numbers: pattern to ``{"m1": .., "n1": .., "terms": ..}``.
        **kwargs: as for `BertConfig`.

    Raises:
        ValueError: the plan does not fit this model; see `FactorPlan.match`.
    """

    model_type = "kronecker_bert"
    dense_config_class = BertConfig
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_kronecker_bert.KroneckerBertConfig",
        "AutoModel": "modeling_kronecker_bert.KroneckerBertModel",
        "AutoModelForPreTraining": "modeling_kronecker_bert.KroneckerBertForPreTraining",
        "AutoModelForMaskedLM": "modeling_kronecker_bert.KroneckerBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_kronecker_bert.KroneckerBertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_kronecker_bert.KroneckerBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_kronecker_bert.KroneckerBertForQuestionAnswering",
        "AutoModelForMultipleChoice": "modeling_kronecker_bert.KroneckerBertForMultipleChoice",
    }

    factor_plan: Any = None

    def factorable_modules(self) -> dict[str, tuple[int, int]]:
        """Weight shape (m outputs, n inputs) of every module that a plan may name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        modules = {
            "embeddings.word_embeddings": (self.vocab_size, hidden),
            "embeddings.position_embeddings": (self.max_position_embeddings, hidden),
            "embeddings.token_type_embeddings": (self.type_vocab_size, hidden),
        }
        attentions = ["attention"] + ["crossattention"] * bool(self.add_cross_attention)
        for i in range(self.num_hidden_layers):
            layer = f"encoder.layer.{i}"
            for attention in attentions:
                for name in ("self.query", "self.key", "self.value", "output.dense"):
                    modules[f"{layer}.{attention}.{name}"] = (hidden, hidden)
            modules[f"{layer}.intermediate.dense"] = (inner, hidden)
            modules[f"{layer}.output.dense"] = (hidden, inner)
        modules["pooler.dense"] = (hidden, hidden)
        return modules


KroneckerBertConfig.register_for_auto_class()
