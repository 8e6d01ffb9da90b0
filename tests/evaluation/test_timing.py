import json
import os
import sys

import pytest
import torch
from tiny import teacher
from torch._dynamo.exc import BackendCompilerFailed
from transformers import BertForMultipleChoice, BertModel, GPT2ForSequenceClassification, GPT2LMHeadModel

from kronecker_transformers import compress, describe
from kronecker_transformers.cli import main
from kronecker_transformers.evaluation import timing as package_benchmark
from kronecker_transformers.evaluation.sessions import session_memory
from kronecker_transformers.evaluation.timing import (
    Comparison,
    Measurement,
    benchmark,
    in_turn,
    limit_seconds,
    machine_rates,
    median_and_spread,
    process_memory,
    without_linear_layers,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    dense = teacher(BertModel)
    dense.save_pretrained(root / "dense")
    compress(dense).save_pretrained(root / "student")
    return root


def test_all_take_turns_and_warming_up_is_not_counted():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warmup=2)
    assert "".join(calls) == "ababababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_median_and_spread():
    middle, spread = median_and_spread([0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007])
    assert middle == pytest.approx(4.0)
    assert spread == pytest.approx(0.5)  # quartiles 2 and 6


@pytest.mark.parametrize("dense_class", [BertModel, BertForMultipleChoice, GPT2LMHeadModel])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures_of_models_in_memory(dense_class, dtype):
    dense = teacher(dense_class)
    student = compress(dense).model
    found = benchmark(student, dense, batch=3, length=10, dtype=dtype, rounds=2)
    assert student.dtype == dense.dtype == torch.float32
    for side, model in ((found.model, student), (found.against, dense)):
        costs = describe(model, 10).factored
        assert (side.name, side.parameters) == (type(model).__name__, costs.parameters)
        assert side.bytes == costs.bytes // (2 if dtype == "bfloat16" else 1)
        assert side.flops == 3 * costs.total_flops
        assert side.milliseconds > 0
        assert side.limit_milliseconds > 0
        assert side.peak_bytes is None
    assert found.speedup == found.against.milliseconds / found.model.milliseconds
    assert json.loads(json.dumps(found.to_dict()))["model"]["flops"] == found.model.flops


def test_compiled_measures_both_compiled(monkeypatch):
    compiled = []

    def compile_(model):
        compiled.append(type(model).__name__)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    dense = teacher(BertModel)
    assert benchmark(compress(dense).model, dense, length=8, rounds=2, compiled=True).compiled
    assert sorted(compiled) == ["BertModel", "KroneckerBertModel"]


def test_a_compiler_that_is_missing_is_named_before_the_measuring(monkeypatch):
    def compile_(model):
        def forward(*args, **kwargs):
            raise BackendCompilerFailed("inductor", RuntimeError("No working C++ compiler found"), None)

        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(package_benchmark, "machine_rates", lambda *_: pytest.fail("is measured"))
    dense = teacher(BertModel)
    with pytest.raises(ValueError, match=r"torch.compile cannot be used here \(.*\); install a C\+\+ compiler"):
        benchmark(dense, dense, length=8, compiled=True)


def test_several_texts_need_a_padding_token():
    dense = teacher(GPT2ForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match="has no pad_token_id in its config, so it cannot read several texts at once"):
        benchmark(dense, dense, length=8, batch=2)


@pytest.mark.parametrize("dense_class", [BertModel, GPT2LMHeadModel])
def test_without_linear_layers_none_computes(dense_class):
    model = compress(teacher(dense_class), {"*.0.*dense" if dense_class is BertModel else "h.0.*": (4, 2)}).model
    products = ("linear", "addmm", "mm", "bmm")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        whole = model(ids)[0]
        with without_linear_layers(model):
            model(ids)
            with torch.profiler.profile() as profile:
                model(ids)
            calls = [event.key for event in profile.key_averages()]
        assert not any(f"aten::{name}" in calls for name in products)
        assert "aten::scaled_dot_product_attention" in calls
        assert torch.equal(model(ids)[0], whole)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("rates", "linear"), [((1e6, 1e30), "flops"), ((1e30, 1e6), "bytes")])
def test_the_limit_is_the_rest_and_the_slower_of_products_and_weights(rates, linear, monkeypatch):
    """An embedding is looked up, so its bytes do not count; a tied head's do, once."""
    dense = teacher(GPT2LMHeadModel)
    monkeypatch.setattr(package_benchmark, "in_turn", lambda works, *args, **kwargs: {key: [3, 1, 2] for key in works})
    per_layer = [(96 * 32, 96), (32 * 32, 32), (96 * 32, 96), (32 * 96, 32)]
    weights, biases = (3 * sum(column) for column in zip(*per_layer, strict=True))
    head = 72 * 32
    wanted = {"flops": 2 * 5 * 10 * (weights + head) / 1e6, "bytes": 4 * (weights + biases + head) / 1e6}
    assert limit_seconds(dense, 5, 10, rates, 3) == pytest.approx(2 + wanted[linear])


