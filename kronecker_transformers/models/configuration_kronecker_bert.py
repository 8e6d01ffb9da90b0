"""Configuration of BERT with Kronecker-factored layers (KroneckerBERT, Tahaei et al., NAACL 2022)."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import BertConfig

from .configuration_kronecker import KroneckerConfigMixin
from .factor_plan import FactorPlan, preset_entry
from .kronecker_family import Family


def kronecker_bert_plan(
    config: Any,
    preset: str,
    attention_b: tuple[int, int],
    up_a: tuple[int, int],
    embedding_n2: int,
    factor_pooler: bool,
) -> FactorPlan:
    """KroneckerBERT, Table 1; other hidden sizes keep the attention's B, the FFN's A and the embedding's n2."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    attention = preset_entry(preset, "attention", hidden, hidden, b=attention_b)
    plan = {
        "embeddings.word_embeddings": preset_entry(preset, "word embedding", vocab, hidden, b=(1, embedding_n2)),
        "encoder.layer.*.attention.self.*": attention,
        "encoder.layer.*.attention.output.dense": attention,
        "encoder.layer.*.intermediate.dense": preset_entry(preset, "FFN (up)", inner, hidden, a=up_a),
        # [0-9] keeps the pattern away from attention.output.dense
        "encoder.layer.*[0-9].output.dense": preset_entry(preset, "FFN (down)", hidden, inner, a=up_a[::-1]),
    }
    if factor_pooler:
        plan["pooler.dense"] = attention
    return FactorPlan(plan)


BERT_PRESETS = {
    # The paper does not say what happens to the pooler: factoring it gives its 7.7x,
    "7.7x": partial(
        kronecker_bert_plan, preset="7.7x", attention_b=(2, 2), up_a=(8, 2), embedding_n2=8, factor_pooler=True
    ),
    # and leaving it dense gives the paper's 5.2 M parameters here.
    "21x": partial(
        kronecker_bert_plan, preset="21x", attention_b=(2, 16), up_a=(16, 2), embedding_n2=16, factor_pooler=False
    ),
}


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
        pooler="pooler.dense",
        default_ratio=7.7,
        presets=BERT_PRESETS,
    )

    factor_plan: Any = None
