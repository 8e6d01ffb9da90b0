"""A training on two local workers of Ray, of which one is killed."""

import importlib.util
import os
import subprocess
import sys
import time

import psutil
import pytest
from distilling_text import saved_teacher, text_file
from examples_runner import EXAMPLES
from safetensors.torch import load_file
from transformers import BertForPreTraining

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
]
ENOUGH = 600
"""Seconds, after which a training hangs."""
SAVED = 20


def start(folder, name):
    """Stage 1 of 100 steps; what it writes is in the folder of this name."""
    options = [
        f"--teacher={folder / 'teacher'}", f"--train_text={folder / 'text.txt'}", f"--output_dir={folder / name}",
        "--max_length=16", "--no_next_sentence", "--per_device_train_batch_size=4", "--max_steps=100",
        f"--save_steps={SAVED}", "--resume_from_checkpoint=true", "--report_to=none", "--disable_tqdm=true",
    ]  # fmt: skip
    launcher = [sys.executable, str(EXAMPLES / "run_on_ray.py"), "--workers=2", "--cpu", f"--storage={folder / 'ray'}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [*launcher, "run_mlm_kd", *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def weights(process, folder, name):
    """Of the student, once all is over."""
    assert process.wait(ENOUGH) == 0, (folder / f"{name}.log").read_text()[-3000:]
    return load_file(folder / name / "student" / "model.safetensors")


def kill_a_worker(process, folder):
    """As soon as there is a checkpoint."""
    end = time.monotonic() + ENOUGH
    while not (folder / "checkpoints" / f"checkpoint-{SAVED}" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True)
        if any("RayTrainWorker" in word for word in child.cmdline())
    ]  # fmt: skip
    assert len(workers) == 2
    workers[1].kill()
    assert not (folder / "student").exists()


def test_a_killed_worker_comes_back_and_nothing_changes(tmp_path):
    saved_teacher(BertForPreTraining, tmp_path / "teacher")
    text_file(tmp_path)
    whole = weights(start(tmp_path, "whole"), tmp_path, "whole")
    process = start(tmp_path, "killed")
    kill_a_worker(process, tmp_path / "killed")
    found = weights(process, tmp_path, "killed")
    assert found.keys() == whole.keys()
    assert all(found[name].equal(weight) for name, weight in whole.items())
