"""Graphs for ONNX Runtime beside PyTorch and stock transformers, at sizes that no graph was traced with."""

import copy
import json
from collections import Counter
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from students import CAN_EXPORT, MODELS, student
from tiny import bert_tokenizer, gpt2_tokenizer, inputs, model_type, teacher, tokenizer_for

import kronecker_transformers as kt
from kronecker_transformers.cli import main
from kronecker_transformers.export import onnx as exporting
from kronecker_transformers.export import parity

if not CAN_EXPORT:
    pytest.skip("needs newer versions", allow_module_level=True)

SMALLEST = 64
"""Entries of a weight that is worth quantizing, where all are small."""
TOLERANCES = {"fp32": 1e-5, "int8": 0.15, "int4": 0.5, "fp16": 0.01}
"""Of single outputs, relative to the largest."""
ONNX_FORMS = ("fp32", "int8", "int4", "fp16")
IN_DEFAULT_RUN = ("KroneckerBertForMaskedLM", "KroneckerGPT2LMHeadModel")
CLASSES = [c if c.__name__ in IN_DEFAULT_RUN else pytest.param(c, marks=pytest.mark.slow) for c in MODELS]


def session(folder, name):
    return onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Models of a class and their folders, made once."""
    made = {}

    def export(model_class):
        if model_class not in made:
            folder = tmp_path_factory.mktemp("onnx")
            model = student(model_class)
            tokenizer = tokenizer_for(model_type(model_class), folder)
            with patch.object(exporting, "SMALLEST", SMALLEST):
                texts = ("the quick brown fox", "a dog")
                files = exporting.export_onnx(
                    model, tokenizer, folder / "out", also=("int8", "int4", "fp16"), texts=texts
                )
            made[model_class] = model, folder / "out", files
        return made[model_class]

    return export


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_every_output_at_sizes_of_its_own(model_class, exported):
    model, folder, files = exported(model_class)
    graphs = {form: session(folder, parity.FORMS[form]) for form in ONNX_FORMS}
    scales: dict[str, float] = {}  # of each output, from the first sample: that of a single number says little
    for batch, length, seed in ((3, 11, 1), (3, 40, 2), (3, 5, 3)):
        sample = (
            inputs(model, batch, length, seed) if length > 5 else {k: v[:1, ..., :1] for k, v in inputs(model).items()}
        )
        with torch.no_grad():
            expected = model(**sample)
        real = sample["attention_mask"].bool()
        for form, graph in graphs.items():
            found = parity.run(graph, sample)
            assert {key for key, value in expected.items() if isinstance(value, torch.Tensor)} == found.keys()
            for key, value in found.items():
                wanted, value = expected[key], torch.from_numpy(value)
                if wanted.shape[: real.ndim] == real.shape:
                    wanted, value = wanted[real], value[real]
                tolerance = TOLERANCES[form] * scales.setdefault(key, float(wanted.abs().max()))
                torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    assert [file.name for file in files] == [parity.FORMS[form] for form in ONNX_FORMS]
    assert all(file.size == (folder / file.name).stat().st_size for file in files)
    fp32, int8, int4, fp16 = files
    assert fp32.difference < 1e-5 < fp16.relative_error < min(int8.relative_error, int4.relative_error)
    assert int8.relative_error < 0.3


def test_a_large_vocabulary_is_stored_once(tmp_path):
    plan = {"wte": (9000, 16, 2)}  # above a megabyte, the exporter does not transpose a weight itself
    model = student(kt.KroneckerGPT2LMHeadModel, plan, vocab_size=9000, num_hidden_layers=1)
    entries = model.num_parameters()
    files = exporting.export_onnx(model, None, tmp_path / "out", also=["int8", "int4"])
    for file, size in zip(files, (4, 1, 1), strict=True):
        assert size * entries < file.size < 1.2 * size * entries + 60_000, file


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_weights_are_constants_that_are_stored_once(model_class, exported):
    model, folder, _ = exported(model_class)
    for name in (parity.FORMS["fp32"], parity.FORMS["int8"]):
        onnx.checker.check_model(onnx.load(folder / name), full_check=False)
        graph = ir.load(folder / name).graph
        constants = [v.const_value for v in graph.initializers.values()]
        matrices = [c for c in constants if len(c.shape) == 2 and c.dtype.name in ("FLOAT", "INT8")]
        entries = sum(tensor.size for tensor in matrices)
        table = model.get_input_embeddings()
        own = table.frequent  # with a row of zeros, and once more for a tied head
        twice = table.B.numel() + own.B.numel() + own.A.numel() + 2 * own.terms  # small, in two forms
        assert entries <= sum(p.numel() for p in model.parameters() if p.ndim > 1) + twice
        for node in graph:
            if node.op_type in ("Reshape", "Transpose"):
                assert not node.inputs[0].is_initializer(), node
        kinds = Counter(node.op_type for node in graph)
        assert kinds["Attention"] == model.config.num_hidden_layers
        if "GPT2" in model_class.__name__:
            assert (kinds["Gelu"], kinds["Tanh"]) == (model.config.num_hidden_layers, 0)
        assert kinds["SkipLayerNormalization"] == kinds["BiasGelu"] == 0
    assert {matrix.dtype.name for matrix in matrices if matrix.size >= SMALLEST} == {"INT8"}
    largest = [np.abs(matrix.numpy().astype(int)).max() for matrix in matrices if matrix.dtype.name == "INT8"]
    assert max(largest) == 64  # sums of two products of 127 would overflow on processors without VNNI


def test_text_is_generated_token_by_token(exported):
    model, folder, _ = exported(kt.KroneckerGPT2LMHeadModel)
    graph = session(folder, parity.FORMS["fp32"])
    assert {f"past_key_values.{i}.{part}" for i in range(3) for part in ("key", "value")} | {
        "input_ids", "attention_mask", "position_ids",
    } == {value.name for value in graph.get_inputs()}  # fmt: skip
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 1
    prompt = torch.tensor([[5, 9, 33, 2], [7, 7, 60, 41]])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    ids, past, step = prompt.numpy(), {}, prompt.numpy()
    for _ in range(20):
        past = parity.run(graph, {"input_ids": step, "attention_mask": np.ones_like(ids), **past}, with_past=True)
        step = past.pop("logits")[:, -1].argmax(-1)[:, None]
        ids = np.concatenate([ids, step], 1)
    assert ids.tolist() == expected.tolist()


@pytest.mark.slow
def test_low_rank_has_the_nodes_of_a_dense_layer_and_one_product_more(tmp_path):
    kinds = []
    for name, plan in (("dense", {}), ("low rank", {"encoder.layer.*.intermediate.dense": (96, 1, 4)})):
        exporting.export_onnx(student(kt.KroneckerBertModel, plan, num_hidden_layers=1), None, tmp_path / name)
        kinds.append(Counter(node.op_type for node in ir.load(tmp_path / name / parity.FORMS["fp32"]).graph))
    assert kinds[1] - kinds[0] == {"MatMul": 1}
    assert kinds[0] - kinds[1] == {}
    assert kinds[0]["Transpose"] == 0


def test_a_folder_for_others(tmp_path):
    dense = teacher(transformers.BertForSequenceClassification, num_hidden_layers=1)
    dense.save_pretrained(tmp_path / "teacher")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("the quick brown fox\na lazy dog\n")
    assert main(["compress", str(tmp_path / "teacher"), "--output", str(tmp_path / "student")]) == 0
    command = [
        "export",
        str(tmp_path / "student"),
        "--format",
        "onnx",
        "--text",
        str(tmp_path / "text.txt"),
        "--output",
    ]
    assert main([*command, str(tmp_path / "out")]) == 0
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"config.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json"}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config) is transformers.BertConfig
    assert config.architectures == ["BertForSequenceClassification"]
    assert config.id2label == dense.config.id2label
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_graph_that_differs_is_refused_and_nothing_is_left(change, monkeypatch, tmp_path):
    model = student(kt.KroneckerBertModel, {"encoder.*.intermediate.dense": (96, 1, 4)}, num_hidden_layers=1)
    write = exporting._WRITERS["fp32"]

    def broken(model, path):
        model = copy.deepcopy(model)
        model.encoder.layer[0].intermediate.dense.B.data += change
        write(model, path)

    monkeypatch.setitem(exporting._WRITERS, "fp32", broken)
    with pytest.raises(
        ValueError, match=r"outputs of onnx/model.onnx differ from PyTorch's by .*, more than 0.0001; rep"
    ):
        exporting.export_onnx(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_a_form_is_too_coarse_for_is_refused_with_the_remedy(monkeypatch, tmp_path):
    model = student(kt.KroneckerBertModel, {"encoder.*.intermediate.dense": (96, 1, 4)}, num_hidden_layers=1)
    monkeypatch.setitem(parity.TOLERANCES, "int8", 1e-9)
    with pytest.raises(ValueError, match=r"model_quantized.onnx differ .* int8 is too coarse for its weights: dis"):
        exporting.export_onnx(model, None, tmp_path / "out", also=["int8"])
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut_and_compared_some_at_a_time(tmp_path):
    model = student(kt.KroneckerGPT2LMHeadModel, n_positions=200)
    batches = parity.text_batches(model, tokenizer_for("gpt2", tmp_path), ["the fox " * 500, "a dog", *["a fox"] * 10])
    assert [tuple(batch["input_ids"].shape) for batch in batches][:2] == [(1, 128), (8, 128)]
    assert sum(len(batch["input_ids"]) for batch in batches) == 1 + 12
    assert all(batch["attention_mask"].any(1).all() for batch in batches)


@pytest.mark.parametrize("flags", [{"output_hidden_states": True, "output_attentions": True}, {"return_dict": False},
                                   {"chunk_size_feed_forward": 1}])  # fmt: skip
def test_outputs_that_a_config_asks_for_or_not_do_not_matter(flags, tmp_path):
    model = student(kt.KroneckerBertForSequenceClassification, **flags)
    exporting.export_onnx(model, None, tmp_path / "graph")
    ids = torch.randint(model.config.vocab_size, (2, 7))
    (logits,) = session(tmp_path / "graph" / "onnx", "model.onnx").run(
        None,
        {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)},
    )
    with torch.no_grad():
        wanted = model(ids, return_dict=True).logits
        twins = kt.to_dense(model)(ids, return_dict=True).logits
    torch.testing.assert_close(torch.tensor(logits), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twins, wanted, rtol=1e-4, atol=1e-4)
    assert [getattr(model.config, name) for name in flags] == list(flags.values())


def test_refusals_come_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(exporting._WRITERS, "fp32", lambda *args: pytest.fail("too late"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    model = student(kt.KroneckerBertModel)
    with pytest.raises(FileExistsError, match="already holds something"):
        exporting.export_onnx(model, None, tmp_path / "full")
    with pytest.raises(ValueError, match="'int2' is no form of a graph; choose from fp32, int8, int4, fp16"):
        exporting.export_onnx(model, None, tmp_path / "a", also=["int8", "int2"])
    with pytest.raises(ValueError, match="form='' is no form of a graph; choose from fp32"):
        exporting.export_graphs(model, None, tmp_path / "a", [])
    with pytest.raises(ValueError, match=r"texts=\[\] leave nothing to compare"):
        exporting.export_onnx(model, None, tmp_path / "a", texts=[])
    with pytest.raises(ValueError, match=r"texts=\['', ''\] have no tokens to compare the graphs on; give some sent"):
        exporting.export_onnx(teacher(transformers.GPT2Model), gpt2_tokenizer(tmp_path), tmp_path / "a", texts=["", ""])
    few = teacher(transformers.GPT2Model, vocab_size=9)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but the model's embedding has 9 rows"):
        exporting.export_onnx(few, gpt2_tokenizer(tmp_path), tmp_path / "a")
    unpadded = teacher(transformers.GPT2ForSequenceClassification, pad_token_id=None)
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification has no pad_token_id in its config"):
        exporting.export_onnx(unpadded, None, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "LARGEST", 4 * model.num_parameters() - 1)
        with pytest.raises(ValueError, match=r"of weights in fp32, and a graph holds at most 2"):
            exporting.export_onnx(model, None, tmp_path / "a")
    other = transformers.CamembertModel(transformers.CamembertConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="CamembertModel is not supported"):
        exporting.export_onnx(other, None, tmp_path / "a")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.A[0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        exporting.export_onnx(model, None, tmp_path / "a")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs onnx, onnxscript, .*; in a clone of the project, pip install --upgrade '\.\[export"
    ):
        exporting.export_onnx(student(kt.KroneckerBertModel), None, tmp_path / "a")


def test_options_of_onnx_are_refused_for_a_dense_twin(tmp_path, capsys):
    assert main(["export", "x", "--int8", "--output", str(tmp_path / "out")]) == 1
    assert "--int8 is for --format onnx or openvino; add that, or leave --int8 out" in capsys.readouterr().err
    onnx = ["export", "x", "--format", "onnx", "--output", str(tmp_path / "out")]
    assert main([*onnx, "--text-column", "body"]) == 1
    assert "--text-column is of a text; give --text, or leave --text-column out" in capsys.readouterr().err
