import json

import pytest
import torch
from students import factorable_modules, factored_modules
from tiny import bert_config, gpt2_config
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel, GPT2Config, GPT2Model, RobertaConfig
from transformers.pytorch_utils import Conv1D

from kronecker_transformers import KroneckerBertConfig, KroneckerBertModel, KroneckerGPT2Config


@pytest.mark.parametrize(
    ("config_class", "dense_class", "dense_config"),
    [
        (KroneckerBertConfig, BertModel, bert_config()),
        (KroneckerBertConfig, BertModel, bert_config(is_decoder=True, add_cross_attention=True)),
        (KroneckerGPT2Config, GPT2Model, gpt2_config()),
        (KroneckerGPT2Config, GPT2Model, gpt2_config(n_inner=None, add_cross_attention=True)),
    ],
)
def test_factorable_modules_are_those_of_the_stock_model(config_class, dense_class, dense_config):
    with torch.device("meta"):
        model = dense_class(dense_config)
    actual = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            actual[name] = tuple(module.weight.shape)
        elif isinstance(module, Conv1D):
            actual[name] = tuple(module.weight.shape[::-1])
    assert factorable_modules(config_class.from_dense(dense_config, {})) == actual


def test_everything_else_of_the_teacher_comes_along():
    dense = bert_config(hidden_dropout_prob=0.3, layer_norm_eps=1e-7, problem_type="regression", classifier_dropout=0.2)
    config = KroneckerBertConfig.from_dense(dense, "7.7x")
    ours, theirs = config.to_dict(), dense.to_dict()
    differing = {key for key in theirs if ours.get(key) != theirs[key]}
    assert differing == {"model_type"}
    assert config.to_dense_config().to_dict() == theirs


def test_config_file_round_trip(tmp_path):
    config = KroneckerGPT2Config.from_dense(gpt2_config(), "kngpt2")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is KroneckerGPT2Config
    assert factored_modules(loaded) == factored_modules(config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["factor_plan"]["wte"] == {"m1": 72, "n1": 16, "terms": 1}
    assert stored["auto_map"] == KroneckerGPT2Config.auto_classes


def test_auto_map_drops_the_repository_but_keeps_foreign_classes():
    config = KroneckerBertConfig()
    config.auto_map = {
        "AutoModel": "org/model--modeling_kronecker_bert.KroneckerBertModel",
        "AutoModelForMaskedLM": "modeling_mine.MyModel",
    }
    auto_map = config.to_dict()["auto_map"]
    assert auto_map["AutoModel"] == "modeling_kronecker_bert.KroneckerBertModel"
    assert auto_map["AutoModelForMaskedLM"] == "modeling_mine.MyModel"


def test_default_is_all_dense():
    assert factored_modules(KroneckerBertConfig()) == {}
    assert KroneckerGPT2Config().factor_plan == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KroneckerBertConfig.from_dense(GPT2Config(), "7.7x"), "model_type='gpt2' must be 'bert'"),
        (lambda: KroneckerBertConfig.from_dense(RobertaConfig(), "7.7x"), "supported families are bert, dis"),
        (lambda: KroneckerGPT2Config.from_dense(BertConfig(), "kngpt2"), "model_type='bert' must be 'gpt2'"),
        (
            lambda: KroneckerBertModel(KroneckerBertConfig(factor_plan={"nowhere": (1, 1)})),
            "'nowhere' matches no module",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
