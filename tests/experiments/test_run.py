import json

import pytest
import tiny
import torch
from datasets import Dataset, load_from_disk
from distilling import collate, examples, make_trainer, pair
from examples_runner import run_example
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
)

import kronecker_transformers.checkpoint.load
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationArguments
from kronecker_transformers.evaluation.timing import environment
from kronecker_transformers.experiments.question_answering import windows
from kronecker_transformers.experiments.run import (
    check_output,
    finish,
    predict,
    teacher_and_tokenizer,
    train_and_save,
    train_plainly,
)
from kronecker_transformers.tasks.squad import training_features


@pytest.mark.parametrize("batch_size", [3, 100])
def test_predictions_come_in_order_whatever_the_batches(batch_size):
    model = tiny.teacher(BertForSequenceClassification).train()
    rows = examples(model, 8)
    found = predict(model, Dataset.from_list(rows), collate, batch_size=batch_size)["logits"]
    assert model.training
    assert len(found) == 8
    model.eval()
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.from_numpy(logits), expected)


def test_gradient_accumulation_does_not_change_how_a_teacher_is_trained(tmp_path):
    weights = []
    for batch, steps in ((8, 1), (2, 4)):
        model = tiny.teacher(BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        arguments = DistillationArguments(
            str(tmp_path), use_cpu=True, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
        )
        changes = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "warmup_steps": 0}
        before = model.classifier.weight.detach().clone()
        train_plainly(model, examples(model), collate, arguments, **changes)
        weights.append(model.classifier.weight.detach())
        assert not torch.equal(weights[-1], before)
    torch.testing.assert_close(*weights)


def test_models_are_in_full_precision_again_after_a_training_in_bf16(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    rows = examples(teacher)
    arguments = {"bf16": True, "use_cpu": True, "max_steps": 1}
    train_plainly(teacher, rows, collate, DistillationArguments(str(tmp_path / "teacher"), **arguments), max_steps=1)
    trainer = make_trainer(student, teacher, tmp_path / "student", **arguments)
    train_and_save(trainer, tiny.bert_tokenizer(tmp_path), tmp_path)
    assert trainer.accelerator.mixed_precision == "bf16"
    for model in (teacher, student):
        copy = type(model)(model.config).eval()
        copy.load_state_dict(model.state_dict())
        found, expected = (predict(m, Dataset.from_list(rows), collate)["logits"] for m in (model, copy))
        assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_outputs_of_several_names_keep_their_padded_length():
    model = tiny.teacher(BertForQuestionAnswering)
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in examples(model, 8)]
    found = predict(model, Dataset.from_list(rows), collate, ("start_logits", "end_logits"), batch_size=4)
    for row, start, end in zip(rows, found["start_logits"], found["end_logits"], strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row["input_ids"]]))
        length = len(row["input_ids"])
        torch.testing.assert_close(torch.from_numpy(start[:length]), expected.start_logits[0])
        torch.testing.assert_close(torch.from_numpy(end[:length]), expected.end_logits[0])


def test_output_folders_are_not_overwritten(tmp_path):
    assert check_output(tmp_path / "new", resume=False) == tmp_path / "new"
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="already holds something"):
        check_output(tmp_path / "begun", resume=False)
    assert check_output(tmp_path / "begun", resume=True) == tmp_path / "begun"
    (tmp_path / "begun" / "student").mkdir()
    (tmp_path / "begun" / "student" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="student' already holds something"):
        check_output(tmp_path / "begun", resume=True)


def test_teacher_without_a_tokenizer_is_refused(tmp_path):
    tiny.teacher(BertForSequenceClassification).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="comes without a tokenizer; save its tokenizer in the same folder"):
        teacher_and_tokenizer(str(tmp_path / "teacher"))


def test_table_and_results(tmp_path, capsys):
    rows = {"parameters": [22713216, 3057804], "accuracy": [0.912345, None], "name": ["a", "b"]}
    finish(tmp_path, results_table("title", ["teacher", "student"], rows, "a note"), {"rows": rows})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"rows": rows, "environment": environment()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]
    shown = capsys.readouterr().out
    for cell in ("22,713,216", "3,057,804", "0.9123", " - ", "title", "a note"):
        assert cell in shown, cell


def test_a_finished_student_gets_a_copy_of_the_results(tmp_path):
    (tmp_path / "student").mkdir()
    finish(tmp_path, results_table("title", ["student"], {}), {"rows": {}})
    assert (tmp_path / "student" / "results.json").read_text() == (tmp_path / "results.json").read_text()


def test_records_are_strict_json(tmp_path):
    numbers = {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": -float("inf"), "e": (2, "x")}}
    finish(tmp_path, results_table("t", [], {}), {"options": numbers})

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["options"] == {"a": None, "b": [None, 1.5], "c": {"d": None, "e": [2, "x"]}}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("script", ["run_embedding_kd", "run_mlm_kd", "run_clm_kd"])
def test_an_evaluation_without_a_set_is_refused_at_once(script, strategy, tmp_path):
    (tmp_path / "text.txt").write_text("the dog\n")
    with pytest.raises(ValueError, match=rf"--eval_strategy {strategy} needs a set to evaluate on while training"):
        run_example(
            script, tmp_path / "out", teacher="nowhere", train_text=[tmp_path / "text.txt"], eval_strategy=strategy
        )


@pytest.mark.parametrize(
    ("script", "token", "dense_class", "tokenizer"),
    [
        ("run_mlm_kd", "mask_token", BertForMaskedLM, tiny.bert_tokenizer),
        ("run_embedding_kd", "pad_token", BertModel, tiny.bert_tokenizer),
        ("run_clm_kd", "eos_token", GPT2LMHeadModel, tiny.gpt2_tokenizer),
    ],
)
def test_a_tokenizer_that_lacks_a_token_is_refused_at_once(
    script, token, dense_class, tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "teacher"
    folder.mkdir()
    tokenizer(folder).save_pretrained(folder)
    tiny.teacher(dense_class).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the dog\n")
    load = kronecker_transformers.checkpoint.load._load_tokenizer

    def without(source):
        found = load(source)
        setattr(found, token, None)
        return found

    monkeypatch.setattr(kronecker_transformers.checkpoint.load, "_load_tokenizer", without)
    name = token.removesuffix("_token")
    with pytest.raises(ValueError, match=rf"tokenizer has no {name} token, which this task needs; set {token} in its"):
        run_example(script, tmp_path / "out", teacher=folder, train_text=[tmp_path / "text.txt"])
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_version_made_of_a_dataset_on_disk_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    """The cache of `datasets` knows a function that can be imported by its name alone."""
    answers = [{"text": ["dog"], "answer_start": [9]}]
    questions = {"id": ["1"], "question": ["the fox"], "context": ["the lazy dog"], "answers": answers}
    Dataset.from_dict(questions).save_to_disk(tmp_path / "data")
    dataset, tokenizer = load_from_disk(str(tmp_path / "data")), tiny.bert_tokenizer(tmp_path)

    def ids():
        return windows(training_features, dataset, tokenizer, 16, 4)["input_ids"][:]

    def another(*args, **kwargs):
        return {"input_ids": [[7]]}

    assert ids() != [[7]]
    monkeypatch.setattr(training_features, "__code__", another.__code__)
    monkeypatch.setattr(training_features, "__kwdefaults__", None)
    assert ids() == [[7]]
