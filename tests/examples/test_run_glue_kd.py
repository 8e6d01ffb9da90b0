import json
import shutil
from itertools import islice

import pytest
import tiny
import torch
from examples_runner import load_example, run_example
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorWithPadding,
    GPT2Model,
)
from transformers.trainer_callback import TrainerState

from kronecker_transformers import compress
from kronecker_transformers.distillation import DistillationTrainer
from kronecker_transformers.distillation.start import keep_layers

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
    tokenizer = tiny.tokenizer_for(tiny.model_type(dense_class), folder)
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
        "recipe": "kroneckerbert-7.7x",
    }  # fmt: skip
    results = run_example("run_glue_kd", workplace / "out", **arguments)
    assert results["training"]["samples"] == 16 + 3  # six batches make an epoch, the last of them of one example
    shutil.rmtree(workplace / "out" / "student")
    again = run_example("run_glue_kd", workplace / "out", **arguments, resume_from_checkpoint="true")
    assert again["metrics"] == results["metrics"]


@pytest.mark.parametrize("files", [False, True])
def test_as_it_is_it_searches_a_plan_and_learns_augmented_texts_without_labels(workplace, monkeypatch, files):
    """One text in each row of the task, two in the files."""
    teacher, given = save_teacher(workplace / "teacher", BertModel), []

    class Distillation(DistillationTrainer):
        def __init__(self, *args, train_dataset, **options):
            given.append(train_dataset)
            super().__init__(*args, train_dataset=train_dataset, **options)

    monkeypatch.setattr("kronecker_transformers.experiments.classification.DistillationTrainer", Distillation)
    lines = [f"{sentence(i)} \t{i % 2}" for i in range(40)]
    (workplace / "glue" / "SST-2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    lines = [f"{sentence(i)},{sentence(i + 1)},{'abc'[i % 3]}" for i in range(40)]
    (workplace / "train.csv").write_text("\n".join(["sentence1,sentence2,label", *lines]))
    data = {"train_file": workplace / "train.csv", "validation_file": workplace / "dev.csv"}
    results = run_example(
        "run_glue_kd", workplace / "out", teacher=teacher, ratio=2, per_device_train_batch_size=4, max_steps=-1,
        num_train_epochs=2, teacher_epochs=1,
        **(data if files else {"task_name": "sst2", "data_dir": workplace / "glue"}),
    )  # fmt: skip
    assert results["training"] == {**results["training"], "steps": 20, "samples": 80, "optimizer": "Muon and AdamW"}
    assert results["options"] == {**results["options"], "plan": "search", "augmented": 0.5, "ratio": 2}
    student = AutoModelForSequenceClassification.from_pretrained(workplace / "out" / "student")
    dense = AutoModelForSequenceClassification.from_pretrained(workplace / "out" / "teacher")
    assert dense.base_model.num_parameters() / student.base_model.num_parameters() >= 2
    (stream,) = given
    passes = [list(islice(stream, place, place + 40)) for place in (0, 40)]
    assert all("labels" not in example for example in passes[0] + passes[1])
    tokenizer = tiny.bert_tokenizer(workplace)
    own = {tuple(tokenizer(*([sentence(i), sentence(i + 1)] if files else [sentence(i)])).input_ids) for i in range(40)}
    found = [[tuple(example["input_ids"]) in own for example in examples] for examples in passes]
    assert all(8 <= sum(same) <= 34 for same in found)  # about half are as they are
    seen = [{tuple(example["input_ids"]) for example in examples} for examples in passes]
    assert seen[0] != seen[1]


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
        teacher_epochs=30, teacher_learning_rate=3e-3,
    )  # fmt: skip
    assert set(results["metrics"]["student"]) == {"pearson", "spearmanr"}
    student = AutoModelForSequenceClassification.from_pretrained(workplace / "out" / "student").eval()
    tokenizer = tiny.bert_tokenizer(workplace)
    with torch.no_grad():
        scores = [float(student(**tokenizer(sentence(i), return_tensors="pt")).logits) for i in range(6)]
    expected = pearsonr(scores, [i / 4 for i in range(6)]).statistic
    assert results["metrics"]["student"]["pearson"] == pytest.approx(expected, abs=1e-4)
    assert results["metrics"]["teacher"]["pearson"] > 0.8  # it has learnt these six, which it was trained on


