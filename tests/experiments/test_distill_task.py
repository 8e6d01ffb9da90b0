"""Distillation of a classifier on the texts of a task."""

import pytest
import transformers
from distilling_text import saved_teacher, text_file

from kronecker_transformers.cli import main
from kronecker_transformers.experiments.distill import distill
from kronecker_transformers.experiments.lessons import task_lesson
from kronecker_transformers.tasks.text import WHOLE, Share

pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.fixture
def glue(tmp_path):
    """A folder with a small SST-2."""
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    lines = text_file(tmp_path).read_text().splitlines()
    rows = [f"{line}\t{index % 2}" for index, line in enumerate(lines)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows[:200]]) + "\n")
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[200:]]) + "\n")
    return tmp_path / "glue"


def classifier(folder, *names, dense_class=transformers.BertForSequenceClassification):
    """A saved teacher with classes of these names."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return saved_teacher(dense_class, folder, **labels)


def test_a_classifier_learns_a_task(glue, tmp_path, capsys):
    teacher = classifier(tmp_path / "teacher", "negative", "positive")
    found = distill(teacher, output=tmp_path / "student", task="sst2", data_dir=str(glue), ratio=3, steps=12)
    assert list(found.rows)[3:] == ["labels as the teacher's", "accuracy"]
    weights = found.training["objective"]
    assert set(weights) == {"embedding_mse", "attention_mse", "hidden_mse", "logits"}  # augmented texts have no labels
    assert len(set(weights.values())) > 1  # balanced
    command = ["distill", teacher, "--task", "sst2", "--data", glue, "--steps", "12", "--ratio", "3"]
    assert main([*map(str, command), "--output", str(tmp_path / "again")]) == 0
    assert "accuracy" in capsys.readouterr().out
    encoder = saved_teacher(transformers.BertModel, tmp_path / "encoder")
    with pytest.raises(ValueError, match="is no classifier yet; fine-tune it first"):
        distill(encoder, output=tmp_path / "third", task="sst2", data_dir=str(glue))


def test_a_task_of_pairs_is_calibrated_on_pairs(tmp_path):
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    lines = text_file(tmp_path).read_text().splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    rows = [f"{i}\t{one}\t{other}\t{('entailment', 'not_entailment')[i % 2]}" for i, (one, other) in enumerate(pairs)]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    teacher = classifier(tmp_path / "teacher", "entailment", "not_entailment")
    _, _, lesson = task_lesson(str(teacher), "rte", str(tmp_path / "glue"))
    assert lesson.calibration == pairs[:512]
    found = distill(teacher, output=tmp_path / "student", task="rte", data_dir=str(tmp_path / "glue"), ratio=3, steps=2)
    assert "accuracy" in found.rows


def test_half_of_a_tasks_rows_are_augmented_anew_in_each_epoch(glue, tmp_path):
    teacher = classifier(tmp_path / "teacher", "negative", "positive")
    _, tokenizer, lesson = task_lesson(str(teacher), "sst2", str(glue))
    lines = [line.split("\t")[0] for line in (glue / "SST-2" / "train.tsv").read_text().splitlines()[1:]]
    own = {tuple(tokenizer(line).input_ids) for line in lines}
    passes = [[tuple(example["input_ids"]) for example in lesson.examples(seed, WHOLE)] for seed in (0, 0, 1)]
    assert passes[0] == passes[1]
    augmented = [set(rows) - own for rows in passes]
    assert len(passes[2]) == len(lines) == 200
    assert all(60 < len(rows) < 140 for rows in augmented)
    assert len(augmented[0] & augmented[2]) < 20
    assert set(next(iter(lesson.examples(0, WHOLE)))) == {"input_ids", "token_type_ids", "attention_mask"}
    shares = [list(lesson.examples(0, Share(index, 2))) for index in range(2)]
    assert [len(share) for share in shares] == [100, 100]


def test_a_text_without_tokens_is_refused_before_any_training(glue, tmp_path, monkeypatch):
    names = "negative", "positive"
    teacher = classifier(tmp_path / "teacher", *names, dense_class=transformers.GPT2ForSequenceClassification)
    path = glue / "SST-2" / "train.tsv"
    path.write_text(path.read_text() + "\t1\n")
    monkeypatch.setattr("kronecker_transformers.experiments.distill.compress", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="text '' gives no token"):
        distill(teacher, output=tmp_path / "student", task="sst2", data_dir=str(glue), steps=2)
    assert not (tmp_path / "student").exists()
