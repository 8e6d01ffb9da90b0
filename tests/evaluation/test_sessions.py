import json
import sys
from importlib.metadata import version

import pytest
import torch
from students import CAN_EXPORT
from tiny import teacher
from transformers import BertModel

from kronecker_transformers import compress
from kronecker_transformers.cli import main
from kronecker_transformers.evaluation import sessions
from kronecker_transformers.evaluation.sessions import (
    benchmark_sessions,
    session_memory,
    session_pass,
    share_of_products,
)
from kronecker_transformers.export.onnx import export_onnx
from kronecker_transformers.export.parity import FORMS
from kronecker_transformers.export.runtimes import open_session

if not CAN_EXPORT:
    pytest.skip("needs newer versions", allow_module_level=True)


@pytest.fixture(scope="module")
def dense():
    return teacher(BertModel, num_hidden_layers=1)


@pytest.fixture(scope="module")
def graph(dense, tmp_path_factory):
    export_onnx(dense, None, folder := tmp_path_factory.mktemp("graph") / "out")
    return folder / FORMS["fp32"]


def test_a_pass_computes_what_pytorch_does(dense, graph):
    run = session_pass(open_session(graph), batch=3, length=9, words=64)
    with torch.no_grad():
        expected = dense(**run.args[1]).last_hidden_state
    assert expected.shape == (3, 9, 32)
    torch.testing.assert_close(torch.from_numpy(run()["last_hidden_state"]), expected, rtol=1e-4, atol=1e-5)


def test_products_and_memory(graph):
    assert 0 < share_of_products(graph, 64, 32, words=64) < 1
    if sys.platform == "linux":
        assert 0 < session_memory(graph, 2, 8, words=64) < 2e9


@pytest.mark.slow
def test_on_the_command_line(dense, tmp_path, capsys):
    dense.save_pretrained(tmp_path / "dense")
    compress(dense, {"encoder.*.intermediate.dense": (96, 1, 4)}).save_pretrained(tmp_path / "student")
    command = ["benchmark", str(tmp_path / "student"), "--against", str(tmp_path / "dense"), "--length", "8"]
    command += ["--runtime", "onnxruntime", "--int8", "--rounds", "2", "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    assert "1 x 8 tokens, int8, onnxruntime on cpu" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["runtime"], found["dtype"]) == ("onnxruntime", "int8")
    assert f"onnxruntime {version('onnxruntime')}" in found["environment"]
    for side in ("model", "against"):
        assert 0 < found[side]["limit_milliseconds"] <= found[side]["milliseconds"]
        assert found[side]["bytes"] > found[side]["parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int8"], "--int8 is for --runtime onnxruntime or openvino; add that, or leave --int8 out"),
        (
            ["--runtime", "onnxruntime", "--dtype", "bfloat16"],
            "dtype='bfloat16' is not for onnxruntime on a CPU; choose from float32",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    assert main(["benchmark", "a", "--against", "b", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("int8", "dtype", "name"),
    [
        (False, "float32", "float32"),
        (False, "bfloat16", "bfloat16"),
        (True, "float32", "int8"),
        (True, "bfloat16", "int8, bfloat16"),
    ],
)
def test_the_name_of_a_precision_says_both_of_weights_and_of_activations(int8, dtype, name, dense, monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    for slow, value in (("in_turn", {"model": [1.0] * 4, "against": [1.0] * 4}), ("share_of_products", 0.2),
                        ("session_memory", None), ("machine_rates", (1.0, 1.0))):  # fmt: skip
        monkeypatch.setattr(sessions, slow, lambda *_, found=value, **__: found)
    found = benchmark_sessions(dense, dense, length=8, engine="openvino", int8=int8, dtype=dtype)
    assert found.dtype == name
    assert found.model.milliseconds == pytest.approx(1000)
    assert found.model.limit_milliseconds == pytest.approx(800)  # if a fifth of it, the products, took no time


def test_refusals_come_before_the_export(dense):
    with pytest.raises(ValueError, match="engine='tvm' is not known; choose from onnxruntime, openvino"):
        benchmark_sessions(dense, dense, engine="tvm")
    with pytest.raises(ValueError, match="dtype='float16' is not for openvino on a CPU; choose from float32, bfloat16"):
        benchmark_sessions(dense, dense, engine="openvino", dtype="float16")
    with pytest.raises(ValueError, match="length=41 is more than the 40 tokens of BertModel"):
        benchmark_sessions(dense, dense, length=41)
    with pytest.raises(ValueError, match="rounds=1 must be at least 2"):
        benchmark_sessions(dense, dense, rounds=1)
