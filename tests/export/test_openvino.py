"""Graphs for OpenVINO beside PyTorch, at sizes that no graph was traced with."""

import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from students import CAN_EXPORT, first_output, student
from tiny import inputs, model_type, tokenizer_for

import kronecker_transformers as kt
from kronecker_transformers.cli import main
from kronecker_transformers.evaluation.sessions import share_of_products
from kronecker_transformers.export import openvino as converting
from kronecker_transformers.export.onnx import export_graphs
from kronecker_transformers.export.parity import FORMS, run
from kronecker_transformers.export.runtimes import open_session

pytest.importorskip("openvino", reason="comes with the extra openvino")
if not CAN_EXPORT:
    pytest.skip("needs newer versions", allow_module_level=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def export(model_class):
        if model_class not in made:
            folder = tmp_path_factory.mktemp("openvino")
            model, tokenizer = student(model_class), tokenizer_for(model_type(model_class), folder)
            files = export_graphs(model, tokenizer, folder / "out", ["openvino", "openvino_int8"])
            made[model_class] = model, folder / "out", files
        return made[model_class]

    return export


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [kt.KroneckerMPNetModel, kt.KroneckerGPT2LMHeadModel])
def test_outputs_at_sizes_of_its_own(model_class, exported):
    model, folder, files = exported(model_class)
    assert not (folder / "onnx").exists()
    sizes = [
        (folder / file.name).stat().st_size + (folder / file.name).with_suffix(".bin").stat().st_size for file in files
    ]
    assert [file.size for file in files] == sizes
    assert files[0].difference < 1e-5
    assert 1e-5 < files[1].relative_error < 0.1
    for form, tolerance in (("openvino", 1e-5), ("openvino_int8", 0.15)):
        session = open_session(folder / FORMS[form])
        for batch, length, seed in ((3, 11, 1), (3, 40, 2)):
            sample = inputs(model, batch, length, seed)
            with torch.no_grad():
                expected = first_output(model(**sample))
            real = sample["attention_mask"].bool()
            found = torch.from_numpy(next(iter(run(session, sample).values())))
            limit = tolerance * float(expected[real].abs().max())
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=limit)
        assert 0 < share_of_products(folder / FORMS[form], 2, 8, words=60) < 1


@pytest.mark.slow
def test_text_is_generated_token_by_token(exported):
    model, folder, _ = exported(kt.KroneckerGPT2LMHeadModel)
    session = open_session(folder / FORMS["openvino"])
    prompt = torch.tensor([[5, 9, 33, 2], [7, 7, 60, 41]])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    ids, past, step = prompt.numpy(), {}, prompt.numpy()
    for _ in range(20):
        past = run(session, {"input_ids": step, "attention_mask": np.ones_like(ids), **past}, with_past=True)
        step = past.pop("logits")[:, -1].argmax(-1)[:, None]
        ids = np.concatenate([ids, step], 1)
    assert ids.tolist() == expected.tolist()


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    plan = {"encoder.*.intermediate.dense": (96, 1, 4)}
    student(kt.KroneckerBertModel, plan, num_hidden_layers=1).save_pretrained(tmp_path / "student")
    out = ["--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "student"), "--format", "openvino", "--int4", *out]) == 1
    assert "--int4 is for --format onnx; add that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "student"), "--format", "openvino", *out]) == 0
    assert {path.name for path in (tmp_path / "out" / "openvino").iterdir()} == {
        "openvino_model.xml",
        "openvino_model.bin",
    }
    benchmark = ["benchmark", str(tmp_path / "student"), "--against", str(tmp_path / "student"), "--length", "8"]
    benchmark += ["--runtime", "openvino", "--rounds", "2", "--json", str(tmp_path / "found.json")]
    assert main([*benchmark, "--dtype", "float16"]) == 1
    assert "dtype='float16' is not for openvino on a CPU" in capsys.readouterr().err
    assert main(benchmark) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["runtime"], found["dtype"]) == ("openvino", "float32")
    assert f"openvino {version('openvino')}" in found["environment"]
    assert 0 < found["model"]["limit_milliseconds"] < found["model"]["milliseconds"]


def test_what_is_missing_is_named_before_anything_is_written(monkeypatch, tmp_path):
    found = converting.importlib.util.find_spec
    monkeypatch.setattr(converting.importlib.util, "find_spec", lambda name: None if name == "nncf" else found(name))
    with pytest.raises(ImportError, match=r"OpenVINO needs nncf; in a clone .*\[openvino\]"):
        export_graphs(student(kt.KroneckerBertModel), None, tmp_path / "out", ["openvino", "openvino_int8"])
    assert list(tmp_path.iterdir()) == []
