"""Teachers, students, arguments and data that do not fit: one clear error each."""

import pytest
import tiny
import torch
import transformers
from distilling import examples, make_trainer, pair
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from kronecker_transformers.distillation import LOSSES, DistillationArguments, DistillationTrainer


def refuse(match, tmp_path, classes=(BertForSequenceClassification,) * 2, teacher_changes=None, **arguments):
    teacher = tiny.teacher(classes[0], **(teacher_changes or {}))
    _, student = pair(classes[1])
    with pytest.raises(ValueError, match=match):
        make_trainer(student, teacher, tmp_path, **arguments)


LABELS = {0: "neutral", 1: "negative", 2: "positive"}


@pytest.mark.parametrize(
    ("match", "case"),
    [
        (r"num_hidden_layers=3 of the.*teacher, 4; give a layer_map", {"teacher_changes": {"num_hidden_layers": 4}}),
        (r"layer_map=\[0, 1\] must give for each of the 3 layers", {"layer_map": [0, 1]}),
        (r"layer_map=\[0, 1, 3\] must give .* from 0 to 2", {"layer_map": [0, 1, 3]}),
        (r"vocab_size=64 of the student must be that of the teacher, 66", {"teacher_changes": {"vocab_size": 66}}),
        (r"hidden_size=32 of the student.*teacher, 40", {"teacher_changes": {"hidden_size": 40}}),
        (r"num_attention_heads=4 .*teacher, 8", {"teacher_changes": {"num_attention_heads": 8}}),
        (
            r"num_labels=3 of the student must be that of the teacher, 2",
            {"teacher_changes": {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}},
        ),
        (r"id2label=.*one order of labels for both", {"teacher_changes": {"id2label": LABELS}}),
        (
            r"logits_weight=0.8 needs a teacher with the head of the student",
            {"classes": (BertForMaskedLM, BertForSequenceClassification)},
        ),
        (
            r"logits_weight=0.5 needs a student with a head, not KroneckerBertModel",
            {"classes": (BertModel, BertModel), "objective": "sentence_encoder", "logits_weight": 0.5},
        ),
        (r"teacher of the family 'gpt2' must be", {"classes": (GPT2LMHeadModel, BertForMaskedLM)}),
        (r"label_smoothing_factor=0.1 is not defined", {
            "classes": (transformers.BertForQuestionAnswering,) * 2, "label_smoothing_factor": 0.1}),
        (r"model_init cannot be used in a distillation", {"trainer": {"model_init": lambda: None}}),
        (r"objective='kd' is not known; choose one of kronecker_bert", {"objective": "kd"}),
        (r"hidden_mse_weight=-1.0 must be a finite number >= 0", {"hidden_mse_weight": -1.0}),
        (r"logits_weight=nan must be a finite number >= 0", {"logits_weight": float("nan")}),
        (r"all weights are 0", {f"{term}_weight": 0.0 for term in LOSSES}),
        (r"dropout=1.0 must be at least 0 and below 1", {"dropout": 1.0}),
        (r"temperature=0.0 must be a finite number > 0", {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_refused_before_it_begins(match, case, tmp_path):
    refuse(match, tmp_path, **case)


def test_attention_needs_equal_heads_only_where_it_is_compared(tmp_path):
    teacher, _ = pair(BertForSequenceClassification, num_attention_heads=8)
    _, student = pair(BertForSequenceClassification)
    make_trainer(student, teacher, tmp_path, hidden_mse_weight=1.0, attention_mse_weight=0.0).train()


def test_a_student_in_float16_is_refused(tmp_path):
    teacher, student = pair(BertModel)
    with pytest.raises(ValueError, match=r"parameters are in torch.float16, as its teacher was saved.*model.float\(\)"):
        make_trainer(student.half(), teacher, tmp_path)


def test_frozen_student_and_shared_parameters_are_refused(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    with pytest.raises(ValueError, match="teacher shares parameters with the student"):
        make_trainer(student, student, tmp_path)
    with pytest.raises(ValueError, match=r"student has no parameter that requires a gradient.*requires_grad_\(True\)"):
        make_trainer(student.requires_grad_(False), teacher, tmp_path)


def test_other_tokenizers_are_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    mine, theirs = tiny.bert_tokenizer(first), tiny.bert_tokenizer(second)
    teacher, student = pair(BertForSequenceClassification)
    arguments = DistillationArguments(output_dir=str(tmp_path), report_to=[])
    DistillationTrainer(student, teacher, arguments, processing_class=mine, teacher_processing_class=theirs)
    theirs.add_tokens(["unseen"])
    with pytest.raises(
        ValueError, match=r"tokenizer of the teacher gives 'unseen' the id .*, that of the student None"
    ):
        DistillationTrainer(student, teacher, arguments, processing_class=mine, teacher_processing_class=theirs)


def test_missing_labels_and_inputs_are_errors(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in examples(student)]
    with pytest.raises(
        ValueError, match=r"batch with \['attention_mask', 'input_ids'\] must hold 'labels'.*supervised_weight=0"
    ):
        make_trainer(student, teacher, tmp_path, rows=rows).train()
    make_trainer(student, teacher, tmp_path, rows=rows, supervised_weight=0.0, hidden_mse_weight=1.0).train()
    with pytest.raises(ValueError, match=r"batch with \['labels'\] must hold 'input_ids'; tokenize it first"):
        make_trainer(student, teacher, tmp_path).objective.count({"labels": torch.zeros(3)})


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        (None, [1.0, 0.0, 1.0], "labels of torch.float32 must be integers, the numbers of classes; convert them, or"),
        ("multi_label_classification", 1, r"labels of shape \(8,\) and torch.int64 must be floating-point truth value"),
    ],
)
def test_labels_of_another_kind_are_errors(kind, labels, message, tmp_path):
    teacher, student = pair(BertForSequenceClassification, problem_type=kind)
    rows = [{**row, "labels": labels} for row in examples(student)]
    with pytest.raises(ValueError, match=message):
        make_trainer(student, teacher, tmp_path, rows=rows).train()


def test_modules_that_are_not_run_are_an_error(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path)
    student.bert.encoder.layer[1].attention.self.forward = lambda hidden, *args, **kwargs: (hidden, None)
    with pytest.raises(RuntimeError, match="query of layer 1 was not seen in the forward pass"):
        trainer.train()
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path)
    teacher.bert.encoder.forward = lambda hidden, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    with pytest.raises(RuntimeError, match="hidden of layer 1 was not seen in the forward pass"):
        trainer.train()


def test_loss_that_is_not_finite_stops_the_training(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    with torch.no_grad():
        student.bert.encoder.layer[2].output.dense.bias[0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"loss at step 1 is not finite \(.*hidden_mse=nan.*\); lower the learning"
    ):
        make_trainer(student, teacher, tmp_path).train()


class Once(torch.utils.data.IterableDataset):
    """A stream that can be read a single time."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_data_that_runs_out_is_an_error_and_too_little_is_not_hidden(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path, Once(examples(student, 16)), max_steps=5)
    with pytest.raises(ValueError, match="train_dataset gave no batch after step 2 of 5"):
        trainer.train()
    with pytest.raises(ValueError, match="train_dataset gave no batch after step 0 of 5"):
        make_trainer(student, teacher, tmp_path, Once([]), max_steps=5).train()
    assert make_trainer(student, teacher, tmp_path, examples(student, 16), max_steps=5).train().global_step == 5


def test_left_padding_of_gpt2(tmp_path):
    teacher, student = pair(GPT2LMHeadModel)
    rows = examples(student)
    rows[2]["attention_mask"][0] = 0
    with pytest.raises(ValueError, match=r"attention_mask has padding on the left.*padding_side='right'"):
        make_trainer(student, teacher, tmp_path, rows=rows).train()
