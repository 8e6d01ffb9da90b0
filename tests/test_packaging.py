import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "kronecker_transformers", source / "kronecker_transformers")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "kronecker_transformers").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"kronecker_transformers/py.typed", "kronecker_transformers/hub/card.md"} < files
    assert files <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


def test_wheel_works_outside_the_source_tree(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
        import kronecker_transformers as kt, transformers
        sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=1)
        config = transformers.BertConfig(**sizes)
        result = kt.compress(transformers.BertModel(config), "7.7x")
        result.save_pretrained("student")
        assert type(transformers.AutoModel.from_pretrained("student")) is kt.KroneckerBertModel
        from kronecker_transformers.hub.card import model_card
        from kronecker_transformers.recipes import RECIPES
        assert "kroneckerbert-7.7x" in RECIPES and "# tiny" in str(model_card("student", "org/tiny"))
        print(kt.__file__)
    """
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert Path(process.stdout.strip()).is_relative_to(site)


def test_constraints_satisfy_the_ranges_and_cover_them():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    needed = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    needed += setup["options.extras_require"]["demo"]
    for requirement in map(Requirement, filter(None, needed.splitlines())):
        name = canonicalize_name(requirement.name)
        assert name in pinned, name
        assert requirement.specifier.contains(pinned[name]), requirement


def test_importing_the_package_loads_models_only():
    """All else is loaded when it is used: an import costs what torch and the models of transformers cost."""
    code = """
        import sys, torch
        from transformers import BertModel, GPT2Model
        before = set(sys.modules)
        import kronecker_transformers as kt
        loaded = {name.split(".")[1] for name in sys.modules if name.startswith("kronecker_transformers.")}
        assert loaded == {"models"}, loaded
        assert not {"datasets", "evaluate", "matplotlib", "rich"} & (set(sys.modules) - before)
        assert set(kt.__all__) <= {name for name in kt.__all__ if getattr(kt, name) is not None}
        assert callable(kt.distill) and callable(kt.compress)
        print("done")
    """
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.stdout.strip() == "done", process.stderr[-2000:]
