import json

import pytest
from students import factorable_modules, factored_modules
from transformers import BertConfig, GPT2Config

from kronecker_transformers import FactorEntry, FactorPlan, KroneckerBertConfig, KroneckerGPT2Config
from kronecker_transformers.models.factor_plan import resolve_plan

MODULES = {"h.0.attn.c_attn": (96, 32), "h.1.attn.c_attn": (96, 32), "h.11.attn.c_attn": (96, 32), "wte": (64, 32)}


def test_entries_in_every_notation():
    entry = FactorEntry(6, 4, 2)
    for value in (entry, (6, 4, 2), [6, 4, 2], {"m1": 6, "n1": 4, "terms": 2}):
        assert FactorPlan({"a": value})["a"] == entry
    assert FactorPlan({"a": (6, 4)})["a"].terms == 1


def test_plan_is_an_ordered_mapping_and_survives_json():
    plan = FactorPlan({"wte": (64, 4), "h.1.*": (6, 4, 2)})
    assert list(plan) == ["wte", "h.1.*"]
    assert FactorPlan(json.loads(json.dumps(plan.to_dict()))) == plan


def test_match_in_the_order_of_the_modules():
    matched = FactorPlan({"h.*[13579].attn.c_attn": (48, 32), "wte": (64, 4)}).match(MODULES)
    assert matched == {
        "h.1.attn.c_attn": FactorEntry(48, 32),
        "h.11.attn.c_attn": FactorEntry(48, 32),
        "wte": FactorEntry(64, 4),
    }
    assert list(matched) == ["h.1.attn.c_attn", "h.11.attn.c_attn", "wte"]


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"wte": (0, 4)}, ValueError, "pattern 'wte': m1=0 .* must be >= 1"),
        ({"wte": (64, -4)}, ValueError, "n1=-4 .* must be >= 1"),
        ({"wte": (64, 4, 0)}, ValueError, "terms=0 .* must be >= 1"),
        ({"wte": (64, 4, -3)}, ValueError, "terms=-3 .* must be >= 1"),
        ({"wte": (64, 4.0)}, TypeError, r"n1=4\.0 .* must be an integer"),
        ({"wte": (True, 4)}, TypeError, "m1=True .* must be an integer"),
        ({"wte": {"m1": 64, "n1": 4, "rank": 2}}, ValueError, "unknown field 'rank'"),
        ({"wte": {"m1": 64}}, ValueError, "field 'n1' is missing"),
        ({"wte": 64}, TypeError, "must be .m1, n1, terms."),
        (["wte"], TypeError, "must map patterns to entries, got list"),
        ({"wte": (48, 4)}, ValueError, r"module 'wte' with weight \(64, 32\): m1=48 must divide m=64"),
        ({"wte": (64, 5)}, ValueError, "n1=5 must divide n=32"),
        ({"wte": (64, 4, 9)}, ValueError, "terms=9 must be <= 8"),
        ({"wpe": (64, 4)}, ValueError, "pattern 'wpe' matches no module"),
        ({"wte": (64, 4), "wt*": (64, 4)}, ValueError, "'wte' and 'wt.' both match module 'wte'"),
    ],
)
def test_bad_plans(plan, error, message):
    with pytest.raises(error, match=message):
        FactorPlan(plan).match(MODULES)


def b_shapes(config):
    modules = factorable_modules(config)
    return {name: entry.b_shape(*modules[name]) for name, entry in factored_modules(config).items()}


# The shapes of KroneckerBERT's Table 1, written out: (m1, n1), (m2, n2)
TABLE_1 = {
    "7.7x": {
        "embeddings.word_embeddings": ((30522, 96), (1, 8)),
        "attention.self.query": ((384, 384), (2, 2)),
        "attention.self.key": ((384, 384), (2, 2)),
        "attention.self.value": ((384, 384), (2, 2)),
        "attention.output.dense": ((384, 384), (2, 2)),
        "intermediate.dense": ((8, 2), (384, 384)),
        "output.dense": ((2, 8), (384, 384)),
        "pooler.dense": ((384, 384), (2, 2)),
    },
    "21x": {
        "embeddings.word_embeddings": ((30522, 48), (1, 16)),
        "attention.self.query": ((384, 48), (2, 16)),
        "attention.self.key": ((384, 48), (2, 16)),
        "attention.self.value": ((384, 48), (2, 16)),
        "attention.output.dense": ((384, 48), (2, 16)),
        "intermediate.dense": ((16, 2), (192, 384)),
        "output.dense": ((2, 16), (384, 192)),
    },
}


