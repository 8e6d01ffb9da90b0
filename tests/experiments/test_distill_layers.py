"""Distillation into a student with fewer layers: as a dense model first, then factored."""

import json

import pytest
import tiny
import torch
import transformers
from distilling_text import saved_teacher, text_file

from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.cli import main
from kronecker_transformers.experiments.distill import distill
from kronecker_transformers.experiments.training import kept_layers

pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.mark.parametrize(
    "dense_class", [transformers.BertModel, transformers.GPT2LMHeadModel], ids=lambda c: c.__name__
)
def test_a_student_with_fewer_layers(dense_class, tmp_path):
    teacher = saved_teacher(dense_class, tmp_path / "teacher")
    lines = []
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, layers=2, steps=20, show=lines.append)
    assert found.models == ("teacher", "2 layers, dense", "factored", "student")
    whole, dense, factored, student = found.rows["parameters"]
    assert whole > dense > factored == student
    base, _ = load_model(teacher)
    assert base.base_model.num_parameters() / found.model.base_model.num_parameters() == pytest.approx(3, rel=0.1)
    assert found.model.config.num_hidden_layers == 2
    assert found.model.config.model_type.startswith("kronecker_")
    assert sum("Distillation of a dense student with 2 layers: 8 steps" in line for line in lines) == 1
    record = json.loads((tmp_path / "student" / "results.json").read_text())
    assert record["dense_training"]["layers"] == [0, 2]
    assert (record["dense_training"]["steps"], record["training"]["steps"]) == (8, 12)
    assert record["options"]["command"][-4:] == ["--layers", "2", "--steps", "20"]
    assert record["options"]["command"][record["options"]["command"].index("--ratio") + 1] == "3"
    card = (tmp_path / "student" / "README.md").read_text()
    for words in (
        "with 2 of its layers, and with the weights of",
        f"it has {whole / student:.2f} times fewer parameters than its teacher",
        "Before it was factored, trained as a dense model: layers 0, 2 of the teacher, counted from 0; 8 steps",
    ):
        assert words in card
    saved = load_model(tmp_path / "student")[0]
    torch.testing.assert_close(saved.state_dict(), found.model.state_dict(), rtol=0, atol=0)


def test_the_command_of_a_single_layer_names_it(tmp_path):
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    found = distill(teacher, text_file(tmp_path), tmp_path / "a", ratio=4, layers=[2], steps=2)
    command = json.loads((tmp_path / "a" / "results.json").read_text())["options"]["command"]
    assert command[command.index("--layers") + 1] == "2,"
    assert main([*command[1:], "--output", str(tmp_path / "b")]) == 0
    again = load_model(tmp_path / "b")[0]
    torch.testing.assert_close(again.state_dict(), found.model.state_dict(), rtol=0, atol=0)


def test_a_dense_student_comes_nearer_before_it_is_factored(tmp_path):
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    found = distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=2, layers=[0, 2], steps=100)
    record = json.loads((tmp_path / "student" / "results.json").read_text())
    assert record["dense_training"]["layers"] == [0, 2]
    _, dense, factored, student = found.rows["similarity fidelity (Spearman)"]
    assert dense > factored
    assert student > factored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers=0 must be from 1 to 3, the number of the teacher's layers"),
        ({"layers": 4}, "layers=4 must be from 1 to 3"),
        ({"layers": [2, 1]}, r"layers=\[2, 1\] must be layers of the teacher, from 0 to 2, in ascending order"),
        (
            {"layers": 1, "ratio": 1.01},
            r"layers=\[2\] alone makes the model .* times smaller, and ratio=1.01 is no more",
        ),
        ({"layers": 2, "only": "nothing"}, "only='nothing' needs a ratio"),
        ({"layers": 2, "only": "nothing", "ratio": 3}, "only='nothing' matches no module that can be factored"),
        ({"layers": 2, "plan": "9x"}, "plan='9x' is not a preset for bert; choose '7.7x' or '21x'"),
    ],
)
def test_layers_that_cannot_be_are_refused_before_any_training(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("kronecker_transformers.experiments.distill.shallow", lambda *args: pytest.fail("trained"))
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        distill(teacher, text_file(tmp_path), tmp_path / "student", steps=10, **options)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, {"minutes": 12.0}, {"minutes": 18.0}),
        ({"minutes": 5}, {"minutes": 2.0}, {"minutes": 3.0}),
        ({"steps": 7, "learning_rate": 1e-2}, {"steps": 3}, {"steps": 4, "learning_rate": 1e-2}),
    ],
)
def test_both_trainings_share_what_is_asked_for(options, first, second, tmp_path, monkeypatch):
    schedules = []

    def first_training(student, teacher, lesson, schedule, *rest):
        schedules.append(schedule)
        return {}

    def second_training(student, teacher, lesson, schedule, *rest):
        schedules.append(schedule)
        raise InterruptedError

    monkeypatch.setattr("kronecker_transformers.experiments.training.train", first_training)
    monkeypatch.setattr("kronecker_transformers.experiments.distill.train", second_training)
    teacher = saved_teacher(transformers.BertModel, tmp_path / "teacher")
    with pytest.raises(InterruptedError):
        distill(teacher, text_file(tmp_path), tmp_path / "student", ratio=3, layers=2, **options)
    for schedule, wanted in zip(schedules, (first, second), strict=True):
        found = {name: getattr(schedule, name) for name in ("minutes", "steps", "learning_rate")}
        assert {name: value for name, value in found.items() if value is not None} == pytest.approx(wanted)


def test_all_layers_by_number_or_by_name_are_the_default():
    model = transformers.BertModel(transformers.BertConfig(**tiny.BERT_SIZES))
    assert kept_layers(model, None) is kept_layers(model, 3) is kept_layers(model, [0, 1, 2]) is None
    assert (kept_layers(model, 2), kept_layers(model, 1), kept_layers(model, [0, 1])) == ([0, 2], [2], [0, 1])
