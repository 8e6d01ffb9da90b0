import json
import math
import shutil

import pytest
import tiny
import torch
from examples_runner import load_example, run_example
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2ForQuestionAnswering,
    GPT2Model,
)

from kronecker_transformers.tasks.squad import evaluation_features, read_squad_file, training_features
from kronecker_transformers.tasks.squad_answers import answers_from_logits

BERT_PLAN = "encoder.layer.*.intermediate.dense: {m1: 4, n1: 2}\nembeddings.word_embeddings: {m1: 64, n1: 8}\n"
GPT2_PLAN = "wte: {m1: 72, n1: 16}\nh.1.mlp.c_proj: {m1: 16, n1: 96}\n"
MODELS = {"teacher", "student, undistilled", "student"}
COMMON = {"max_length": 18, "stride": 4, "per_device_train_batch_size": 4, "teacher_epochs": 1}
WORDS = tiny.TEXT.split()


def question(i, impossible):
    """A question on `TEXT`, of two to four words; the answer is two or three words."""
    answer = " ".join(WORDS[i : i + 2 + i % 2])
    answers = [] if impossible else [{"text": answer, "answer_start": tiny.TEXT.index(answer)}]
    return {"id": f"q{i}", "question": " ".join(WORDS[-2 - i % 3 :]), "answers": answers, "is_impossible": impossible}


def squad_file(path, version, questions):
    """Every fourth question of version 2.0 is impossible."""
    qas = [question(i, version == "v2.0" and i % 4 == 3) for i in range(1, questions + 1)]
    data = [{"title": "Fox", "paragraphs": [{"context": tiny.TEXT, "qas": qas}]}]
    path.write_text(json.dumps({"version": version.removeprefix("v1.1") or "1.1", "data": data}))


@pytest.fixture
def workplace(tmp_path):
    """Plans and the official files of both versions."""
    (tmp_path / "bert.yaml").write_text(BERT_PLAN)
    (tmp_path / "gpt2.yaml").write_text(GPT2_PLAN)
    for version in ("v1.1", "v2.0"):
        squad_file(tmp_path / f"train-{version}.json", version, 12)
        squad_file(tmp_path / f"dev-{version}.json", version, 7)
    return tmp_path


