"""The same training on two machines, with the launchers of docs/scaling.md, over real sockets."""

import json
import sys
from pathlib import Path

import pytest
import torch
from distilling_text import saved_teacher, text_file
from machines import needs_namespaces, two_machines
from transformers import BertForPreTraining

from kronecker_transformers.checkpoint.load import load_student

pytestmark = [pytest.mark.slow, needs_namespaces]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "distilling.py"
CONFIG = ROOT / "examples" / "accelerate" / "two-machines.yaml"
ARGUMENTS = {
    "max_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1, "per_device_train_batch_size": 4, "dropout": None,
    "save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo",
}  # fmt: skip
ENOUGH = 300
"""Seconds, after which a training hangs."""


def accelerate(machine):
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIG)]
    return [*launcher, "--main_process_ip", "10.77.0.1", "--machine_rank", str(machine.rank), "--max_restarts", "3"]


def torchrun(machine):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*launcher, "--master_addr", "10.77.0.1", "--node_rank", str(machine.rank), "--max_restarts", "3"]


def start(machine, folder, *events, launcher=accelerate, **changes):
    command = [*launcher(machine), str(SCRIPT), str(folder), json.dumps({**ARGUMENTS, **changes}), *events]
    log = folder.with_name(f"{folder.name}-{machine.rank}.log")
    return machine.start(command, log, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def ended(processes, folder):
    """The result of a training, once all its launchers have come to a good end."""
    codes = [process.wait(ENOUGH) for process in processes]
    logs = "\n".join(path.read_text()[-3000:] for path in folder.parent.glob(f"{folder.name}-*.log"))
    assert not any(codes), logs
    return torch.load(folder / "result.pt", weights_only=True)


def assert_same(found, expected, atol=0.0):
    assert found["processes"] == 2
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def machines():
    with two_machines() as both:
        yield both


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without accidents."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    with two_machines() as machines:
        return ended([start(machine, folder) for machine in machines], folder)


@pytest.mark.parametrize("launcher", [accelerate, torchrun])
def test_two_machines_equal_one_process(launcher, machines, tmp_path):
    """To 1e-6, in double precision: what is left is the order of sums."""
    exact = {"dtype": "float64", "dropout": 0.0}
    two = [start(machine, tmp_path / "two", launcher=launcher, **exact) for machine in machines]
    found = ended(two, tmp_path / "two")

    def alone(machine):
        return [sys.executable]

    one = start(machines[0], tmp_path / "one", launcher=alone, **exact, per_device_train_batch_size=8, ddp_backend=None)
    assert one.wait(ENOUGH) == 0
    expected = torch.load(tmp_path / "one" / "result.pt", weights_only=True)
    assert expected["processes"] == 1
    assert_same(found, expected, atol=1e-6)


@pytest.mark.parametrize("launcher", [accelerate, torchrun])
def test_a_machine_that_dies_in_a_step_comes_back_and_nothing_changes(launcher, machines, whole, tmp_path):
    folder = tmp_path / "killed"
    first, second = machines
    staying = start(first, folder, launcher=launcher)
    dying = start(second, folder, "die=4", launcher=launcher)
    assert dying.wait(ENOUGH) == -9
    assert not (folder / "result.pt").exists()
    found = ended([staying, start(second, folder, launcher=launcher)], folder)
    assert len(found["gradients"]) == 4  # of the steps after the checkpoint of step 2
    assert_same(found, whole)


@pytest.mark.parametrize("launcher", [accelerate, torchrun])
def test_after_the_death_of_rank_0_all_are_started_once_more_and_nothing_changes(launcher, machines, whole, tmp_path):
    """Its address is where all meet, so the launcher that is left cannot go on by itself: it ends, with an error."""
    folder = tmp_path / "killed"
    first, second = machines
    left = start(second, folder, launcher=launcher)
    assert start(first, folder, "die=4", launcher=launcher).wait(ENOUGH) == -9
    assert left.wait(ENOUGH) > 0
    assert not (folder / "result.pt").exists()
    found = ended([start(machine, folder, launcher=launcher) for machine in machines], folder)
    assert len(found["gradients"]) == 4  # of the steps after the checkpoint of step 2
    assert_same(found, whole)


def test_stage_1_goes_on_after_a_machine_was_switched_off(machines, tmp_path):
    """The script itself, with the options of docs/scaling.md."""
    teacher, folder = saved_teacher(BertForPreTraining, tmp_path / "teacher"), tmp_path / "out"
    options = [
        f"--teacher={teacher}", f"--train_text={text_file(tmp_path)}", f"--output_dir={folder}", "--max_length=16",
        "--no_next_sentence", "--use_cpu", "--per_device_train_batch_size=4", "--max_steps=6", "--save_steps=2",
        "--resume_from_checkpoint=true", "--report_to=none", "--disable_tqdm=true",
    ]  # fmt: skip

    def stage_1(machine, *script):
        log = tmp_path / f"out-{machine.rank}.log"
        return machine.start(
            [*accelerate(machine), *map(str, script), *options], log, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
        )

    first, second = machines
    script = ROOT / "examples" / "run_mlm_kd.py"
    staying = stage_1(first, script)
    assert stage_1(second, ROOT / "tests" / "dying_example.py", 4, "run_mlm_kd").wait(ENOUGH) == -9
    assert not (folder / "results.json").exists()
    codes = [process.wait(ENOUGH) for process in (staying, stage_1(second, script))]
    assert codes == [0, 0], (tmp_path / "out-0.log").read_text()[-3000:]
    record = json.loads((folder / "results.json").read_text())
    assert (record["training"]["steps"], record["training"]["samples"]) == (6, 2 * 4 * 6)
    assert type(load_student(folder / "student")[0]).__name__ == "KroneckerBertForPreTraining"


def test_ten_seconds_without_a_network_change_nothing(machines, whole, tmp_path):
    folder = tmp_path / "cut"
    first, second = machines
    found = ended([start(first, folder), start(second, folder, "cut=3")], folder)
    assert len(found["gradients"]) == 6  # it waited; nothing was begun anew
    assert_same(found, whole)
