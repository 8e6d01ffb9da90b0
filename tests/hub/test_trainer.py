"""Pushes of the trainer to a hub on loopback: what is in each commit, and that a stranger can load it."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap

import pytest
import torch
from distilling import collate, examples, pair
from huggingface_hub import ModelCard
from loopback_hub import Fault, Hub
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer

PICKLES = (".bin", ".pt", ".pth", ".pkl")
CODE = "modeling_kronecker_bert.py"


def trainer_for(tmp_path, **options):
    teacher, student = pair(BertForSequenceClassification)
    teacher.config.name_or_path = "org/teacher"
    arguments = DistillationArguments(
        str(tmp_path / "out"), push_to_hub=True, hub_model_id="org/tiny", hub_token="hf_good", hub_always_push=True,
        max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
        **{"report_to": [], **options},
    )  # fmt: skip
    data = examples(student)
    return DistillationTrainer(student, teacher, arguments, train_dataset=data, data_collator=collate)


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", []),
        ("every_save", [[], []]),
        ("checkpoint", [["last-checkpoint"], ["last-checkpoint"]]),
        ("all_checkpoints", [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]),
    ],
)
def test_every_strategy(hub, tmp_path, strategy, folders):
    trainer = trainer_for(tmp_path, hub_strategy=strategy)
    trainer.train()
    repo = hub.repo("org/tiny")
    messages = ["initial commit", *(f"Training in progress, step {step}" for step in (2, 4)[: len(folders)])]
    assert [message for _, _, message in repo.log] == messages
    done = trainer.push_to_hub(license="mit")
    assert done.is_new
    assert repo.log[-1] == (done.commit, "main", "End of training")

    for (commit, _, _), step, inside in zip(repo.log[1:], (*(2, 4)[: len(folders)], 4), [*folders, None], strict=True):
        files = repo.files(commit)
        assert not [name for name in files if name.endswith(PICKLES)]
        card = ModelCard(files["README.md"].decode())
        assert card.data.base_model == "org/teacher"
        assert f"Training: {step} steps of 2 samples" in card.text
        assert CODE in files
        if inside is not None:
            assert sorted({name.partition("/")[0] for name in files if "/" in name}) == inside
        for folder in inside or []:
            assert f"{folder}/{CODE}" in files
            assert json.loads(files[f"{folder}/trainer_state.json"])["global_step"] == (
                step if folder == "last-checkpoint" else int(folder.rpartition("-")[2])
            )
    assert ModelCard(repo.files()["README.md"].decode()).data.license == "mit"
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").exists()  # for oneself


def test_the_base_class_still_sends_pickles_and_leaves_results_out(hub, tmp_path):
    """Where this fails, `PublishingTrainer` may go, and with it the private methods that it needs."""
    _, student = pair(BertForSequenceClassification)
    arguments = TrainingArguments(
        str(tmp_path / "out"), push_to_hub=True, hub_model_id="org/plain", hub_token="hf_good", hub_always_push=True,
        max_steps=2, save_steps=2, use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = Trainer(student, arguments, train_dataset=examples(student), data_collator=collate)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repo("org/plain").files()
    assert "training_args.bin" in files
    assert "results.json" not in files


def test_no_file_has_the_token_and_none_that_is_sent_a_local_path(hub, tmp_path):
    trainer = trainer_for(tmp_path, hub_strategy="checkpoint", report_to=["tensorboard"])
    (tmp_path / "bert").mkdir()
    trainer.objective.teacher.config.name_or_path = str(tmp_path / "bert")
    trainer.state.best_model_checkpoint = str(tmp_path / "out" / "checkpoint-2")
    trainer.train()
    trainer.push_to_hub()
    trainer.save_model(tmp_path / "out" / "model")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "trainer_state.json", "optimizer.pt"} <= {path.name for path in files}
    assert not [path for path in files if b"hf_good" in path.read_bytes()]
    for commit, _, _ in hub.repo("org/tiny").log:
        for name, content in hub.repo("org/tiny").files(commit).items():
            assert b"hf_good" not in content, name
            assert str(tmp_path).encode() not in content, name
    assert json.loads(hub.repo("org/tiny").files()["last-checkpoint/results.json"])["options"]["teacher"] == "./bert"
    again = torch.load(tmp_path / "out" / "model" / "training_args.bin", weights_only=False)
    assert (again.hub_model_id, again.objective) == ("org/tiny", trainer.args.objective)


STRANGER = """
    import sys
    sys.modules["kronecker_transformers"] = None
    from transformers import AutoModelForSequenceClassification
    for commit in sys.argv[1:]:
        model = AutoModelForSequenceClassification.from_pretrained(
            "org/tiny", trust_remote_code=True, revision=commit, code_revision=commit
        )
        assert type(model).__module__.startswith("transformers_modules.")
        print(commit, float(sum(p.detach().double().abs().sum() for p in model.parameters())))
"""


def test_every_commit_loads_without_the_package(hub, tmp_path):
    trainer = trainer_for(tmp_path, hub_strategy="every_save", learning_rate=1e-2)
    trainer.train()
    trainer.push_to_hub(license="mit")  # else it may be what was sent last, to a tenth of a second, and no commit
    commits = [commit for commit, _, _ in hub.repo("org/tiny").log[1:]]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STRANGER), *commits],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sums = dict(line.split() for line in done.stdout.splitlines())
    assert sums.keys() == set(commits)
    assert sums[commits[0]] != sums[commits[1]] == sums[commits[2]]
    ours = float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters()))
    assert float(sums[commits[2]]) == pytest.approx(ours)


def test_a_push_that_fails_does_not_stop_the_training(hub, tmp_path, caplog):
    hub.repos["models/org/tiny"] = Hub.empty_repo()
    hub.faults = [Fault("POST", "/commit/", 403)]
    trainer = trainer_for(tmp_path, hub_strategy="every_save")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "may not write to 'org/tiny'" in caplog.text
    assert "a training goes on" in caplog.text
    assert [message for _, _, message in hub.repo("org/tiny").log[1:]] == ["Training in progress, step 4"]


def test_what_cannot_be_in_the_card_is_refused_and_nothing_is_left(hub, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    trainer = trainer_for(tmp_path, hub_strategy="end")
    with pytest.raises(
        TypeError, match=r"push_to_hub has no argument 'finetuned_from'.*license, language and base_mod"
    ):
        trainer.push_to_hub(finetuned_from="org/teacher")
    monkeypatch.setattr("kronecker_transformers.hub.trainer.model_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.push_to_hub()
    assert [*(tmp_path / "scratch").iterdir()] == []


def test_branch_privacy_and_waiting(hub, tmp_path):
    trainer = trainer_for(tmp_path, hub_strategy="end", hub_private_repo=True, hub_revision="trial")
    trainer.train()
    future = trainer.push_to_hub(blocking=False)
    assert future.result().is_new
    repo = hub.repo("org/tiny")
    assert repo.private
    assert CODE in repo.files("trial")
    assert CODE not in repo.files("main")
