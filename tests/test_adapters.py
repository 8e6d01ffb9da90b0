import copy

import peft
import pytest
import torch
from students import GPT2_PLAN, perturb, student
from tiny import teacher
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, GPT2LMHeadModel

from kronecker_transformers import (
    KroneckerBertForSequenceClassification,
    KroneckerGPT2LMHeadModel,
    compress,
    to_dense,
)
from kronecker_transformers.adapters import LoraKroneckerLinear, load_adapter, lora_config, merge_adapter
from kronecker_transformers.models.kronecker_layers import KroneckerEmbedding, KroneckerLinear

LOW_RANK = {
    "encoder.layer.*.attention.self.*": (32, 1, 6), "encoder.layer.[01].output.dense": (1, 64, 5),
}  # fmt: skip
IDS = torch.tensor([[3, 5, 7, 9, 11], [2, 4, 6, 8, 1]])


def low_rank_student():
    dense = teacher(BertForSequenceClassification, hidden_size=32, intermediate_size=64)
    return perturb(compress(dense, LOW_RANK).model).eval()


def logits(model, **changes):
    with torch.no_grad():
        return model(IDS, **changes).logits


def trained(model, **options):
    """An adapter on all linear layers, after some steps."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora_config(model, r=3, lora_alpha=6, **options))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.02)
    labels = IDS if "Head" in type(model).__name__ else torch.tensor([0, 1])
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = adapted(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    return adapted.eval()


@pytest.mark.parametrize("model_class", [KroneckerBertForSequenceClassification, KroneckerGPT2LMHeadModel])
def test_every_linear_layer_is_adapted_and_nothing_else_is_trained(model_class):
    model = student(model_class)
    before, factored = logits(model), [n for n, m in model.base_model.named_modules() if isinstance(m, KroneckerLinear)]
    adapted = peft.get_peft_model(model, lora_config(model, r=3))
    torch.testing.assert_close(logits(adapted), before)  # an adapter begins as zero
    found = [n for n, m in model.base_model.named_modules() if isinstance(m, LoraKroneckerLinear)]
    assert found == factored
    assert {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    for name in found:  # y = layer(x) + s B A x
        layer = model.base_model.get_submodule(name)
        layer.lora_B["default"].weight.data.normal_()
        x = torch.randn(2, 4, layer.in_features)
        low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        wanted = x @ (layer.base_layer.to_dense() + low).t() + layer.base_layer.bias
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [KroneckerBertForSequenceClassification, KroneckerGPT2LMHeadModel])
def test_an_adapter_is_trained_saved_and_loaded(model_class, tmp_path):
    model = student(model_class)
    fresh = copy.deepcopy(model)
    task = {"task_type": "SEQ_CLS"} if "Sequence" in model_class.__name__ else {"task_type": "CAUSAL_LM"}
    adapted = trained(model, **task)
    adapted.save_pretrained(tmp_path)
    assert not torch.allclose(logits(adapted), logits(fresh), atol=1e-2)
    loaded = load_adapter(copy.deepcopy(fresh), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(adapted))
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(fresh))
    with pytest.raises(ValueError, match=r"KroneckerLinear.* is not supported"):  # PEFT alone
        peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path)


def test_the_dense_twin_takes_the_same_adapter_and_merges_it(tmp_path):
    model = student(KroneckerBertForSequenceClassification)
    twin = to_dense(model)
    adapted = trained(model, task_type="SEQ_CLS")
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have no product of one shape; keep the adapter apart, or merge it into the"):
        merge_adapter(adapted)
    with pytest.raises(ValueError, match="PEFT cannot unload an adapter from factored layers"):
        copy.deepcopy(adapted).merge_and_unload()
    wanted = logits(adapted)
    merged = peft.PeftModel.from_pretrained(twin, tmp_path).merge_and_unload().eval()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-4)


def test_low_rank_layers_are_merged_into_a_larger_rank(tmp_path):
    model = low_rank_student()
    adapted = trained(model, task_type="SEQ_CLS")
    wanted = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), wanted, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), wanted, rtol=1e-4, atol=1e-5)
    merged = merge_adapter(adapted)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert merged.bert.encoder.layer[0].attention.self.query.terms == 6 + 3
    assert merged.bert.encoder.layer[1].output.dense.terms == 5 + 3
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-5)


def test_more_terms_than_a_plan_allows_are_refused_and_nothing_changes(tmp_path):
    plan = {"encoder.layer.*.attention.self.*": (32, 1, 30)}
    model = student(KroneckerBertForSequenceClassification, plan)
    adapted = trained(model)
    wanted = logits(adapted)
    with pytest.raises(
        ValueError, match="of 30 terms and its adapter of rank 3 would have more than 32 terms, the most"
    ):
        merge_adapter(adapted)
    torch.testing.assert_close(logits(adapted), wanted)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_initial_values_that_need_the_matrix_are_refused(start):
    model = student(KroneckerBertForSequenceClassification)
    with pytest.raises(
        ValueError, match=f"init_lora_weights='{start}' needs the matrix of a layer, .* True, False, gauss"
    ):
        lora_config(model, r=2, init_lora_weights=start)


def test_numbers_that_are_not_finite_are_not_merged():
    adapted = trained(low_rank_student())
    layer = next(m for m in adapted.modules() if isinstance(m, LoraKroneckerLinear))
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the adapter default has numbers that are not finite"):
        merge_adapter(adapted)


def test_what_passes_the_factored_layers_by_is_told(caplog):
    model = student(KroneckerGPT2LMHeadModel, {**GPT2_PLAN})
    count = sum(isinstance(m, KroneckerLinear) for m in model.base_model.modules())
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True))
    assert f"none of the {count} factored layers has got an adapter" in caplog.text
    caplog.clear()
    model = student(KroneckerGPT2LMHeadModel)
    peft.get_peft_model(model, lora_config(model, r=2, target_modules="all-linear"))
    assert "has got an adapter" not in caplog.text
    assert isinstance(model.get_input_embeddings(), KroneckerEmbedding)


def test_an_adapter_in_a_folder_of_its_folder_is_loaded(tmp_path):
    model = student(KroneckerBertForSequenceClassification)
    fresh = copy.deepcopy(model)
    adapted = trained(model, task_type="SEQ_CLS")
    adapted.save_pretrained(tmp_path / "inner")
    loaded = load_adapter(fresh, tmp_path, subfolder="inner").eval()
    torch.testing.assert_close(logits(loaded), logits(adapted))


def test_an_adapter_of_the_models_own_is_merged(tmp_path):
    model = low_rank_student()
    model.add_adapter(lora_config(model, r=3, lora_alpha=6, init_lora_weights=False))
    wanted = logits(model)
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trainable_token_indices": [3, 4]},
            "trainable_token_indices needs an embedding of one matrix, and .*wte has",
        ),
        ({"target_modules": ["wte", "c_attn"]}, "target_modules names transformer.wte, an embedding of factors"),
        ({"modules_to_save": ["wte"]}, "modules_to_save names transformer.wte, an embedding of factors"),
    ],
)
def test_what_embeddings_of_factors_do_not_take_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(student(KroneckerGPT2LMHeadModel), r=2, **options)


def test_variants_that_need_the_weight_are_refused():
    model = student(KroneckerBertForSequenceClassification)
    with pytest.raises(ValueError, match="unsupported variant"):
        peft.get_peft_model(model, lora_config(model, r=2, use_dora=True))


def test_other_kinds_of_adapters_are_refused(tmp_path):
    dense = teacher(GPT2LMHeadModel)
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    peft.get_peft_model(dense, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds an adapter of kind .*IA3; factored layers take LoRA alone"):
        load_adapter(student(KroneckerGPT2LMHeadModel), tmp_path)
