import numpy as np
import onnxruntime
import pytest
import torch
from students import CAN_EXPORT
from tiny import bert_tokenizer, gpt2_tokenizer, teacher, texts
from torch import nn
from transformers import BertModel, GPT2LMHeadModel

from kronecker_transformers.cli import main
from kronecker_transformers.compression import session_latency
from kronecker_transformers.compression.candidates import Candidate, MeasuredLayer
from kronecker_transformers.compression.latency import Runtime, latency_table
from kronecker_transformers.compression.plan_file import read_plan
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.models.factor_plan import FactorEntry

if not CAN_EXPORT:
    pytest.skip("needs newer versions", allow_module_level=True)

from kronecker_transformers.export.layer_graphs import layer_graphs
from kronecker_transformers.export.products import ProductEmbedding, linear_of, product_linear
from kronecker_transformers.models.kronecker_layers import KroneckerLinear


@pytest.mark.parametrize(("int8", "tolerance"), [(False, 1e-5), (True, 0.05)])
def test_each_graph_computes_its_layer(int8, tolerance):
    torch.manual_seed(0)
    layers = [
        linear_of(torch.randn(96, 64), torch.randn(96)),
        product_linear(KroneckerLinear(64, 96, 96, 1, 48)),
        product_linear(KroneckerLinear(64, 96, 48, 32, 3)),
    ]
    x = torch.randn(2, 7, 64)
    for layer, graph in zip(layers, layer_graphs(layers, x, int8), strict=True):
        (found,) = onnxruntime.InferenceSession(graph).run(None, {"x": x.numpy()})
        wanted = layer(x).detach().numpy()
        assert found.shape == wanted.shape
        assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)
        assert (b"MatMulInteger" in graph) == int8


def test_tables_take_whole_numbers():
    torch.manual_seed(0)
    layers = [nn.Embedding(300, 32), ProductEmbedding(torch.randn(300, 4, 2), torch.randn(1, 4, 16))]
    x = torch.randint(300, (2, 7))
    for layer, graph in zip(layers, layer_graphs(layers, x, int8=False), strict=True):
        (found,) = onnxruntime.InferenceSession(graph).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, layer(x).detach(), rtol=1e-5, atol=1e-6)


def test_every_layer_is_timed_as_the_model_uses_it(monkeypatch):
    """Sequences and tokens, shapes and number of graphs; what lies between the sizes that are timed is interpolated."""
    seen = []

    def graphs(layers, x, int8):
        seen.append((tuple(x.shape), x.dtype, len(layers), int8))
        return [str(i).encode() for i in range(len(layers))]

    class Session:
        def __init__(self, graph):
            self.index = int(graph)

        def run(self, names, feed):
            assert list(feed) == ["x"]

    times = {str(i): [1e-3 * (5 + 2 * i)] for i in range(9)}
    monkeypatch.setattr(session_latency, "layer_graphs", graphs)
    monkeypatch.setattr(session_latency, "open_session", Session)
    monkeypatch.setattr(session_latency, "in_turn", lambda passes, rounds, warmup: {k: times[k] for k in passes})
    choices = [Candidate(FactorEntry(32, 1, terms), 64 * terms, 0, 0.5) for terms in (1, 2, 3, 4, 5)]
    names = (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.attention.self.key",
        "pooler.dense",
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
    )
    layers = [MeasuredLayer(name, torch.ones(32, 32), [Candidate(None, 1024, 0, 0.0), *choices], (None,) * 3, 0.1)
              for name in names]  # fmt: skip
    table = latency_table(teacher(BertModel, hidden_size=32), Runtime(3, 16, "onnxruntime", int8=True))
    found = dict(zip(names, table.timed(layers), strict=True))
    assert seen == [
        ((3, 16, 32), torch.float32, 3, True),  # dense, 1 and 5 terms; the key is as the query
        ((3, 1, 32), torch.float32, 3, True),
        ((3, 16), torch.int64, 3, True),
        ((1, 16), torch.int64, 3, True),
    ]
    for name in names[:3]:
        assert [c.milliseconds for c in found[name]] == pytest.approx([5, 7, 7.5, 8, 8.5, 9])
    for name in names[3:]:  # above the dense one, which is part of the rest
        assert [c.milliseconds for c in found[name]] == pytest.approx([0, 2, 2.5, 3, 3.5, 4])


def test_the_rest_is_what_the_products_leave(monkeypatch):
    dense = teacher(BertModel)
    monkeypatch.setattr(session_latency, "in_turn", lambda passes, rounds: {key: [0.02, 0.01, 0.03] for key in passes})
    monkeypatch.setattr(session_latency, "share_of_products", lambda *_, **__: 0.7)
    table = latency_table(dense, Runtime(1, 16, "onnxruntime"))
    assert table.rest(dense) == pytest.approx(20 * 0.3)


@pytest.mark.slow
def test_a_causal_model(tmp_path):
    found = search_plan(
        teacher(GPT2LMHeadModel, n_layer=1),
        texts(),
        milliseconds=1e6,
        runtime=Runtime(2, 8, "onnxruntime"),
        tokenizer=gpt2_tokenizer(tmp_path),
    )
    assert str(found.latency).startswith("2 x 8 tokens, ONNX Runtime, fp32: ")
    assert not found.plan  # all may stay dense
    assert 0 < found.latency.measured < 1e4
    assert 0 < found.latency.dense < 1e4
    for layer in found.layers:
        assert all(c.milliseconds > 0 or layer.name in ("wte", "wpe") for c in layer.candidates)


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    teacher(BertModel, num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "bert")
    (tmp_path / "lines.txt").write_text("\n".join(texts()))
    command = ["search", str(tmp_path / "bert"), "--calibration", str(tmp_path / "lines.txt"), "--ratio", "2"]
    plan = tmp_path / "plan.yaml"
    timed = ["--milliseconds", "1e6", "--length", "8", "--runtime", "onnxruntime", "--int8", "-o", str(plan)]
    assert main([*command, *timed]) == 0
    assert "1 x 8 tokens, ONNX Runtime, int8: " in capsys.readouterr().out
    assert read_plan(plan)
    assert main([*command, "--runtime", "onnxruntime", "-o", str(tmp_path / "none.yaml")]) == 1
    assert "were given without milliseconds to budget" in capsys.readouterr().err
