"""Configuration of BERT with Kronecker-factored layers (KroneckerBERT, Tahaei et al., NAACL 2022)."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig

from .configuration_kronecker import KroneckerConfigMixin
from .kronecker_family import Family
from .kronecker_presets import encoder_presets


class KroneckerBertConfig(KroneckerConfigMixin, BertConfig):
    """The stock `BertConfig` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`7.7x`, `21x`), or None for an all-dense model. Kept as
            plain numbers: pattern to ``{"m1": .., "n1": .., "terms": ..}``.
        **kwargs: as for `BertConfig`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

    model_type = "kronecker_bert"
    dense_config_class = BertConfig
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
        default_ratio=7.7,
        presets=encoder_presets(),
    )

    factor_plan: Any = None
