import copy

import distilling
import pytest
import tiny
import torch
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    DistilBertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from kronecker_transformers import compress
from kronecker_transformers.distillation.start import keep_layers, start_student


def saved_student(folder, dense_class, seed=5, plan=None, **changes):
    """A student of another teacher, with changed weights, in a folder."""
    student = compress(tiny.teacher(dense_class, seed, **changes), plan or distilling.BERT_PLAN).model
    tiny.perturb(student, seed).save_pretrained(folder)
    return student


def assert_same_weights(found, expected, names):
    names = list(names)
    assert names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dense_class", [BertForSequenceClassification, GPT2LMHeadModel])
def test_from_the_teacher(dense_class):
    teacher = tiny.teacher(dense_class).requires_grad_(False)
    plan = distilling.GPT2_PLAN if dense_class is GPT2LMHeadModel else distilling.BERT_PLAN
    student = start_student(teacher, plan)
    expected = compress(teacher, plan).model.state_dict()
    assert student.state_dict().keys() == expected.keys()
    assert_same_weights(student.state_dict(), expected, expected)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("earlier_class", [BertForPreTraining, BertForMaskedLM, BertModel])
def test_from_an_earlier_student_with_the_teachers_head(earlier_class, tmp_path):
    earlier = saved_student(tmp_path, earlier_class)
    teacher = tiny.teacher(BertForSequenceClassification)
    before = copy.deepcopy(teacher.state_dict())
    student = start_student(teacher, "7.7x", tmp_path)
    assert type(student).__name__ == "KroneckerBertForSequenceClassification"
    assert student.config.factor_plan == earlier.config.factor_plan
    assert student.config.id2label == tiny.LABELS
    found, base = student.base_model.state_dict(), earlier.base_model.state_dict()
    trained_pooler = earlier_class is BertForPreTraining  # the others have none, or no head that has used it
    kept = [name for name in base if trained_pooler or not name.startswith("pooler")]
    assert_same_weights(found, base, kept)
    assert found.keys() - set(kept) == (set() if trained_pooler else {"pooler.dense.weight", "pooler.dense.bias"})
    from_teacher = ("classifier",) if trained_pooler else ("classifier", "bert.pooler")
    own = [name for name in student.state_dict() if name.startswith(from_teacher)]
    assert_same_weights(student.state_dict(), teacher.state_dict(), own)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert_same_weights(teacher.state_dict(), before, before)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"max_position_embeddings": 24}, "position_embeddings"), ({"vocab_size": 128}, "word_embeddings")],
)
def test_refuses_an_earlier_student_of_other_sizes(changes, name, tmp_path):
    plan = {"encoder.layer.*.intermediate.dense": (4, 2, 1)}
    saved_student(tmp_path, BertModel, plan=plan, **changes)
    with pytest.raises(ValueError, match=rf"'embeddings.{name}.weight' in '.*' has shape .*; start from a student"):
        start_student(tiny.teacher(BertForSequenceClassification), start=tmp_path)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"is_decoder": True}], ids=str)
def test_refuses_an_earlier_student_that_computes_something_else_with_the_same_weights(changes, tmp_path):
    saved_student(tmp_path, BertModel, plan={"encoder.layer.*.intermediate.dense": (4, 2, 1)}, **changes)
    with pytest.raises(
        ValueError, match=r"has other hidden states with its teacher's config .*; take a student of this"
    ):
        start_student(tiny.teacher(BertForSequenceClassification), start=tmp_path)


def test_refuses_calibration_beside_an_earlier_student(tmp_path):
    saved_student(tmp_path, BertModel)
    with pytest.raises(ValueError, match=r"start='.*' has factors of its own, and calibration would replace them"):
        start_student(tiny.teacher(BertForSequenceClassification), start=tmp_path, calibration=["the dog"] * 20)


