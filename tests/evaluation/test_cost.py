import io

import pytest
import torch
from rich.console import Console
from tiny import teacher
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from kronecker_transformers import (
    KroneckerBertConfig,
    KroneckerBertModel,
    KroneckerGPT2Config,
    KroneckerGPT2LMHeadModel,
    compress,
    describe,
    to_dense,
)
from kronecker_transformers.display import layers_table, totals_table


@pytest.mark.parametrize(
    ("plan", "linear", "total"), [({}, 21.74, 22.35), ("7.7x", 5.49, 6.10), ("21x", 1.42, 2.02)], ids=str
)
def test_flops_of_bert_base_in_both_countings(plan, linear, total):
    report = describe(KroneckerBertModel(KroneckerBertConfig.from_dense(BertConfig(), plan)))
    assert round(report.factored.linear_flops / 1e9, 2) == linear
    assert round(report.factored.total_flops / 1e9, 2) == total
    assert round(report.dense.linear_flops / 1e9, 2) == 21.74
    assert round(report.dense.total_flops / 1e9, 2) == 22.35
    assert report.dense.parameters == 109_482_240


@pytest.mark.parametrize(("plan", "linear", "total"), [({}, 31.62, 32.23), ("kngpt2", 21.26, 21.86)], ids=str)
def test_flops_of_gpt2_small_in_both_countings(plan, linear, total):
    report = describe(KroneckerGPT2LMHeadModel(KroneckerGPT2Config.from_dense(GPT2Config(), plan)))
    assert round(report.factored.linear_flops / 1e9, 2) == linear
    assert round(report.factored.total_flops / 1e9, 2) == total


@pytest.mark.parametrize(
    "dense_class", [BertModel, BertForSequenceClassification, BertForMultipleChoice, GPT2LMHeadModel]
)
def test_dense_side_is_the_teacher(dense_class):
    dense = teacher(dense_class)
    report = compress(dense, "kngpt2" if dense_class is GPT2LMHeadModel else "7.7x").report
    assert report.dense.parameters == sum(p.numel() for p in dense.parameters())
    assert report.dense == describe(dense).factored == describe(dense).dense
    assert report.factored.parameters < report.dense.parameters
    assert report.factored.bytes == 4 * report.factored.parameters
    assert report.length == 40  # what the tiny teachers can take


def test_flops_by_hand():
    # GPT-2 with three layers at length 10: the plan leaves everything dense but one layer
    dense = teacher(GPT2LMHeadModel)
    report = describe(compress(dense, {"h.1.mlp.c_fc": (48, 32)}).model, length=10)
    d, f, v = 32, 96, 72
    dense_linear = 2 * 10 * (3 * (3 * d * d + d * d + 2 * d * f) + v * d)
    assert report.dense.linear_flops == dense_linear
    # W (96, 32) as A (48, 32) and B (2, 1): A first, 48 * 32 + 48 * 2 multiplications per token
    assert report.factored.linear_flops == dense_linear - 2 * 10 * (d * f - 48 * 32 - 48 * 2)
    assert report.dense.total_flops - report.dense.linear_flops == 3 * 4 * 10 * 10 * d


def test_mode_and_hooks_are_restored():
    model = compress(teacher(BertModel), "7.7x").model.train()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    describe(model)
    to_dense(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_tables_show_shapes_errors_and_totals():
    report = compress(teacher(BertModel), {"encoder.layer.1.output.dense": (8, 12, 2)}).report
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(layers_table(report), totals_table(report))
    text = console.export_text()
    row = next(line for line in text.splitlines() if "encoder.layer.1.output.dense" in line).split()
    assert row == [
        "encoder.layer.1.output.dense",
        "32x96",
        "8x12",
        "4x8",
        "2",
        "256",
        f"{report.layers[0].relative_error:.4f}",
    ]
    assert f"{report.dense.parameters:,}" in text


def test_bfloat16_counts_two_bytes():
    report = compress(teacher(BertModel, dtype=torch.bfloat16), "7.7x").report
    assert report.factored.bytes == 2 * report.factored.parameters
    assert report.dense.bytes == 2 * report.dense.parameters
