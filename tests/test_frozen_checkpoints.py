"""Checkpoints that version 0.1 wrote, with inputs and outputs, open for good: with this package, and with their code.

They are of all twelve classes: with and without a pooler, tied, untied and dense heads, sharded, in bfloat16, low rank,
several terms. They are never written again. The Python files of each, the same in all, lie in the folder code.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

if __name__ == "__main__":
    sys.modules["kronecker_transformers"] = None  # importing it fails
else:
    from kronecker_transformers.models import DENSE_CLASSES

DATA = Path(__file__).parent / "data" / "v0.1"
FOLDERS = sorted(path for path in DATA.iterdir() if path.name != "code")


def check(folder, scratch):
    """Every value as it was saved, outputs but for rounding, and the same again after saving."""
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    auto = next(name for name, reference in config["auto_map"].items() if reference.endswith(f".{architecture}"))
    saved = {}
    for path in folder.glob("model*.safetensors"):
        saved |= load_file(path)
    example = load_file(folder / "example.safetensors")
    choices = {"add_pooling_layer": False} if folder.name.endswith("-without-pooler") else {}
    saved_again = scratch / "again" / folder.name
    folder = assembled(folder, scratch)
    for place in (folder, saved_again):
        model, info = getattr(transformers, auto).from_pretrained(
            place, trust_remote_code=True, dtype="auto", output_loading_info=True, **choices
        )
        assert type(model).__name__ == architecture
        assert not any(info.values()), info
        state = model.state_dict()
        for key, value in saved.items():
            assert state[key].dtype == value.dtype, key
            assert torch.equal(state[key], value), key
        tied = set(state) - set(saved)
        assert all(key.startswith(("lm_head.", "cls.predictions.decoder.")) for key in tied), tied
        with torch.no_grad():
            outputs = model(**{k[7:]: v for k, v in example.items() if k.startswith("inputs.")})
        tolerance = 5e-2 if model.dtype == torch.bfloat16 else 1e-5
        for key, value in outputs.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, example[f"outputs.{key}"], rtol=tolerance, atol=tolerance)
        if place == folder:
            model.save_pretrained(saved_again)
    return type(model)


def assembled(folder, scratch):
    """The checkpoint as it was written, with its Python files."""
    place = shutil.copytree(folder, scratch / folder.name)
    family = folder.name.partition("-")[0]
    for path in (DATA / "code").iterdir():
        if not path.stem.endswith(("_bert", "_gpt2")) or path.stem.endswith(family):
            shutil.copy(path, place)
    return place


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_with_the_package(folder, tmp_path):
    assert check(folder, tmp_path).__module__.startswith("kronecker_transformers.models.")


def test_without_the_package(tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "ignore", __file__, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [path.name for path in FOLDERS], done.stderr[-3000:]


def test_every_class_is_among_them():
    found = {json.loads((path / "config.json").read_text())["architectures"][0] for path in FOLDERS}
    classes = {cls.__name__ for cls in DENSE_CLASSES}
    assert len(found) == 12
    assert found <= classes


if __name__ == "__main__":
    for checkpoint in FOLDERS:
        assert check(checkpoint, Path(sys.argv[1])).__module__.startswith("transformers_modules."), checkpoint
        print(checkpoint.name)
