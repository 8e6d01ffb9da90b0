"""A teacher that reads each sentence once gives the same losses as one that reads it each time."""

import pytest
import torch
from distilling import assert_same_step, collate, examples, make_trainer, one_step, pair
from transformers import BertModel, GPT2Model, MPNetModel

from kronecker_transformers.distillation import Objective, TeacherMemory

SENTENCES = {"objective": "sentence_encoder"}
WEIGHTS = {"pooled": 2.0, "similarity_kl": 1.0}


def rows_read(teacher):
    """How many sentences the teacher has read, forward pass by forward pass."""
    found = []
    teacher.base_model.register_forward_pre_hook(
        lambda module, args, inputs: found.append(len(inputs["input_ids"])), with_kwargs=True
    )
    return found


@pytest.mark.parametrize("dense_class", [BertModel, GPT2Model, MPNetModel])
def test_losses_and_gradients_are_the_same(dense_class, tmp_path):
    expected = one_step(dense_class, tmp_path, **SENTENCES)
    assert expected[1], "there are gradients to compare"
    memory = TeacherMemory()
    assert_same_step(one_step(dense_class, tmp_path, trainer={"memory": memory}, **SENTENCES), expected)
    assert len(memory) == 8
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "similarity_kl_weight": 0.0}
    expected = one_step(dense_class, tmp_path, **SENTENCES, **parts)
    assert_same_step(one_step(dense_class, tmp_path, trainer={"memory": memory}, **SENTENCES, **parts), expected)


def test_a_sentence_is_read_once_whatever_its_batch(tmp_path):
    teacher, student = pair(BertModel)
    read, memory = rows_read(teacher), TeacherMemory()
    trainer = make_trainer(student, teacher, tmp_path, max_steps=6, trainer={"memory": memory}, **SENTENCES)
    trainer.train()
    assert read == [8]  # all of the first epoch; five follow
    objective = Objective(student, teacher, WEIGHTS, memory=memory)
    objective.attach(student)
    memory.keeps = False
    rows = examples(student)
    new = {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1]}
    prefix = {name: values[:4] for name, values in rows[1].items()}  # of a known one, so another sentence
    batch = collate([rows[6], new, rows[0], prefix])
    found = objective.values(student.eval(), batch, objective.count(batch))
    assert read == [8, 2]
    assert len(memory) == 8
    plain = Objective(student, teacher, WEIGHTS)
    objective.detach()
    plain.attach(student)
    torch.testing.assert_close(found, plain.values(student, batch, plain.count(batch)))


def test_padding_on_the_left_is_not_kept():
    """BERT counts positions from the first column, padding included."""
    teacher, student = pair(BertModel)
    memory = TeacherMemory()
    objective, plain = Objective(student, teacher, WEIGHTS, memory=memory), Objective(student, teacher, WEIGHTS)
    tokens = torch.tensor([[5, 6, 7, 8, 9], [9, 5, 4, 7, 3]])
    for padding in (0, 3, 6):
        ids = torch.nn.functional.pad(tokens, (padding, 0))
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        found = []
        for each in (objective, plain):
            each.attach(student.eval())
            found.append(each.values(student, batch, each.count(batch)))
            each.detach()
        torch.testing.assert_close(*found)


def test_token_types_tell_sentences_apart():
    teacher, student = pair(BertModel)
    memory = TeacherMemory()
    objective = Objective(student, teacher, WEIGHTS, memory=memory)
    objective.attach(student)
    batch = collate([{"input_ids": [5, 6], "attention_mask": [1, 1], "token_type_ids": [0, n]} for n in (0, 1)])
    objective.values(student, batch, objective.count(batch))
    assert len(memory) == 2


def test_a_full_memory_reads_what_is_new_each_time():
    teacher, student = pair(BertModel)
    read, memory = rows_read(teacher), TeacherMemory(limit=1)  # full after the first batch
    objective = Objective(student, teacher, WEIGHTS, memory=memory)
    objective.attach(student)
    first, second = (collate(part) for part in (examples(student)[:3], examples(student)[3:]))
    for batch in (first, second, first, second):
        objective.values(student, batch, objective.count(batch))
    assert read == [3, 5, 5]


def test_losses_that_need_more_of_the_teacher_read_each_batch():
    teacher, student = pair(BertModel)
    read, memory = rows_read(teacher), TeacherMemory()
    objective = Objective(student, teacher, {**WEIGHTS, "hidden_mse": 1.0}, memory=memory)
    objective.attach(student)
    batch = collate(examples(student))
    for _ in range(2):
        objective.values(student, batch, objective.count(batch))
    assert (read, len(memory)) == ([8, 8], 0)