@pytest.mark.parametrize("preset", TABLE_1)
def test_kronecker_bert_presets_are_the_papers(preset):
    config = KroneckerBertConfig.from_dense(BertConfig(), preset)
    expected = {}
    for name, shapes in TABLE_1[preset].items():
        if name.startswith(("embeddings", "pooler")):
            expected[name] = shapes
        else:
            expected.update({f"encoder.layer.{i}.{name}": shapes for i in range(12)})
    shapes_of_b = b_shapes(config)
    actual = {name: ((e.m1, e.n1), shapes_of_b[name]) for name, e in factored_modules(config).items()}
    assert actual == expected
    assert all(entry.terms == 1 for entry in factored_modules(config).values())


def test_kngpt2_halves_the_rows_of_the_odd_layers():
    config = KroneckerGPT2Config.from_dense(GPT2Config(), "kngpt2")
    expected = {"wte": ((50257, 384), (1, 2))}
    for i in (1, 3, 5, 7, 9, 11):
        expected[f"h.{i}.attn.c_attn"] = ((1152, 768), (2, 1))
        expected[f"h.{i}.attn.c_proj"] = ((384, 768), (2, 1))
        expected[f"h.{i}.mlp.c_fc"] = ((1536, 768), (2, 1))
        expected[f"h.{i}.mlp.c_proj"] = ((384, 3072), (2, 1))
    shapes_of_b = b_shapes(config)
    assert {name: ((e.m1, e.n1), shapes_of_b[name]) for name, e in factored_modules(config).items()} == expected


def test_presets_scale_to_other_hidden_sizes():
    dense = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    factored = factored_modules(KroneckerBertConfig.from_dense(dense, "7.7x"))
    assert factored["embeddings.word_embeddings"] == FactorEntry(30522, 48)
    assert factored["encoder.layer.5.attention.self.key"] == FactorEntry(192, 192)
    assert factored["encoder.layer.5.intermediate.dense"] == FactorEntry(8, 2)
    assert factored["encoder.layer.5.output.dense"] == FactorEntry(2, 8)


@pytest.mark.parametrize(
    ("config", "preset", "message"),
    [
        (
            BertConfig(hidden_size=420),
            "7.7x",
            r"preset '7.7x' cannot be scaled .* word embedding has weight \(30522, 420\)",
        ),
        (
            BertConfig(hidden_size=328, num_attention_heads=8),
            "21x",
            r"attention has weight \(328, 328\), .* divide by \(2, 16\)",
        ),
        (BertConfig(intermediate_size=3000), "21x", r"FFN \(up\) has weight \(3000, 768\)"),
        (BertConfig(), "8x", "plan='8x' is not a preset for bert; choose '7.7x' or '21x'"),
        (BertConfig(), "kngpt2", "plan='kngpt2' is not a preset for bert"),
        (GPT2Config(), "7.7x", "plan='7.7x' is not a preset for gpt2; choose 'kngpt2'"),
        (GPT2Config(n_embd=33, n_head=3), "kngpt2", r"word embedding has weight \(50257, 33\)"),
    ],
)
def test_presets_that_do_not_fit(config, preset, message):
    config_class = KroneckerBertConfig if isinstance(config, BertConfig) else KroneckerGPT2Config
    with pytest.raises(ValueError, match=message):
        config_class.from_dense(config, preset)


def test_resolving_a_plan_is_idempotent():
    config = KroneckerBertConfig.from_dense(BertConfig(), "21x")
    assert resolve_plan(config.factor_plan, config).to_dict() == config.factor_plan
    assert KroneckerBertConfig(factor_plan="21x").factor_plan == config.factor_plan


def test_with_entry_spells_out_a_shared_pattern():
    plan = FactorPlan({"h.*.attn.c_attn": (48, 32), "wte": (64, 4)})
    changed = plan.with_entry("h.1.attn.c_attn", FactorEntry(24, 32), MODULES)
    assert changed.match(MODULES) == {**plan.match(MODULES), "h.1.attn.c_attn": FactorEntry(24, 32)}
