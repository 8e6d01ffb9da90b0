import json
import shutil
from itertools import pairwise

import pytest
import tiny
import torch
from examples_runner import run_example
from scipy.stats import spearmanr
from transformers import AutoModel, BertForMaskedLM, BertModel

from kronecker_transformers import compress
from kronecker_transformers.distillation import DistillationTrainer
from kronecker_transformers.tasks.augmentation import Augmentation
from kronecker_transformers.tasks.sentences import encode

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
    plan.write_text("embeddings.word_embeddings: {m1: 64, n1: 4}\nencoder.layer.*.attention.*: {m1: 8, n1: 8}\n")
    results = run_example(
        "run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[text], validation_text=[text], sts_file=sts,
        plan=plan, per_device_train_batch_size=4, max_steps=60, learning_rate=1e-2, augmented=0,
    )  # fmt: skip
    assert results["training"]["samples"] == 240
    exact, undistilled, distilled = results["rows"]["similarity fidelity (Spearman)"]
    assert exact == pytest.approx(1)
    assert undistilled < distilled
    assert results["rows"]["parameters"][2] < results["rows"]["parameters"][0]
    student = AutoModel.from_pretrained(tmp_path / "out" / "student")
    assert type(student).__name__ == "KroneckerBertModel"
    assert "similarity fidelity" in capsys.readouterr().out
    first, second = (encode(student.eval(), tiny.bert_tokenizer(tmp_path), SENTENCES[i : i + 4]) for i in (0, 1))
    expected = spearmanr((first * second).sum(-1), range(4)).statistic
    assert results["rows"]["STS, Spearman"][2] == pytest.approx(expected)


def test_a_calibrated_start_is_that_of_compress(teacher, tmp_path, monkeypatch):
    text, plan = tmp_path / "train.txt", {"encoder.layer.*.attention.self.*": (8, 8)}
    text.write_text("\n".join(2 * SENTENCES))
    (tmp_path / "plan.json").write_text(json.dumps({name: {"m1": 8, "n1": 8} for name in plan}))
    starts = []

    class Distillation(DistillationTrainer):
        def __init__(self, student, *args, **options):
            starts.append({name: value.clone() for name, value in student.state_dict().items()})
            super().__init__(student, *args, **options)

    monkeypatch.setattr("kronecker_transformers.distillation.DistillationTrainer", Distillation)
    run_example(
        "run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[text], plan=tmp_path / "plan.json",
        calibration=text, calibration_texts=35, per_device_train_batch_size=4, max_steps=1,
    )  # fmt: skip
    expected = compress(teacher, plan, calibration=(2 * SENTENCES)[:35]).model.state_dict()
    assert expected.keys() == starts[0].keys()
    for name, value in expected.items():
        torch.testing.assert_close(starts[0][name], value, msg=lambda m, n=name: f"{n}: {m}")
    nearest = compress(teacher, plan).model.state_dict()
    assert any(not torch.equal(nearest[name], value) for name, value in expected.items())


def test_a_teacher_with_a_head_teaches_without_it_for_an_epoch(tmp_path):
    tokenizer = tiny.bert_tokenizer(tmp_path)
    tiny.teacher(BertForMaskedLM).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    text, plan = tmp_path / "train.txt", tmp_path / "plan.yaml"
    text.write_text("\n".join(SENTENCES))
    plan.write_text("encoder.layer.*.intermediate.dense: {m1: 4, n1: 2}\n")
    results = run_example(
        "run_embedding_kd", tmp_path / "out", teacher=tmp_path / "teacher", train_text=[text], plan=plan,
        per_device_train_batch_size=4, max_steps=-1, num_train_epochs=1, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    assert results["training"]["samples"] == len(SENTENCES)
    assert type(AutoModel.from_pretrained(tmp_path / "out" / "student")).__name__ == "KroneckerBertModel"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validation_text": ["missing.txt"]}, FileNotFoundError, r"'missing\.txt' does not exist"),
        ({"sts_file": "missing.csv"}, FileNotFoundError, r"'missing\.csv' does not exist"),
        ({"sts_file": "pairs.csv"}, ValueError, r"'pairs\.csv' lacks the column 'label'; it has sentence1, sentence2"),
        ({"sts_file": "words.csv"}, ValueError, r"'words\.csv' has the label 'near'; labels are numbers"),
        ({"supervised_weight": 1}, ValueError, "supervised_weight=1.0 needs a student with a head"),
        ({"save_strategy": "epoch"}, ValueError, "--save_strategy epoch: a stream of examples has no end of an epoch"),
    ],
)
def test_bad_input_is_refused_before_the_training(teacher, tmp_path, options, error, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DistillationTrainer, "__init__", lambda *_, **__: pytest.fail("training began"))
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2\na,b\n")
    (tmp_path / "words.csv").write_text("sentence1,sentence2,label\na,b,near\n")
    (tmp_path / "train.txt").write_text("\n".join(SENTENCES))
    with pytest.raises(error, match=message):
        run_example(
            "run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[tmp_path / "train.txt"], **options
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("augmented", [None, 0])
def test_sentences_are_augmented_from_the_second_epoch_on(augmented, teacher, tmp_path, monkeypatch):
    made, text = [], Augmentation.text
    monkeypatch.setattr(Augmentation, "text", lambda *given: made.append(text(*given)) or made[-1])
    (tmp_path / "train.txt").write_text("\n".join(SENTENCES))
    plan = tmp_path / "plan.yaml"
    plan.write_text("encoder.layer.*.attention.*: {m1: 8, n1: 8}\n")
    found = []
    for steps in (3, 16):  # of five sentences, of 20
        results = run_example(
            "run_embedding_kd", tmp_path / f"{steps}", teacher=teacher, train_text=[tmp_path / "train.txt"], plan=plan,
            per_device_train_batch_size=5, max_steps=steps, **({} if augmented is None else {"augmented": augmented}),
        )  # fmt: skip
        assert results["options"]["augmented"] == (0.5 if augmented is None else augmented)
        found.append(len(made))
    assert found[0] == 0
    assert (found[1] > 0) == (augmented is None)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_stopped_among_augmented_sentences_goes_on(workers, teacher, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "plan.yaml").write_text("encoder.layer.*.attention.*: {m1: 8, n1: 8}\n")
    options = {
        "teacher": teacher, "train_text": [tmp_path / "train.txt"], "plan": tmp_path / "plan.yaml", "max_steps": 14,
        "per_device_train_batch_size": 4, "save_steps": 7, "dataloader_num_workers": workers, "apart": workers > 0,
    }  # fmt: skip
    for folder in ("whole", "parts"):
        run_example("run_embedding_kd", tmp_path / folder, **options)
    weights = {name: tmp_path / name / "student" / "model.safetensors" for name in ("whole", "parts")}
    shutil.rmtree(tmp_path / "parts" / "student")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "checkpoint-14")
    (tmp_path / "parts" / "results.json").unlink()
    run_example("run_embedding_kd", tmp_path / "parts", **options, resume_from_checkpoint="true")
    assert weights["parts"].read_bytes() == weights["whole"].read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"augmented": 1.5}, "--augmented 1.5 must be from 0 to 1"),
     ({"validation_lines": 2}, "--validation_lines 2 must be at least 3")],
)  # fmt: skip
def test_values_out_of_range_are_refused(options, message, teacher, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_example("run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[teacher], **options)
    assert message in capsys.readouterr().err


def test_a_search_on_too_little_text_is_refused(teacher, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="calibration text of 0 texts"):
        run_example("run_embedding_kd", tmp_path / "out", teacher=teacher, train_text=[tmp_path / "empty.txt"])