def test_from_an_earlier_dense_student_of_fewer_layers(tmp_path):
    earlier = tiny.perturb(keep_layers(tiny.teacher(GPT2LMHeadModel, seed=3), [1, 2]))
    earlier.save_pretrained(tmp_path)
    teacher = tiny.teacher(GPT2ForSequenceClassification)
    student = start_student(teacher, start=tmp_path)
    assert type(student) is GPT2ForSequenceClassification
    assert student.config.num_hidden_layers == 2
    base = earlier.base_model.state_dict()
    assert_same_weights(student.base_model.state_dict(), base, base)
    assert_same_weights(student.state_dict(), teacher.state_dict(), ["score.weight"])


STACKS = {GPT2LMHeadModel: "transformer.h.", GPT2Model: "h.", BertForMaskedLM: "bert.encoder.layer."}


@pytest.mark.parametrize("dense_class", STACKS)
def test_keep_layers(dense_class, tmp_path):
    teacher = tiny.teacher(dense_class).requires_grad_(False)
    student = keep_layers(teacher, [0, 2])
    prefix = STACKS[dense_class]
    mine, theirs = student.state_dict(), teacher.state_dict()
    first, last = f"{prefix}1.", f"{prefix}2."
    expected = {name: value for name, value in theirs.items() if not name.startswith((first, last))}
    expected |= {name.replace(last, first): value for name, value in theirs.items() if name.startswith(last)}
    assert mine.keys() == expected.keys()
    assert_same_weights(mine, expected, expected)
    assert type(student) is dense_class
    assert student.training
    assert (student.config.num_hidden_layers, teacher.config.num_hidden_layers) == (2, 3)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not set(map(id, student.parameters())) & set(map(id, teacher.parameters()))
    head = student.get_output_embeddings()
    assert head is None or head.weight is student.get_input_embeddings().weight

    tiny.perturb(student).save_pretrained(tmp_path)
    loaded = dense_class.from_pretrained(tmp_path)
    inputs = tiny.inputs(student)
    torch.testing.assert_close(loaded(**inputs)[0], student.eval()(**inputs)[0])


def test_kept_layers_generate_with_a_cache():
    student = keep_layers(tiny.teacher(GPT2LMHeadModel), (1, 2)).eval()
    ids = tiny.inputs(student)["input_ids"][:1]
    cached, plain = (
        student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    torch.testing.assert_close(cached, plain)


@pytest.mark.parametrize("layers", [[], [2, 0], [0, 0], [-1, 1], [0, 3]])
def test_keep_layers_refuses(layers):
    with pytest.raises(ValueError, match=r"layers=\[.*must be layers of the teacher, from 0 to 2.*; correct them"):
        keep_layers(tiny.teacher(GPT2LMHeadModel), layers)


def test_an_earlier_student_of_fewer_layers_keeps_its_depth(tmp_path):
    teacher = tiny.teacher(BertForSequenceClassification)
    plan = {"encoder.layer.*.intermediate.dense": (4, 2, 1)}
    earlier = tiny.perturb(compress(keep_layers(teacher, [0, 2]), plan).model, 3)
    earlier.save_pretrained(tmp_path)
    student = start_student(teacher, start=tmp_path)
    assert student.config.num_hidden_layers == 2
    assert_same_weights(
        student.base_model.state_dict(), earlier.base_model.state_dict(), earlier.base_model.state_dict()
    )


def test_refuses_an_earlier_student_of_more_layers_or_another_family(tmp_path):
    teacher = tiny.teacher(BertForSequenceClassification)
    plan = {"encoder.layer.*.intermediate.dense": (4, 2, 1)}
    compress(teacher, plan).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"deep' has 3 layers, its teacher only 2; take another"):
        start_student(keep_layers(teacher, [0, 1]), start=tmp_path / "deep")
    tiny.teacher(DistilBertForSequenceClassification).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other' is of the family 'distilbert', its teacher of 'bert'; take another"):
        start_student(teacher, start=tmp_path / "other")


def test_layers_that_compute_by_their_number_keep_it(tmp_path):
    teacher = tiny.teacher(GPT2LMHeadModel, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"layers=\[1, 2\] would get other numbers"):
        keep_layers(teacher, [1, 2])
    first = keep_layers(teacher, [0, 1]).eval()
    first.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits, first(ids).logits)