def save_teacher(folder, dense_class, **changes):
    folder.mkdir()
    tokenizer = tiny.tokenizer_for(tiny.model_type(dense_class), folder)
    tiny.teacher(dense_class, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check_results(folder, results, metrics):
    """The figures are sane and every question has its prediction."""
    assert set(results["metrics"]) == MODELS
    for found in results["metrics"].values():
        assert set(found) == metrics
        assert all(0 <= value <= 100 for value in found.values())
    teacher, undistilled, student = results["parameters"]
    assert student == undistilled < teacher
    predictions = json.loads((folder / "predictions.json").read_text())
    assert list(predictions) == [f"q{i}" for i in range(1, 8)]
    assert all(text in tiny.TEXT for text in predictions.values())
    assert not list(folder.glob(".*"))
    return predictions


def test_squad_1_with_a_fine_tuned_teacher(workplace, capsys):
    teacher = save_teacher(workplace / "answerer", BertForQuestionAnswering)
    out = workplace / "out"
    arguments = {**COMMON, "teacher": teacher, "data_dir": workplace, "plan": workplace / "bert.yaml"}
    results = run_example("run_squad_kd", out, **arguments, eval_strategy="epoch", max_train_samples=11)
    predictions = check_results(out, results, {"exact_match", "f1"})
    assert all(predictions.values())  # in version 1.1 every question is answered
    assert results["training"]["steps"] == 3
    assert results["training"]["samples"] == 12
    assert 12 * 8 < results["training"]["tokens"] < 12 * 18  # padding is not counted
    assert "tuned_on_validation" not in results
    assert not (out / "teacher").exists()
    student = AutoModelForQuestionAnswering.from_pretrained(out / "student")
    assert type(student).__name__ == "KroneckerBertForQuestionAnswering"
    assert student.num_parameters() == results["parameters"][2]
    # what was saved is what has answered
    held_out, tokenizer = read_squad_file(workplace / "dev-v1.1.json"), AutoTokenizer.from_pretrained(out / "student")
    windows = evaluation_features(held_out[:], tokenizer, COMMON["max_length"], COMMON["stride"])
    with torch.no_grad():
        outputs = [student(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
                   for ids, types in zip(windows["input_ids"], windows["token_type_ids"], strict=True)]  # fmt: skip
    rows = [{name: windows[name][i] for name in ("example_id", "offset_mapping")} for i in range(len(outputs))]
    start, end = ([output[name][0] for output in outputs] for name in ("start_logits", "end_logits"))
    assert len(rows) > len(held_out)
    assert answers_from_logits(held_out, rows, start, end, no_answer_threshold=None).predictions == predictions
    shown = capsys.readouterr().out
    assert "retained, %" in shown
    assert f"{results['training']['tokens']:,} tokens" in shown
    # an output folder is not overwritten, and a finished run not gone on with
    for resume in ({}, {"resume_from_checkpoint": "true"}):
        with pytest.raises(FileExistsError, match="already holds something; choose another folder"):
            run_example("run_squad_kd", out, **arguments, **resume)


def test_squad_2_with_a_teacher_that_is_fine_tuned_first(workplace, capsys):
    teacher = save_teacher(workplace / "dense", BertModel, dtype=torch.bfloat16)
    out = workplace / "out"
    arguments = {**COMMON, "teacher": teacher, "version": "v2.0", "data_dir": workplace}
    results = run_example("run_squad_kd", out, **arguments, plan=workplace / "bert.yaml")
    totals = {"total", "HasAns_total", "NoAns_total"}
    scores = {f"{group}{name}" for group in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")}
    check_results(out, results, scores | totals)
    assert [results["metrics"]["student"][name] for name in sorted(totals)] == [5, 2, 7]
    for name, tuned in results["tuned_on_validation"].items():
        assert 0 <= tuned["exact"] <= tuned["f1"] <= 100
        assert tuned["f1"] >= results["metrics"][name]["f1"]
        assert not math.isnan(float(tuned["f1_threshold"]))
    shown = capsys.readouterr().out
    assert "f1, tuned threshold*" in shown
    assert "* with the threshold that is best on these very validation questions" in shown
    fine_tuned = AutoModelForQuestionAnswering.from_pretrained(out / "teacher")
    student = AutoModelForQuestionAnswering.from_pretrained(out / "student")
    assert fine_tuned.dtype == student.dtype == torch.float32
    assert fine_tuned.num_labels == student.num_labels == 2
    name = "encoder.layer.0.output.dense.weight"
    before = BertModel.from_pretrained(teacher, dtype=torch.float32).state_dict()[name]
    assert not torch.equal(fine_tuned.bert.state_dict()[name], before)  # all of it was trained, not its head alone

    # the fine-tuned teacher serves as such, and where no answer ever wins, all answers are empty
    again = {**arguments, "teacher": out / "teacher", "start": out / "student", "no_answer_threshold": -1000}
    results = run_example("run_squad_kd", workplace / "again", **again)
    assert not (workplace / "again" / "teacher").exists()
    assert not any(check_results(workplace / "again", results, scores | totals).values())
    assert results["metrics"]["student"]["NoAns_f1"] == 100
    assert results["metrics"]["student"]["HasAns_f1"] == 0


def test_resumed_and_repeated_runs_come_to_the_same(workplace):
    teacher = save_teacher(workplace / "dense", BertModel)
    arguments = {
        **COMMON, "teacher": teacher, "data_dir": workplace, "plan": workplace / "bert.yaml", "max_steps": 4,
    }  # fmt: skip
    whole, parts = workplace / "whole", workplace / "parts"
    expected = run_example("run_squad_kd", whole, **arguments)
    shutil.copytree(whole, parts)
    for late in ("student", "checkpoints/checkpoint-4"):
        shutil.rmtree(parts / late)
    for late in ("results.json", "predictions.json"):
        (parts / late).unlink()
    early = workplace / "early"  # as it is when a run stops between the teacher and the first checkpoint
    shutil.copytree(parts / "teacher", early / "teacher")
    anew = workplace / "anew"  # the seed is that of the arguments
    for folder in (parts, early, anew):
        resume = {} if folder == anew else {"resume_from_checkpoint": "true"}
        resumed = run_example("run_squad_kd", folder, **arguments, **resume)
        assert resumed["training"]["steps"] == 4
        assert resumed["training"]["tokens"] == expected["training"]["tokens"]
        assert resumed["metrics"] == expected["metrics"]
        for name in ("teacher/model.safetensors", "student/model.safetensors", "predictions.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_files_of_ones_own_with_gpt2_without_a_pad_token(workplace):
    folder = save_teacher(workplace / "dense", GPT2Model, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    train = workplace / "train-v2.0.json"  # its text holds the very token that becomes the padding
    train.write_text(train.read_text().replace('"question": "', '"question": "<|endoftext|>'))
    arguments = {
        **COMMON, "teacher": folder, "version": "v2.0", "train_file": train,
        "validation_file": workplace / "dev-v2.0.json", "max_length": 32,
        "plan": workplace / "gpt2.yaml", "max_steps": -1, "num_train_epochs": 1,
    }  # fmt: skip
    out = workplace / "out"
    results = run_example("run_squad_kd", out, **arguments)
    check_results(out, results, set(results["metrics"]["teacher"]))
    student = AutoModelForQuestionAnswering.from_pretrained(out / "student")
    assert type(student).__name__ == "KroneckerGPT2ForQuestionAnswering"
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert student.config.pad_token_id == AutoConfig.from_pretrained(out / "teacher").pad_token_id == 1
    windows = training_features(read_squad_file(train)[:], tokenizer, 32, 4)["input_ids"]
    assert all(tokenizer.pad_token_id in window for window in windows)
    assert results["training"]["tokens"] == sum(map(len, windows))


def test_gpt2_that_answers_already(workplace):
    teacher = save_teacher(workplace / "answerer", GPT2ForQuestionAnswering)
    arguments = {**COMMON, "teacher": teacher, "data_dir": workplace, "max_length": 32}
    results = run_example("run_squad_kd", workplace / "out", **arguments, plan=workplace / "gpt2.yaml")
    check_results(workplace / "out", results, {"exact_match", "f1"})
    assert AutoModelForQuestionAnswering.from_pretrained(workplace / "out" / "student").config.pad_token_id == 0


def test_clear_errors_before_long_work(workplace, capsys):
    teacher = save_teacher(workplace / "dense", BertForSequenceClassification)
    out = workplace / "out"
    files = {"train_file": workplace / "train-v2.0.json", "validation_file": workplace / "dev-v2.0.json"}
    twice = json.loads((workplace / "dev-v1.1.json").read_text())
    twice["data"] *= 2
    (workplace / "twice.json").write_text(json.dumps(twice))
    train = workplace / "train-v1.1.json"
    for options, message in (
        (files, "training question 'q3' has no answer, but in v1.1 each has one; run with --version v2.0"),
        ({"train_file": train, "validation_file": workplace / "twice.json"}, "14 validation questions have 7 ids"),
        ({"data_dir": workplace, "max_length": 41}, "max_length=41 must be from 2 to the teacher's 40 tokens"),
        ({"data_dir": workplace, "stride": 30}, "stride is 30, and a question of 4 tokens leaves"),
        ({"data_dir": workplace, "plan": workplace / "gpt2.yaml"}, "plan pattern 'wte' matches no module"),
    ):
        with pytest.raises(ValueError, match=message):
            run_example("run_squad_kd", out, **{**COMMON, "teacher": teacher, **options})
    for options, message in (
        ({**files, "data_dir": workplace}, "give --data_dir, or both --train_file and --validation_file"),
        ({"train_file": train}, "give --data_dir, or both --train_file and --validation_file"),
        ({"no_answer_threshold": 1}, "--no_answer_threshold is for --version v2.0"),
        ({"version": "v2.0", "no_answer_threshold": "inf"}, "--no_answer_threshold is inf; it must be finite"),
        ({"max_eval_samples": -1}, "--max_eval_samples is -1; it must be at least 1"),
        ({"version": "v3"}, "invalid choice: 'v3'"),
        ({"recipe": "kngpt2"}, "--recipe 'kngpt2' is not known for this stage"),
    ):
        with pytest.raises(SystemExit):
            run_example("run_squad_kd", out, teacher=teacher, **options)
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_help_is_short(capsys):
    with pytest.raises(SystemExit):
        load_example("run_squad_kd").main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 75
    assert "kroneckerbert-21x, kroneckerbert-7.7x" in text
