"""A further family in one file: compressed, calibrated, distilled, published, and loaded without the package."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers

FAMILY = Path(__file__).parent / "families" / "modeling_kronecker_camembert.py"
CLASSES = {"CamembertModel": "AutoModel", "CamembertForMaskedLM": "AutoModelForMaskedLM"}
WITHOUT = """
import sys
sys.modules["kronecker_transformers"] = None
import torch, transformers
folder, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
example = torch.load(f"{folder}/../{auto}.pt", weights_only=True)
with torch.no_grad():
    torch.testing.assert_close(model(**example["inputs"])[0], example["output"], rtol=1e-5, atol=1e-5)
print(type(model).__name__, type(model).__module__.split(".")[0])
"""


def run(*command, folder):
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)], env=environment, capture_output=True, text=True,
        cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.slow
def test_a_family_is_one_file(tmp_path):
    assert len(FAMILY.read_text().splitlines()) < 80
    assert run(__file__, tmp_path, folder=tmp_path)[-1] == "done"
    for name, auto in CLASSES.items():
        found = run("-c", WITHOUT, tmp_path / auto, auto, folder=tmp_path)
        assert found == [f"Kronecker{name}", "transformers_modules"]


def register(folder):
    """As if the file lay beside those of the other families."""
    import kronecker_transformers.models as hub_set

    for path in [*Path(hub_set.__file__).parent.glob("*.py"), FAMILY]:
        shutil.copy(path, folder)
    name = f"kronecker_transformers.models.{FAMILY.stem}"
    spec = importlib.util.spec_from_file_location(name, folder / FAMILY.name)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def scenario(folder):
    import tiny
    from distilling import make_trainer
    from examples_runner import run_example
    from loopback_hub import Hub

    import kronecker_transformers as kt
    from kronecker_transformers.checkpoint.load import load_student
    from kronecker_transformers.distillation import keep_layers
    from kronecker_transformers.evaluation.timing import benchmark

    (folder / "hub_set").mkdir()
    register(folder / "hub_set")
    tokenizer = tiny.bert_tokenizer(folder)
    words = tiny.TEXT.split()
    texts = [" ".join(words[i % 7 :][: 5 + i % 9]) for i in range(60)]
    for name, auto in CLASSES.items():
        torch.manual_seed(0)
        config = transformers.CamembertConfig(**tiny.BERT_SIZES, pad_token_id=0, type_vocab_size=1, num_labels=3)
        teacher = tiny.perturb(getattr(transformers, name)(config)).eval()
        batch = tiny.inputs(teacher)
        # searched and calibrated; and what is exact is the teacher
        result = kt.compress(teacher, "search", ratio=2, calibration=texts, tokenizer=tokenizer)
        assert result.report.factored.parameters < teacher.num_parameters() / 1.7
        assert any(layer.output_error is not None for layer in result.report.layers)
        exact = {"encoder.layer.*.attention.self.*": (32, 1, 32), "encoder.layer.1.intermediate.dense": (96, 1, 32)}
        with torch.no_grad():
            student = kt.compress(teacher, exact).model
            torch.testing.assert_close(student(**batch)[0], teacher(**batch)[0], rtol=1e-4, atol=1e-4)
            twin = kt.to_dense(result.model)
            assert type(twin) is type(teacher)
            torch.testing.assert_close(twin(**batch)[0], result.model(**batch)[0], rtol=1e-4, atol=1e-4)
        # distilled by every loss; the teacher is no distance from itself
        trained = kt.compress(teacher, "7.7x").model.requires_grad_(True)
        trainer = make_trainer(trained, teacher, folder / "run", max_steps=20)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.9 * losses[0], losses
        log = trainer.state.log_history[0]
        assert {"embedding_mse", "attention_mse", "attention_kl", "hidden_mse"} <= trainer.args.weights().keys()
        assert trainer.args.weights().keys() <= log.keys()
        assert keep_layers(teacher, [0, 2]).config.num_hidden_layers == 2
        assert benchmark(trained, teacher, length=8, rounds=2).speedup > 0
        # saved, published, loaded
        place = folder / auto
        result.save_pretrained(place)
        loaded, _ = load_student(place)
        with torch.no_grad():
            output = loaded(**batch)[0]
        torch.testing.assert_close(output, result.model(**batch)[0].detach())
        torch.save({"inputs": batch, "output": output}, folder / f"{auto}.pt")
        with Hub(tokens=("hf_good",)) as hub, patch.multiple(
            "huggingface_hub.constants", ENDPOINT=hub.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True
        ):  # fmt: skip
            assert result.push_to_hub(f"org/{name}", token="hf_good").is_new
            files = hub.repo(f"org/{name}").files()
            assert {"README.md", "model.safetensors", FAMILY.name, "kronecker_family.py"} <= set(files)
            assert name.encode() in files["README.md"]
        if name != "CamembertModel":
            continue
        # taught on masked text, with a head that is made for it
        teacher.save_pretrained(folder / f"{name}-teacher")
        tokenizer.save_pretrained(folder / f"{name}-teacher")
        (folder / "text.txt").write_text("\n\n".join("\n".join(texts[i : i + 4]) for i in range(0, 60, 4)))
        options = {"teacher": folder / f"{name}-teacher", "train_text": folder / "text.txt", "max_length": 24}
        results = run_example("run_mlm_kd", folder / f"{name}-mlm", disable_tqdm=True, train_heads=2, **options)
        assert any("no model of the family of Camembert" in note for note in results["notes"])
        student, _ = load_student(folder / f"{name}-mlm" / "student")
        assert type(student).__name__ == "KroneckerCamembertForMaskedLM"
    print("done")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    scenario(Path(sys.argv[1]))
