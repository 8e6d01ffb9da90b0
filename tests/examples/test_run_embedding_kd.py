from itertools import pairwise

import pytest
import tiny
from examples_runner import run_example
from transformers import AutoModel, BertModel

SENTENCES = ["the quick brown fox", "a lazy dog jumps over a small model", "what a large model knows", "the dog"] * 5


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    tokenizer = tiny.bert_tokenizer(folder)
    tiny.teacher(BertModel, vocab_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_end_to_end(teacher, tmp_path, capsys):
    text = tmp_path / "train.txt"
    text.write_text("\n".join(SENTENCES))
    sts = tmp_path / "sts.csv"
    rows = [f"{a},{b},{i}.5" for i, (a, b) in enumerate(pairwise(SENTENCES[:5]))]
    sts.write_text("\n".join(["sentence1,sentence2,label", *rows]))
    plan = tmp_path / "plan.yaml"
    plan.write_text("encoder.layer.*.intermediate.dense: {m1: 4, n1: 2}\n")
    results = run_example(
        "run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[text], validation_text=[text], sts_file=sts,
        plan=plan, per_device_train_batch_size=4,
    )  # fmt: skip
    assert results["training"]["samples"] == 12
    assert results["rows"]["similarity fidelity (Spearman)"][0] == pytest.approx(1)
    assert results["rows"]["parameters"][2] < results["rows"]["parameters"][0]
    student = AutoModel.from_pretrained(tmp_path / "out" / "student")
    assert type(student).__name__ == "KroneckerBertModel"
    assert "similarity fidelity" in capsys.readouterr().out
