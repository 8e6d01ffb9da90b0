"""The plans of KroneckerBERT (Tahaei et al., NAACL 2022), for every family of encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .factor_plan import FactorPlan, preset_entry


@dataclass(frozen=True)
class EncoderModules:
    """Patterns for the modules of an encoder, and what its config calls two sizes.

    Attributes:
        words: the word embedding.
        attention: query, key, value and output, each (hidden, hidden).
        up, down: the two layers of the FFN.
        pooler: the linear layer of the pooler, if the family has one.
        projection: from the size of the embedding to that of the layers, in models where the two differ.
        inner: the inner size of the FFN in the config.
        embedding: the size of the embedding in the config.
    """

    words: str = "embeddings.word_embeddings"
    attention: tuple[str, ...] = ("encoder.layer.*.attention.self.*", "encoder.layer.*.attention.output.dense")
    up: str = "encoder.layer.*.intermediate.dense"
    down: str = "encoder.layer.*[0-9].output.dense"  # [0-9] keeps the pattern away from attention.output.dense
    pooler: str | None = "pooler.dense"
    projection: str | None = None
    inner: str = "intermediate_size"
    embedding: str = "hidden_size"


def kronecker_bert_plan(
    config: Any,
    modules: EncoderModules,
    preset: str,
    attention_b: tuple[int, int],
    up_a: tuple[int, int],
    embedding_n2: int,
    factor_pooler: bool,
) -> FactorPlan:
    """KroneckerBERT, Table 1; other sizes keep the attention's B, the FFN's A and the embedding's n2.

    A projection after the embedding, which BERT does not have, keeps the attention's B too.
    """
    hidden, inner, vocab = config.hidden_size, getattr(config, modules.inner), config.vocab_size
    embedding = getattr(config, modules.embedding)
    attention = preset_entry(preset, "attention", hidden, hidden, b=attention_b)
    plan = {modules.words: preset_entry(preset, "word embedding", vocab, embedding, b=(1, embedding_n2))}
    if modules.projection and embedding != hidden:
        plan[modules.projection] = preset_entry(preset, "projection", hidden, embedding, b=attention_b)
    plan |= dict.fromkeys(modules.attention, attention)
    plan[modules.up] = preset_entry(preset, "FFN (up)", inner, hidden, a=up_a)
    plan[modules.down] = preset_entry(preset, "FFN (down)", hidden, inner, a=up_a[::-1])
    if modules.pooler and factor_pooler:
        plan[modules.pooler] = attention
    return FactorPlan(plan)


def encoder_presets(modules: EncoderModules = EncoderModules()) -> Mapping[str, Callable[[Any], FactorPlan]]:
    """The presets of a family, by their names."""
    return {
        # The paper does not say what happens to the pooler: factoring it gives its 7.7x,
        "7.7x": partial(
            kronecker_bert_plan, modules=modules, preset="7.7x", attention_b=(2, 2), up_a=(8, 2), embedding_n2=8,
            factor_pooler=True,
        ),
        # and leaving it dense gives the paper's 5.2 M parameters here.
        "21x": partial(
            kronecker_bert_plan, modules=modules, preset="21x", attention_b=(2, 16), up_a=(16, 2), embedding_n2=16,
            factor_pooler=False,
        ),
    }  # fmt: skip
