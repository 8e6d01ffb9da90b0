"""Checkpoints open where this package does not exist, with every factor bit by bit as it was saved."""

import filecmp
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stranger import code_of, run
from tiny import CONFIGS, inputs, perturb, teacher, tokenizer_for
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import kronecker_transformers as kt
from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.models import DENSE_CLASSES
from kronecker_transformers.models.kronecker_family import FAMILIES

PIPELINES = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}

# Runs without the package; reads a list of jobs, writes what it found.
STRANGER = """
    import json, sys
    sys.modules["kronecker_transformers"] = None  # importing it fails
    import torch, transformers
    from safetensors.torch import load_file, save_file

    for job in json.load(open(sys.argv[1])):
        folder, batch = job["folder"], torch.load(job["batch"], weights_only=True)
        own = getattr(transformers, job["auto_class"])
        model, info = own.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        saved = load_file(folder + "/model.safetensors")
        state = model.state_dict()
        for key, value in saved.items():
            assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
        tied = state.keys() - saved.keys()
        heads = ("lm_head.", "cls.predictions.decoder.", "vocab_projector.", "generator_lm_head.")
        assert all(key.startswith(heads) for key in tied), tied
        with torch.no_grad():
            outputs = {k: v for k, v in model.eval()(**batch).items() if isinstance(v, torch.Tensor)}
        torch.save(outputs, job["outputs"])
        for auto_class in job["other_auto_classes"]:
            other = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
            base = other.base_model.state_dict()
            ours = model.base_model.state_dict()
            shared = base.keys() & ours.keys()
            assert any(key.endswith(".A") for key in shared)
            assert all(torch.equal(base[key], ours[key]) for key in shared), auto_class
        if job["pipeline"]:
            pipe = transformers.pipeline(job["pipeline"], model=folder, trust_remote_code=True)
            text = "the quick [MASK] fox" if job["pipeline"] == "fill-mask" else "the quick brown fox"
            settings = {"max_new_tokens": 4} if job["pipeline"] == "text-generation" else {}
            result = pipe(text, **settings)
            json.dump(result, open(job["result"], "w"), default=float)
        model.save_pretrained(job["again"])
        model.resize_token_embeddings(90)
        model.save_pretrained(job["resized"])
        again = own.from_pretrained(job["resized"], trust_remote_code=True)
        ours, theirs = model.state_dict(), again.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), "resized"
        assert again.get_input_embeddings().A.shape[0] == again.config.vocab_size == 90
    print("done")
"""


def checkpoint(dense_class, folder, tmp_path, **changes):
    dense = teacher(dense_class, **changes)
    result = compress(dense, "kngpt2" if dense.config.model_type == "gpt2" else "7.7x")
    perturb(result.model, seed=7)
    tokenizer = tokenizer_for(dense.config.model_type, tmp_path)
    save_folder(folder, result.model, tokenizer, result.report.to_dict())
    return result.model


