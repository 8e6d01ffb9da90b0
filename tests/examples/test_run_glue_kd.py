import shutil

import pytest
import tiny
from examples_runner import load_example, run_example
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel, GPT2Model

BERT_PLAN = "encoder.layer.*.intermediate.dense: {m1: 4, n1: 2}\nembeddings.word_embeddings: {m1: 64, n1: 8}\n"
GPT2_PLAN = "wte: {m1: 72, n1: 16}\nh.1.mlp.c_proj: {m1: 16, n1: 96}\n"
WORDS = tiny.TEXT.split()


def sentence(i):
    return " ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(2 + i % 7))


@pytest.fixture
def workplace(tmp_path):
    """Plans, an SST-2 folder as GLUE has it, and files of one's own."""
    (tmp_path / "bert.yaml").write_text(BERT_PLAN)
    (tmp_path / "gpt2.yaml").write_text(GPT2_PLAN)
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name, rows in (("train", 16), ("dev", 6)):
        lines = ["sentence\tlabel", *(f"{sentence(i)} \t{i % 2}" for i in range(rows))]
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    (folder / "test.tsv").write_text("\n".join(["index\tsentence", *(f"{i}\t{sentence(i)}" for i in range(5))]))
    for name, rows in (("train", 12), ("dev", 6)):
        lines = ["sentence1,sentence2,label"]
        lines += [f"{sentence(i)},{sentence(i + 1)},{'abc'[i % 3]}" for i in range(rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        lines = ["text,label", *(f"{sentence(i)},{i / 4}" for i in range(rows))]
        (tmp_path / f"{name}_scores.csv").write_text("\n".join(lines))
    return tmp_path


def save_teacher(folder, dense_class, **changes):
    folder.mkdir()
    tokenizer = (tiny.bert_tokenizer if "Bert" in dense_class.__name__ else tiny.gpt2_tokenizer)(folder)
    tiny.teacher(dense_class, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_glue_task_with_a_teacher_that_is_fine_tuned_first(workplace, capsys):
    teacher = save_teacher(workplace / "teacher", BertModel)
    out = workplace / "out"
    results = run_example(
        "run_glue_kd", out, teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
        plan=workplace / "bert.yaml", teacher_epochs=1, per_device_train_batch_size=4,
    )  # fmt: skip
    assert results["training"] == {**results["training"], "steps": 3, "samples": 12}
    assert 12 * 4 < results["training"]["tokens"] < 12 * 11  # padding is not counted
    assert set(results["metrics"]) == {"teacher", "student, undistilled", "student"}
    assert all(0 <= found["accuracy"] <= 1 for found in results["metrics"].values())
    fine_tuned = AutoModelForSequenceClassification.from_pretrained(out / "teacher")
    student = AutoModelForSequenceClassification.from_pretrained(out / "student")
    assert fine_tuned.config.id2label == student.config.id2label == {0: "negative", 1: "positive"}
    assert student.num_parameters() == results["parameters"][2] < results["parameters"][0]
    lines = (out / "SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}
    assert "retained, %" in capsys.readouterr().out
    # once more with the fine-tuned teacher: an output folder is not overwritten, and a finished run not gone on with
    again = {"teacher": out / "teacher", "task_name": "sst2", "data_dir": workplace / "glue"}
    for resume in ({}, {"resume_from_checkpoint": "true"}):
        with pytest.raises(FileExistsError, match="already holds something"):
            run_example("run_glue_kd", out, **again, **resume)


def test_resumed_run_goes_on(workplace):
    teacher = save_teacher(workplace / "teacher", BertModel)
    arguments = {
        "teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue", "plan": workplace / "bert.yaml",
        "teacher_epochs": 1, "per_device_train_batch_size": 4, "save_steps": 2,
    }  # fmt: skip
    whole = run_example("run_glue_kd", workplace / "whole", **arguments, max_steps=4)
    run_example("run_glue_kd", workplace / "parts", **arguments, max_steps=4)
    shutil.rmtree(workplace / "parts" / "student")
    shutil.rmtree(workplace / "parts" / "checkpoints" / "checkpoint-4")
    (workplace / "parts" / "results.json").unlink()
    resumed = run_example("run_glue_kd", workplace / "parts", **arguments, max_steps=4, resume_from_checkpoint="true")
    assert resumed["training"]["steps"] == 4
    assert resumed["metrics"] == whole["metrics"]
    assert (workplace / "parts" / "student" / "model.safetensors").read_bytes() == (
        workplace / "whole" / "student" / "model.safetensors"
    ).read_bytes()


def test_files_of_ones_own_with_gpt2_and_an_earlier_student(workplace):
    teacher = save_teacher(workplace / "teacher", GPT2Model)
    arguments = {
        "teacher": teacher, "train_file": workplace / "train.csv", "validation_file": workplace / "dev.csv",
        "recipe": "kngpt2", "per_device_train_batch_size": 4, "teacher_epochs": 1,
    }  # fmt: skip
    results = run_example("run_glue_kd", workplace / "first", **arguments, plan=workplace / "gpt2.yaml")
    assert set(results["metrics"]["student"]) == {"accuracy"}
    student = AutoModelForSequenceClassification.from_pretrained(workplace / "first" / "student")
    assert type(student).__name__ == "KroneckerGPT2ForSequenceClassification"
    assert list(student.config.id2label.values()) == ["a", "b", "c"]
    again = run_example("run_glue_kd", workplace / "second", **arguments, start=workplace / "first" / "student")
    assert again["parameters"] == results["parameters"]


def test_samples_are_counted_as_they_come_and_a_run_resumes_before_its_first_checkpoint(workplace):
    teacher = save_teacher(workplace / "teacher", BertModel)
    arguments = {
        "teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue", "plan": workplace / "bert.yaml",
        "teacher_epochs": 1, "per_device_train_batch_size": 3, "max_steps": 7, "save_strategy": "no",
    }  # fmt: skip
    results = run_example("run_glue_kd", workplace / "out", **arguments)
    assert results["training"]["samples"] == 16 + 3  # six batches make an epoch, the last of them of one example
    shutil.rmtree(workplace / "out" / "student")
    again = run_example("run_glue_kd", workplace / "out", **arguments, resume_from_checkpoint="true")
    assert again["metrics"] == results["metrics"]


def test_teacher_alone(workplace):
    teacher = save_teacher(workplace / "teacher", BertModel)
    arguments = {
        "task_name": "sst2", "data_dir": workplace / "glue", "teacher_epochs": 1, "per_device_train_batch_size": 4,
        "plan": workplace / "bert.yaml",
    }  # fmt: skip
    alone = run_example("run_glue_kd", workplace / "alone", teacher=teacher, teacher_only=True, **arguments)
    assert set(alone["metrics"]) == {"teacher"}
    assert not (workplace / "alone" / "student").exists()
    both = run_example("run_glue_kd", workplace / "both", teacher=teacher, **arguments)
    later = run_example("run_glue_kd", workplace / "later", teacher=workplace / "alone" / "teacher", **arguments)
    assert alone["metrics"]["teacher"] == both["metrics"]["teacher"] == later["metrics"]["teacher"]
    weights = [(workplace / name / "teacher" / "model.safetensors").read_bytes() for name in ("alone", "both")]
    assert weights[0] == weights[1]


def test_regression(workplace):
    teacher = save_teacher(workplace / "teacher", BertModel)
    results = run_example(
        "run_glue_kd", workplace / "out", teacher=teacher, train_file=workplace / "train_scores.csv",
        validation_file=workplace / "dev_scores.csv", plan=workplace / "bert.yaml", per_device_train_batch_size=4,
    )  # fmt: skip
    assert set(results["metrics"]["student"]) == {"pearson", "spearmanr"}


def test_clear_errors(workplace, capsys):
    teacher = save_teacher(workplace / "teacher", BertForSequenceClassification)
    glue = {"teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue"}
    with pytest.raises(ValueError, match="has the labels negative, neutral, positive, where the task has neg"):
        run_example("run_glue_kd", workplace / "out", **glue)
    for arguments, message in (
        ({"teacher": teacher}, "give either --task_name or both --train_file and --validation_file"),
        ({**glue, "recipe": "kronecker"}, "--recipe 'kronecker' is not known for this stage; choose one of"),
        ({**glue, "hidden_weight": 1}, "unknown option '--hidden_weight'"),
        ({**glue, "temperature": -1}, "temperature=-1.0 must be a finite number > 0"),
    ):
        with pytest.raises(SystemExit):
            run_example("run_glue_kd", workplace / "out", **arguments)
        assert message in capsys.readouterr().err
    assert not (workplace / "out").exists()


def test_help_is_short_and_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        load_example("run_glue_kd").main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 60
    assert "kroneckerbert-7.7x, kroneckerbert-21x, kngpt2" in text
    with pytest.raises(SystemExit):
        load_example("run_glue_kd").main(["--teacher", "x", "--output_dir", "y", "--help_training"])
    assert "--attention_mse_weight" in capsys.readouterr().out
