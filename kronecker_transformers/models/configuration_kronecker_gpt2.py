"""Configuration of GPT-2 with Kronecker-factored layers (KnGPT2, Edalati et al., ACL 2022)."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config

from .configuration_kronecker import KroneckerConfigMixin
from .factor_plan import FactorPlan, preset_entry
from .kronecker_family import Family


def kngpt2_plan(config: Any) -> FactorPlan:
    """KnGPT2: the embedding and layers 1, 3, 5, ... by a factor of 2, one product each; the head stays tied."""
    hidden, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
    plan = {"wte": preset_entry("kngpt2", "word embedding", config.vocab_size, hidden, b=(1, 2))}
    for name, m, n in (
        ("attn.c_attn", 3 * hidden, hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", inner, hidden),
        ("mlp.c_proj", hidden, inner),
    ):
        if config.num_hidden_layers > 1:
            plan[f"h.*[13579].{name}"] = preset_entry("kngpt2", name, m, n, b=(2, 1))
    return FactorPlan(plan)


class KroneckerGPT2Config(KroneckerConfigMixin, GPT2Config):
    """The stock `GPT2Config` and a factor plan.

    Args:
        factor_plan: plan, name of a preset (`kngpt2`), or None for an all-dense model. Kept as plain
            numbers: pattern to ``{"m1": .., "n1": .., "terms": ..}``.
        **kwargs: as for `GPT2Config`.

    Raises:
        TypeError, ValueError: the plan is malformed, or a preset does not divide the sizes.
    """

    model_type = "kronecker_gpt2"
    dense_config_class = GPT2Config
    family = Family(
        layers="h",
        words="wte",
        positions="wpe",
        embedded="drop",
        attention="attn",
        query="c_attn",
        key="c_attn",
        value="c_attn",
        norm="ln_f",
        causal=True,
        default_ratio=1.48,
        presets={"kngpt2": kngpt2_plan},
    )

    factor_plan: Any = None
