"""Weights of the losses by their gradients."""

import copy
import math

import pytest
import torch
from distilling import ALL_TERMS, make_trainer, one_step, pair
from transformers import BertForSequenceClassification, Trainer

from kronecker_transformers.distillation import DistillationArguments
from kronecker_transformers.distillation.objective import balanced_weights


def norm(gradients):
    return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())


def test_the_gradient_of_each_loss_is_as_large_as_its_weight_says(tmp_path):
    expected = {}
    for term, weight in ALL_TERMS.items():
        alone = {other: float(other == term) for other in ALL_TERMS}
        _, gradients = one_step(BertForSequenceClassification, tmp_path, **alone)
        expected[term.removesuffix("_weight")] = weight / norm(gradients)
    for parts in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        teacher, student = pair(BertForSequenceClassification)
        trainer = make_trainer(student, teacher, tmp_path, **ALL_TERMS, balanced=True, max_steps=1, **parts)
        trainer.train()
        found = trainer.training_summary()["objective"]
        assert found == pytest.approx(expected, rel=1e-4)
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(sum(weight * log[name] for name, weight in found.items()), rel=1e-5)


def test_a_second_training_is_balanced_anew(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    arguments = {"balanced": True, "max_steps": 3, "learning_rate": 3e-2}
    trainer = make_trainer(student, teacher, tmp_path, **arguments)
    trainer.train()
    first = trainer.training_summary()["objective"]
    fresh = make_trainer(copy.deepcopy(student), teacher, tmp_path, **arguments)
    found = []
    for each in (trainer, fresh):
        each.train()
        found.append(each.training_summary()["objective"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(first, rel=0.05)


@pytest.mark.parametrize(
    "changed", [{"logits_weight": 80.0}, {"relation_kl_weight": 0.0}, {"similarity_kl_weight": 1.0}]
)
def test_a_resume_with_other_weights_is_balanced_anew(tmp_path, changed):
    arguments = {"balanced": True, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0}
    teacher, student = pair(BertForSequenceClassification)
    make_trainer(student, teacher, tmp_path / "kept", **ALL_TERMS, **arguments, max_steps=2).train()
    found = []
    for folder, resume in (("kept", True), ("new", None)):
        teacher, student = pair(BertForSequenceClassification)
        arguments |= {"max_steps": 4, **ALL_TERMS, **changed}
        trainer = make_trainer(student, teacher, tmp_path / folder, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        found.append(trainer.training_summary()["objective"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # nothing was learned: all see the same gradients


def test_a_resume_keeps_the_weights_and_so_does_its_record(tmp_path):
    """Of a training that had come to its end, too."""
    arguments = {"balanced": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path, **arguments)
    trainer.train()
    expected = trainer.training_summary()["objective"]
    for more, steps in ((0, 3), (2, 5)):
        _, fresh = pair(BertForSequenceClassification)
        resumed = make_trainer(fresh, teacher, tmp_path, **{**arguments, "max_steps": 3 + more})
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == steps
        assert resumed.training_summary()["objective"] == expected != resumed.args.weights()


def test_a_loss_of_what_is_not_trained_counts_as_the_one_with_the_largest_gradient(tmp_path):
    teacher, student = pair(BertForSequenceClassification)
    student.base_model.embeddings.requires_grad_(False)
    weights = {"embedding_mse_weight": 1.0, "hidden_mse_weight": 1.0, "attention_mse_weight": 0.0,
               "logits_weight": 1.0, "supervised_weight": 0.0}  # fmt: skip
    trainer = make_trainer(student, teacher, tmp_path, balanced=True, max_steps=1, **weights)
    trainer.train()
    found = trainer.training_summary()["objective"]
    assert found["embedding_mse"] == min(found["hidden_mse"], found["logits"])


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_parameters_that_are_divided_are_refused(flag, tmp_path, monkeypatch):
    own = Trainer.__init__

    def divided(self, *args, **options):
        own(self, *args, **options)
        setattr(self, flag, True)

    monkeypatch.setattr(Trainer, "__init__", divided)
    teacher, student = pair(BertForSequenceClassification)
    refused = "balanced=True needs the gradients of whole parameters, which FSDP"
    with pytest.raises(ValueError, match=refused):
        make_trainer(student, teacher, tmp_path, balanced=True)
    with pytest.raises(ValueError, match=refused):  # without a model, before a search
        DistillationArguments(str(tmp_path), balanced=True, fsdp="full_shard")


def test_a_gradient_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    teacher, student = pair(BertForSequenceClassification)
    trainer = make_trainer(student, teacher, tmp_path, balanced=True)
    own = torch.autograd.grad

    def overflowing(value, *given, **options):
        return tuple(gradient * math.inf for gradient in own(value, *given, **options))

    monkeypatch.setattr(torch.autograd, "grad", overflowing)
    with pytest.raises(FloatingPointError, match=r"the gradient of the loss \w+ is (nan|inf) in the first step, so it"):
        trainer.train()


def test_a_loss_that_is_almost_0_gets_no_weight_without_limit():
    weights = {"embedding_mse": 2.0, "hidden_mse": 1.0, "logits": 3.0}
    norms = {"embedding_mse": 1e-9, "hidden_mse": 0.5, "logits": 4.0}
    assert balanced_weights(weights, norms) == {"embedding_mse": 0.5, "hidden_mse": 2.0, "logits": 0.75}
    assert balanced_weights(weights, dict.fromkeys(norms, 0.0)) == weights