def test_mnli_with_evaluation_on_both_of_its_splits(workplace):
    """Official columns; the wanted ones are found by their names."""
    names = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
             "sentence1_parse", "sentence2_parse", "sentence1", "sentence2"]  # fmt: skip
    labels = ("neutral", "entailment", "contradiction")
    folder = workplace / "glue" / "MNLI"
    folder.mkdir()
    for name, rows in (("train", 12), ("dev_matched", 6), ("dev_mismatched", 5), ("test_matched", 4),
                       ("test_mismatched", 3)):  # fmt: skip
        judged = [] if name.startswith("test") else ["label1", "gold_label"]
        lines = ["\t".join([*names, *judged])]
        for i in range(rows):
            found = [str(i), "1", "1n", "fiction", "( a )", "( b )", "(ROOT", "(ROOT", sentence(i), sentence(i + 2)]
            lines.append("\t".join([*found, *([labels[i % 3]] * len(judged))]))
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    teacher = save_teacher(workplace / "teacher", BertModel)
    results = run_example(
        "run_glue_kd", workplace / "out", teacher=teacher, task_name="mnli", data_dir=workplace / "glue",
        plan=workplace / "bert.yaml", teacher_epochs=1, per_device_train_batch_size=4, eval_strategy="steps",
        eval_steps=2, save_strategy="steps",
    )  # fmt: skip
    assert set(results["metrics"]["student"]) == {"accuracy_matched", "accuracy_mismatched"}
    history = TrainerState.load_from_json(
        workplace / "out" / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    ).log_history
    for split, rows in (("matched", 6), ("mismatched", 5)):
        values = [line[key] for line in history for key in line if key == f"eval_validation_{split}_accuracy"]
        assert len(values) == 2  # after steps 2 and 3
        assert values[-1] == results["metrics"]["student"][f"accuracy_{split}"]
        assert values[-1] * rows == pytest.approx(round(values[-1] * rows))
    for name, rows in (("MNLI-m.tsv", 4), ("MNLI-mm.tsv", 3)):
        lines = (workplace / "out" / name).read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert len(lines) == rows + 1
        assert {line.split("\t")[1] for line in lines[1:]} <= set(labels)


def test_gpt2_is_padded_on_the_right_and_its_two_texts_are_divided(workplace):
    teacher = save_teacher(workplace / "teacher", GPT2Model)
    tokenizer = tiny.gpt2_tokenizer(workplace)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(teacher)
    script = load_example("run_glue_kd")
    task = script.load_task(None, None, str(workplace / "train.csv"), str(workplace / "dev.csv"))
    model, tokenizer, task, certain = script.load_classifier(str(teacher), task)
    assert certain is None
    rows = script.tokenized(task.data["train"], task, tokenizer, 40)
    assert tokenizer.decode(rows[3]["input_ids"]) == f"{sentence(3)}{tokenizer.eos_token}{sentence(4)}"
    batch = DataCollatorWithPadding(tokenizer)([rows[0], rows[5]])
    with torch.no_grad():
        together = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
        alone = model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0]
    torch.testing.assert_close(together, alone)


LABELS = {
    "capitals": ("NEGATIVE", "POSITIVE"),
    "spaces, other order": ("Positive ", "negative"),
    "no names": ("LABEL_0", "LABEL_1"),
}