@pytest.mark.parametrize(
    "family", [name if name in ("bert", "gpt2") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_every_class_without_the_package(family, tmp_path):
    classes = {d.__name__: d for d in DENSE_CLASSES.values() if d.config_class.model_type == family}
    config_class = FAMILIES[family]
    auto_classes = {
        ref.split(".")[1].removeprefix("Kronecker"): auto for auto, ref in config_class.auto_classes.items()
    }
    jobs, expected = [], {}
    for name, dense_class in classes.items():
        work = tmp_path / name
        work.mkdir()
        model = checkpoint(dense_class, work / "model", work)
        batch = inputs(model)
        torch.save(batch, work / "batch.pt")
        with torch.no_grad():
            expected[name] = {k: v for k, v in model(**batch).items() if isinstance(v, torch.Tensor)}
        paths = {key: str(work / key) for key in ("again", "outputs", "result", "resized")}
        others = (
            [a for a in config_class.auto_classes if a != "AutoConfig"]
            if auto_classes[name] == "AutoModel"
            else ["AutoModel"]
        )
        if name.endswith("ForQuestionAnswering"):  # two labels there, three elsewhere
            others = ["AutoModel", "AutoModelForQuestionAnswering"]
        elif "AutoModelForQuestionAnswering" in others:
            others.remove("AutoModelForQuestionAnswering") if family != "gpt2" else None
        kind = re.sub("^[A-Z].*?(?=Model|For|LMHead)", "", name)
        jobs.append({
            "folder": str(work / "model"), "auto_class": auto_classes[name], "batch": str(work / "batch.pt"),
            "other_auto_classes": others, "pipeline": PIPELINES.get(kind), **paths,
        })  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    process = run(STRANGER, tmp_path / "jobs.json", tmp_path=tmp_path)
    assert process.stdout.strip().endswith("done"), process.stderr[-4000:]

    for job, (name, outputs) in zip(jobs, expected.items(), strict=True):
        found = torch.load(job["outputs"], weights_only=True)
        assert found.keys() == outputs.keys()
        torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-5)
        if job["pipeline"]:
            assert json.loads((tmp_path / name / "result").read_text())
        # saving what was loaded changes nothing
        files = {path.name for path in (tmp_path / name / "again").iterdir()}
        assert code_of(family) | {"config.json", "model.safetensors"} <= files
        same, different, errors = filecmp.cmpfiles(job["folder"], job["again"], files, shallow=False)
        assert set(same) == files, (different, errors)


def test_with_the_package_no_remote_code_runs_and_nothing_is_reinitialised(tmp_path):
    for dense_class in DENSE_CLASSES.values():
        name = dense_class.__name__
        model = checkpoint(dense_class, tmp_path / name, tmp_path)
        auto_map = model.config.auto_classes
        auto_class = next(auto for auto, ref in auto_map.items() if ref.split(".")[1] == f"Kronecker{name}")
        loaded = getattr(transformers, auto_class).from_pretrained(tmp_path / name, trust_remote_code=True)
        assert type(loaded) is getattr(kt, f"Kronecker{name}")
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        again = tmp_path / f"{name}-again"
        loaded.save_pretrained(again)
        for path in again.iterdir():
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path.name


@pytest.mark.parametrize("package", ["with", "without"])
def test_a_new_language_model_head_is_whole(package, tmp_path):
    checkpoint(transformers.BertModel, tmp_path / "model", tmp_path)
    code = """
        import sys
        if sys.argv[2] == "without":
            sys.modules["kronecker_transformers"] = None
        else:
            import kronecker_transformers
        import torch, transformers
        for auto_class in ("AutoModelForMaskedLM", "AutoModelForPreTraining"):
            model = getattr(transformers, auto_class).from_pretrained(sys.argv[1], trust_remote_code=True)
            predictions = model.cls.predictions
            assert predictions.bias is predictions.decoder.bias
            assert predictions.decoder.A is model.bert.embeddings.word_embeddings.A
            assert not predictions.bias.any()
            assert not any(p.is_meta for p in model.parameters())
            model.save_pretrained(sys.argv[1] + auto_class)
            again = getattr(transformers, auto_class).from_pretrained(sys.argv[1] + auto_class, trust_remote_code=True)
            assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        print("done")
    """
    process = run(code, tmp_path / "model", package, tmp_path=tmp_path)
    assert process.stdout.strip() == "done", process.stderr[-3000:]


def test_folder_holds_only_what_it_must(tmp_path):
    checkpoint(transformers.BertForMaskedLM, tmp_path / "model", tmp_path)
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {name for name in files if name.endswith(".py")} == code_of("bert")
    assert files - code_of("bert") == {
        "compression.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert "cls.predictions.decoder.A" not in tensors  # tied: stored once


def test_sharded_and_bfloat16(tmp_path):
    model = checkpoint(transformers.GPT2LMHeadModel, tmp_path / "model", tmp_path).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    code = """
        import sys
        sys.modules["kronecker_transformers"] = None
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert model.lm_head.A is model.transformer.wte.A
        torch.save(model.state_dict(), sys.argv[2])
    """
    process = run(code, tmp_path / "sharded", tmp_path / "state.pt", tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    for state in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        kt.KroneckerGPT2LMHeadModel.from_pretrained(tmp_path / "sharded").state_dict(),
    ):
        assert all(value.dtype == torch.bfloat16 for value in state.values())
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_without_trust_it_is_a_clear_error_not_a_stock_bert(tmp_path):
    checkpoint(transformers.BertModel, tmp_path / "model", tmp_path)
    code = """
        import sys
        sys.modules["kronecker_transformers"] = None
        from transformers import AutoModel
        AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
    """
    process = run(code, tmp_path / "model", tmp_path=tmp_path)
    assert process.returncode != 0
    assert "contains custom code which must be executed" in process.stderr
    assert "trust_remote_code=True" in process.stderr


def test_models_of_remote_code_are_not_mistaken_for_ours(tmp_path):
    checkpoint(transformers.BertModel, tmp_path / "model", tmp_path)
    code = """
        import sys
        sys.modules["kronecker_transformers"] = None
        from transformers import AutoModel
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        del sys.modules["kronecker_transformers"]
        import kronecker_transformers as kt
        for function in (kt.to_dense, kt.describe):
            try:
                function(model)
            except ValueError as error:
                assert "import kronecker_transformers before loading it" in str(error), error
            else:
                raise AssertionError(function)
        print("done")
    """
    process = run(code, tmp_path / "model", tmp_path=tmp_path)
    assert process.stdout.strip() == "done", process.stderr[-3000:]


class TestBadCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        checkpoint(transformers.BertForMaskedLM, tmp_path / "model", tmp_path)
        return tmp_path / "model"

    @staticmethod
    def change_plan(folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config["factor_plan"])
        (folder / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize("kept", [0, 6, 100, 4000, -1])
    def test_truncated_weights(self, folder, kept):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:kept])
        with pytest.raises(OSError, match=r"weights in .* are truncated or corrupted .*; copy or download them again"):
            AutoModelForMaskedLM.from_pretrained(folder)

    def test_garbage_for_weights(self, folder):
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 12)
        with pytest.raises(OSError, match="truncated or corrupted"):
            AutoModelForMaskedLM.from_pretrained(folder)

    def test_plan_that_lost_a_layer(self, folder):
        self.change_plan(folder, lambda plan: plan.pop("encoder.layer.*.intermediate.dense"))
        with pytest.raises(
            ValueError, match=r"do not fit the factor plan in its config: .*intermediate.dense.A' is left"
        ):
            AutoModelForMaskedLM.from_pretrained(folder)

    def test_plan_with_a_layer_too_many(self, folder):
        self.change_plan(folder, lambda plan: plan.update({"embeddings.position_embeddings": {"m1": 40, "n1": 4}}))
        with pytest.raises(ValueError, match=r"position_embeddings.A' is missing; restore the config.json"):
            AutoModelForMaskedLM.from_pretrained(folder)

    def test_plan_with_other_shapes(self, folder):
        self.change_plan(folder, lambda plan: plan["encoder.layer.*.intermediate.dense"].update(m1=4))
        with pytest.raises(ValueError, match=r"do not fit the factor plan in its config: .*intermediate.dense.A"):
            AutoModelForMaskedLM.from_pretrained(folder)

    def test_plan_with_other_terms(self, folder):
        self.change_plan(folder, lambda plan: plan["encoder.layer.*.intermediate.dense"].update(terms=2))
        with pytest.raises(ValueError, match=r"do not fit the factor plan in its config: .*intermediate.dense.A"):
            AutoModelForMaskedLM.from_pretrained(folder)

    def test_other_number_of_labels(self, tmp_path):
        checkpoint(transformers.BertForSequenceClassification, tmp_path / "model", tmp_path)
        load = AutoModelForSequenceClassification.from_pretrained
        with pytest.raises(
            RuntimeError, match=r"'classifier.*' .* has shape \(3.*, not \(5.*ignore_mismatched_sizes=True"
        ):
            load(tmp_path / "model", num_labels=5)
        assert load(tmp_path / "model", num_labels=5, ignore_mismatched_sizes=True).classifier.out_features == 5

    @pytest.mark.parametrize(
        "lost", ["encoder.layer.1.output.dense.A", "embeddings.word_embeddings.B", "pooler.dense.A"]
    )
    def test_weights_that_lost_a_factor(self, lost, tmp_path):
        checkpoint(transformers.BertModel, tmp_path / "model", tmp_path)
        weights = tmp_path / "model" / "model.safetensors"
        tensors = load_file(weights)
        del tensors[lost]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{lost}' is missing"):
            AutoModel.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_older_versions_are_told_what_is_needed(family, tmp_path):
    dense_class = transformers.BertForMaskedLM if family == "bert" else transformers.GPT2LMHeadModel
    checkpoint(dense_class, tmp_path / "model", tmp_path)
    code = """
        import sys
        sys.modules["kronecker_transformers"] = None
        import transformers
        for found in ("4.57.6", "5.16.1", "5.0.0rc1"):
            transformers.__version__ = found
            for auto_class in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
                try:
                    getattr(transformers, auto_class).from_pretrained(sys.argv[1], trust_remote_code=True)
                except ImportError as error:
                    assert "transformers >= 5.17, not Python" in str(error) and found in str(error), error
                else:
                    raise AssertionError(auto_class)
        print("done")
    """
    process = run(code, tmp_path / "model", tmp_path=tmp_path)
    assert process.stdout.strip() == "done", process.stderr[-3000:]
    # older versions of transformers copy only the files that the one named in auto_map imports itself
    code = (tmp_path / "model" / f"configuration_kronecker_{family}.py").read_text()
    plans = "kronecker_presets" if family == "bert" else "factor_plan"
    imports = re.findall(r"from \.(\w+) import", code)
    assert imports[0] == "configuration_kronecker"  # which looks at the versions
    assert set(imports) == {"configuration_kronecker", "kronecker_family", plans}
