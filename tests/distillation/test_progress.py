"""A training that is limited in time ends in time, on a clock of the test's own."""

from types import SimpleNamespace

import pytest
import torch
from distilling import examples, make_trainer, pair
from safetensors.torch import load_file
from transformers import BertModel, TrainerCallback

from kronecker_transformers.distillation import progress
from kronecker_transformers.tasks.text import TextStream


class Clock(TrainerCallback):
    """Every step takes so many seconds."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.rates = 0.0, seconds, []
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += self.seconds(state.global_step) if callable(self.seconds) else self.seconds

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "learning_rate" in logs:
            self.rates.append(logs["learning_rate"])


def train(folder, clock, **arguments):
    teacher, student = pair(BertModel)
    trainer = make_trainer(
        student, teacher, folder, callbacks=[clock], per_device_train_batch_size=2, warmup_steps=0, **arguments
    )
    trainer.train()
    return trainer, {name: value.clone() for name, value in student.state_dict().items()}


def test_a_machine_that_becomes_slow_ends_in_time_and_its_learning_rate_goes_down_by_then(tmp_path, monkeypatch):
    # planned at 0.6 s per step, but from the eleventh step on each takes 9 s
    clock = Clock(monkeypatch, lambda step: 0.6 if step < 10 else 9.0)
    trainer, _ = train(tmp_path, clock, max_steps=100, max_minutes=1.0)
    assert trainer.state.global_step == 10 + 7
    assert 60 <= clock.now < 60 + 2 * 9
    assert trainer.training_summary()["samples"] == 2 * 17
    assert clock.rates[0] == pytest.approx(1e-3, rel=0.02)
    assert clock.rates == sorted(clock.rates, reverse=True)
    assert clock.rates[9] > 0.85e-3
    assert clock.rates[-1] == pytest.approx(1e-3 * 9 / 60, rel=0.02)  # a step before the end, as long as it took


def test_without_trouble_the_limit_changes_nothing(tmp_path, monkeypatch):
    limited = train(tmp_path / "a", Clock(monkeypatch, 0.5), max_steps=6, max_minutes=1.0)
    free = train(tmp_path / "b", Clock(monkeypatch, 0.5), max_steps=6)
    assert limited[0].state.global_step == free[0].state.global_step == 6
    assert all(torch.equal(limited[1][name], value) for name, value in free[1].items())


def test_time_of_earlier_runs_counts(tmp_path, monkeypatch):
    first = Clock(monkeypatch, 10.0)
    train(tmp_path, first, max_steps=3, max_minutes=1.0, save_strategy="steps", save_steps=3)
    teacher, student = pair(BertModel)
    clock = Clock(monkeypatch, 10.0)
    trainer = make_trainer(
        student, teacher, tmp_path, callbacks=[clock], per_device_train_batch_size=2, max_steps=50, max_minutes=1.0
    )
    trainer.train(resume_from_checkpoint=True)
    assert 30 <= clock.now <= 50
    assert trainer.training_summary()["seconds"] == pytest.approx(30 + clock.now)
    assert trainer.training_summary()["samples"] == 2 * trainer.state.global_step


@pytest.mark.parametrize("minutes", [1.0, 0.75])
def test_the_limit_is_that_of_the_arguments_though_callbacks_come_from_the_checkpoint(minutes, tmp_path, monkeypatch):
    train(tmp_path, Clock(monkeypatch, 10.0), max_steps=50, max_minutes=0.5, save_strategy="steps", save_steps=3)
    teacher, student = pair(BertModel)
    clock = Clock(monkeypatch, 5.0)
    trainer = make_trainer(
        student, teacher, tmp_path, callbacks=[clock], per_device_train_batch_size=2, warmup_steps=0, max_steps=50,
        max_minutes=minutes, restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    spent = trainer.training_summary()["seconds"]
    assert 60 * minutes <= spent <= 60 * minutes + 10
    assert clock.rates[-1] < 0.2 * 1e-3  # the schedule follows the time of this run, too


def test_what_comes_after_a_training_is_not_its_time(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, 10.0)
    trainer, _ = train(tmp_path, clock, max_steps=3)
    clock.now += 3600
    assert trainer.training_summary()["seconds"] == pytest.approx(30)


def test_a_training_whose_time_was_over_is_not_gone_on_with(tmp_path, monkeypatch):
    arguments = {"max_steps": 50, "max_minutes": 1.0, "save_strategy": "steps", "save_steps": 1}
    trainer, weights = train(tmp_path, Clock(monkeypatch, 20.0), **arguments)
    steps = trainer.state.global_step
    teacher, student = pair(BertModel)
    clock = Clock(monkeypatch, 20.0)
    resumed = make_trainer(student, teacher, tmp_path, callbacks=[clock], per_device_train_batch_size=2, **arguments)
    assert resumed.train(resume_from_checkpoint=True).global_step == steps
    assert clock.now == 0
    assert all(torch.equal(student.state_dict()[name], value) for name, value in weights.items())


def test_a_training_ends_by_time_with_a_checkpoint_of_its_last_step(tmp_path, monkeypatch):
    arguments = {"max_steps": 50, "max_minutes": 1.0, "save_strategy": "steps", "save_steps": 3}
    trainer, weights = train(tmp_path, Clock(monkeypatch, 20.0), **arguments)
    assert trainer.state.global_step % 3, "no step at which a checkpoint is due"
    kept = load_file(tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors")
    assert kept
    assert all(torch.equal(weights[name], value) for name, value in kept.items())


def test_examples_that_a_resumed_training_skips_take_none_of_its_time(tmp_path, monkeypatch):
    arguments = {"max_steps": 40, "max_minutes": 1.0, "save_strategy": "steps", "save_steps": 3}
    train(tmp_path, Clock(monkeypatch, 10.0), **{**arguments, "max_steps": 3})
    teacher, student = pair(BertModel)
    clock, rows = Clock(monkeypatch, 10.0), examples(student)

    def slow(seed, share):
        for row in rows:
            clock.now += 5.0 if trainer.state.global_step == 3 and not clock.rates else 0.0  # while it is skipping
            yield row

    trainer = make_trainer(
        student, teacher, tmp_path, rows=TextStream(slow, buffer=1), callbacks=[clock], warmup_steps=0,
        per_device_train_batch_size=2, accelerator_config={"dispatch_batches": False}, **arguments,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    steps = trainer.state.global_step
    assert clock.now >= 3 * 2 * 5 + 10 * (steps - 3), "it has skipped"
    assert trainer.training_summary()["seconds"] == pytest.approx(10 * steps)
    assert steps >= 6


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_limits(minutes, tmp_path):
    with pytest.raises(ValueError, match=r"max_minutes=.* must be a finite number > 0; leave it out for no limit"):
        make_trainer(*pair(BertModel)[::-1], tmp_path, max_minutes=minutes)