@pytest.mark.parametrize("names", LABELS)
def test_labels_of_the_teacher_are_mapped_and_its_names_kept(names, workplace, caplog):
    id2label = dict(enumerate(LABELS[names]))
    teacher = save_teacher(
        workplace / "teacher",
        BertForSequenceClassification,
        id2label=id2label,
        label2id={v: k for k, v in id2label.items()},
    )
    model = BertForSequenceClassification.from_pretrained(teacher)
    file = workplace / "glue" / "SST-2" / "dev.tsv"
    # the development set is what this teacher says, in the words of the task
    tokenizer = tiny.bert_tokenizer(workplace)
    lines = []
    for i in range(12):
        with torch.no_grad():
            answer = int(model.eval()(**tokenizer(sentence(i), return_tensors="pt")).logits.argmax())
        lines.append(f"{sentence(i)} \t{1 - answer if names.startswith('spaces') else answer}")
    file.write_text("\n".join(["sentence\tlabel", *lines]))
    out = workplace / "out"
    results = run_example(
        "run_glue_kd", out, teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
        plan=workplace / "bert.yaml", per_device_train_batch_size=4, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    assert results["metrics"]["teacher"]["accuracy"] == 1
    student = AutoModelForSequenceClassification.from_pretrained(out / "student")
    assert tuple(student.config.id2label.values()) == LABELS[names]
    state = TrainerState.load_from_json(str(next(out.glob("checkpoints/checkpoint-3")) / "trainer_state.json"))
    evaluated = next(log["eval_accuracy"] for log in state.log_history if "eval_accuracy" in log)
    assert evaluated == pytest.approx(results["metrics"]["student"]["accuracy"])
    labels = [line.split("\t")[1] for line in (out / "SST-2.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        raw = [int(student.eval()(**tokenizer(sentence(i), return_tensors="pt")).logits.argmax()) for i in range(5)]
    assert labels == [str(1 - answer if names.startswith("spaces") else answer) for answer in raw]
    assert "WORSE THAN CHANCE" not in caplog.text


def test_a_teacher_without_names_that_is_below_chance_is_a_loud_warning(workplace, caplog):
    teacher = save_teacher(workplace / "teacher", BertForSequenceClassification, id2label=None, label2id=None)
    model, tokenizer = BertForSequenceClassification.from_pretrained(teacher).eval(), tiny.bert_tokenizer(workplace)
    lines = []
    for i in range(8):
        with torch.no_grad():
            answer = int(model(**tokenizer(sentence(i), return_tensors="pt")).logits.argmax())
        lines.append(f"{sentence(i)} \t{1 - answer}")
    (workplace / "glue" / "SST-2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    run_example(
        "run_glue_kd", workplace / "out", teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
        plan=workplace / "bert.yaml", per_device_train_batch_size=4,
    )  # fmt: skip
    assert (
        "THE TEACHER IS RIGHT IN 0.0 % OF 8 CASES, WORSE THAN CHANCE (50.0 %): its classes, LABEL_0, LABEL_1"
        in caplog.text
    )
    assert "seem to be in another one; correct id2label and label2id in its config.json" in caplog.text


def test_what_cannot_be_trained_is_refused_before_long_work(workplace, monkeypatch):
    monkeypatch.setattr(
        "kronecker_transformers.experiments.run.train_plainly", lambda *_, **__: pytest.fail("is trained")
    )
    teacher = save_teacher(workplace / "teacher", BertModel)
    glue = {"teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue"}
    with pytest.raises(ValueError, match="max_length=41 must be from 2 to the teacher's 40 tokens"):
        run_example("run_glue_kd", workplace / "out", **glue, max_length=41)
    gpt2 = save_teacher(workplace / "gpt2", GPT2Model)
    (workplace / "train.tsv").write_text("text\tlabel\nthe dog\ta\n\tb\n")
    files = {"train_file": workplace / "train.tsv", "validation_file": workplace / "train.tsv"}
    with pytest.raises(ValueError, match="text '' gives no token; every row needs one; remove the row or fill it"):
        run_example("run_glue_kd", workplace / "out2", teacher=gpt2, **files, recipe="kngpt2")
    assert not (workplace / "out").exists()
    assert not (workplace / "out2").exists()


def test_a_failing_evaluation_loses_no_result(workplace, monkeypatch):
    teacher = save_teacher(workplace / "teacher", BertModel)
    monkeypatch.setattr("kronecker_transformers.tasks.glue_metric.GlueMetric._compute", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_example(
            "run_glue_kd", workplace / "out", teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
            plan=workplace / "bert.yaml", teacher_epochs=1, per_device_train_batch_size=4,
        )  # fmt: skip
    for folder in (workplace / "out", workplace / "out" / "student"):
        results = json.loads((folder / "results.json").read_text())
        assert results["training"]["steps"] == 3
        assert results["options"]["max_length"] == 40
        assert results["evaluation_failed"] == "ZeroDivisionError: division by zero"
    assert AutoModelForSequenceClassification.from_pretrained(workplace / "out" / "student")


def test_a_table_that_cannot_be_shown_loses_no_figure(workplace, monkeypatch):
    teacher = save_teacher(workplace / "teacher", BertModel)
    monkeypatch.setattr("kronecker_transformers.experiments.run.console", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_example(
            "run_glue_kd", workplace / "out", teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
            plan=workplace / "bert.yaml", teacher_epochs=1, per_device_train_batch_size=4,
        )  # fmt: skip
    results = json.loads((workplace / "out" / "results.json").read_text())
    assert "evaluation_failed" not in results
    assert set(results["metrics"]) == {"teacher", "student, undistilled", "student"}


def test_a_teacher_in_half_precision_is_fine_tuned_in_full(workplace):
    teacher = save_teacher(workplace / "teacher", BertModel)
    BertModel.from_pretrained(teacher).half().save_pretrained(teacher)
    run_example(
        "run_glue_kd", workplace / "out", teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
        plan=workplace / "bert.yaml", teacher_epochs=1, per_device_train_batch_size=4,
    )  # fmt: skip
    for name in ("teacher", "student"):
        model = AutoModelForSequenceClassification.from_pretrained(workplace / "out" / name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_does_not_fit_is_refused_before_the_teacher_is_trained(workplace, monkeypatch):
    teacher = save_teacher(workplace / "teacher", BertModel)
    glue = {"teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue"}
    monkeypatch.setattr(
        "kronecker_transformers.experiments.run.train_plainly", lambda *_, **__: pytest.fail("is trained")
    )
    with pytest.raises(ValueError, match=r"plan pattern 'wte'.* matches no"):
        run_example("run_glue_kd", workplace / "out", **glue, plan=workplace / "gpt2.yaml")
    compress(keep_layers(AutoModel.from_pretrained(teacher), [0, 1]), "7.7x").save_pretrained(workplace / "shallow")
    with pytest.raises(ValueError, match="num_hidden_layers=2 of the student must be that of the teacher, 3; give a"):
        run_example("run_glue_kd", workplace / "out", **glue, start=workplace / "shallow")
    (workplace / "few.txt").write_text("the dog\n" * 9)
    with pytest.raises(ValueError, match="calibration text of 9 texts gives 9 sequences"):
        run_example("run_glue_kd", workplace / "out", **glue, plan=workplace / "bert.yaml",
                    calibration=workplace / "few.txt")  # fmt: skip


def test_what_does_not_fit_is_refused_before_a_plan_is_searched(workplace, monkeypatch):
    teacher = save_teacher(workplace / "teacher", BertForSequenceClassification, id2label=None, label2id=None)
    monkeypatch.setattr("kronecker_transformers.recipes.start_student", lambda *_, **__: pytest.fail("is searched"))
    glue = {"teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue"}
    for option, message in (
        ({"layer_map": [0, 1]}, r"layer_map=\[0, 1\] must give for each of the 3 layers"),
        (
            {"eval_do_concat_batches": False},
            "--eval_do_concat_batches false: metrics are those of a whole evaluation set",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_example("run_glue_kd", workplace / "out", **glue, **option)


def test_a_head_that_is_not_wanted_is_passed_over(workplace):
    teacher = save_teacher(workplace / "teacher", BertForMaskedLM)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "architectures": ["BertLMHeadModel"]}))
    run_example(
        "run_glue_kd", workplace / "out", teacher=teacher, task_name="sst2", data_dir=workplace / "glue",
        teacher_only=True, teacher_epochs=0.1, teacher_learning_rate=1e-9, per_device_train_batch_size=4,
    )  # fmt: skip
    name = "encoder.layer.1.output.dense.weight"
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, workplace / "out" / "teacher"))
    torch.testing.assert_close(after[f"bert.{name}"], before[f"bert.{name}"])


@pytest.mark.parametrize("damage", ["layer", "positions"])
def test_a_teacher_without_a_classifier_is_checked_as_any_other(damage, workplace):
    teacher = save_teacher(workplace / "teacher", BertModel)
    if damage == "layer":
        tensors = load_file(teacher / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.layer.1.")}
        save_file(kept, teacher / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps({**config, "position_embedding_type": "relative_key"}))
    with pytest.raises(ValueError, match=r"parameters, .* first; restore them|has position_embedding_type='relative"):
        run_example("run_glue_kd", workplace / "out", teacher=teacher, task_name="sst2", data_dir=workplace / "glue")


def test_clear_errors(workplace, capsys):
    teacher = save_teacher(workplace / "teacher", BertForSequenceClassification)
    glue = {"teacher": teacher, "task_name": "sst2", "data_dir": workplace / "glue"}
    with pytest.raises(ValueError, match=r"has 3 labels \(negative, neutral, positive\), where the task has 2"):
        run_example("run_glue_kd", workplace / "out", **glue)
    with pytest.raises(
        ValueError, match=r"--augmented 0\.5 makes texts without labels, which supervised_weight=1 needs"
    ):
        run_example("run_glue_kd", workplace / "out", **glue, supervised_weight=1)
    for arguments, message in (
        ({"teacher": teacher}, "give --task_name, with or without --data_dir, or both --train_file and --validation"),
        ({"teacher": teacher, "train_file": "a", "validation_file": "b", "data_dir": "c"}, "give --task_name, with or"),
        ({**glue, "train_file": "a"}, "--task_name sst2 has files of its own; leave it out, or your files"),
        ({**glue, "max_train_samples": 0}, "--max_train_samples is 0; it must be at least 1"),
        ({**glue, "max_train_samples": -5}, "--max_train_samples is -5; it must be at least 1"),
        ({**glue, "recipe": "kronecker"}, "--recipe 'kronecker' is not known for this stage; choose one of"),
        ({**glue, "hidden_weight": 1}, "unknown option '--hidden_weight'"),
        ({**glue, "temperature": -1}, "temperature=-1.0 must be a finite number > 0"),
        ({**glue, "augmented": 1.5}, "--augmented 1.5 must be from 0 to 1"),
    ):
        with pytest.raises(SystemExit):
            run_example("run_glue_kd", workplace / "out", **arguments)
        assert message in capsys.readouterr().err
    for name in ("save", "eval", "logging"):
        with pytest.raises(ValueError, match=f"--{name}_strategy epoch: a stream of examples has no end of an epoch"):
            run_example("run_glue_kd", workplace / "out", **glue, **{f"{name}_strategy": "epoch"})
    assert not (workplace / "out").exists()


def test_help_is_short_and_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        load_example("run_glue_kd").main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 70
    assert "classifier, kngpt2, kroneckerbert-21x, kroneckerbert-7.7x" in " ".join(text.split())
    with pytest.raises(SystemExit):
        load_example("run_glue_kd").main(["--teacher", "x", "--output_dir", "y", "--help_training"])
    assert "--attention_mse_weight" in capsys.readouterr().out