def test_a_forward_that_was_replaced_before_is_put_back():
    model = teacher(BertModel)
    replaced = model.encoder.layer[0].intermediate.dense
    mine = replaced.forward = lambda x: torch.zeros(*x.shape[:-1], 96)
    with without_linear_layers(model):
        assert replaced.forward is not mine
    assert replaced.forward is mine


def test_rates_of_the_machine():
    gemm_rate, copy_rate = machine_rates(torch.float32)
    assert 1e8 < gemm_rate < 1e15
    assert 1e7 < copy_rate < 1e14


@LINUX
@pytest.mark.slow
def test_memory_of_a_process_grows_with_the_model(folders, tmp_path):
    large = teacher(BertModel, intermediate_size=96_000)  # 74 MB
    large.save_pretrained(tmp_path / "large")
    small = process_memory(folders / "dense", 1, 8, "float32")
    grown = process_memory(tmp_path / "large", 1, 8, "float32")
    assert small > 0
    assert 50e6 < grown - small < 300e6  # allocators differ
    with pytest.raises(OSError, match="could not be measured"):
        process_memory(tmp_path / "nothing", 1, 8, "float32")


def test_a_sandbox_that_tells_no_memory(folders, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "clear_refs" not in str(path))
    assert process_memory(folders / "dense", 1, 8, "float32") is None
    assert session_memory(folders / "nothing", 1, 8) is None


def side(name, milliseconds, parameters, spread=0.02):
    return Measurement(name, parameters, 4 * parameters, 10 * parameters, milliseconds, spread, 1.0, None)


@pytest.mark.parametrize(
    ("milliseconds", "parameters", "words"),
    [
        (5.0, 100, ("student is 2.00 times as fast as teacher here, and 7.70 times smaller.",)),
        (20.0, 100, ("does not pay here: it is 2.00 times as slow as teacher, and 7.70", "transformers export")),
        (9.8, 100, ("does not pay here: it is as fast as teacher",)),
        (5.0, 1540, ("2.00 times larger",)),
    ],
)  # fmt: skip
def test_verdict(milliseconds, parameters, words):
    found = Comparison(
        side("student", milliseconds, parameters),
        side("teacher", 10.0, 770),
        1,
        8,
        "float32",
        "cpu",
        False,
        1.0,
        1.0,
        "",
    )
    assert all(part in found.verdict() for part in words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"length": 41}, "length=41 is more than the 40 tokens of"),
        ({"rounds": 1}, "rounds=1 must be at least 2"),
        ({"dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16, float16"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used here"),
    ],
)
def test_arguments_that_cannot_be(folders, changes, message):
    with pytest.raises(ValueError, match=message):
        benchmark(folders / "student", folders / "dense", **changes)


@LINUX
def test_command_line(folders, tmp_path, capsys):
    command = ["benchmark", str(folders / "student"), "--against", str(folders / "dense"), "--length", "8"]
    outputs = ["--json", str(tmp_path / "figures.json"), "--picture", str(tmp_path / "figures.png")]
    assert main([*command, "--batch", "2", "--rounds", "2", *outputs]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    for wanted in ("2 x 8 tokens, float32, cpu", "peak megabytes of a process", f"{figures['model']['parameters']:,}"):
        assert wanted in shown
    assert figures["speedup"] == figures["against"]["milliseconds"] / figures["model"]["milliseconds"]
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


@LINUX
def test_names_with_brackets_come_out_as_they_are(folders, tmp_path, capsys):
    name = tmp_path / "m[/v2]:cat:"
    name.parent.mkdir()
    name.symlink_to(folders / "student")
    assert main(["benchmark", str(name), "--against", str(folders / "dense"), "--length", "8", "--rounds", "2"]) == 0
    assert "m[/v2]:cat:" in capsys.readouterr().out


def test_command_line_refuses_before_it_measures(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(package_benchmark, "load_model", None)
    command = ["benchmark", str(folders / "student"), "--against", str(folders / "dense")]
    assert main([*command, "--json", str(tmp_path / "none" / "figures.json")]) == 1
    assert "does not exist; make it first" in capsys.readouterr().err
    assert main([*command, "--picture", str(tmp_path)]) == 1
    assert "is a folder; give the name of a file" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--batch", "0"]) == 1
    assert "batch=0 must be at least 1" in capsys.readouterr().err
