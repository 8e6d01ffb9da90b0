"""Distillation on several machines: what they exchange, how long a step takes, and what stage 1 of the papers costs.

    python benchmarks/scaling.py > benchmarks/logs/scaling.txt

Needs Linux and its superuser. Students of BERT-base's size (MaskedLM, weights as drawn for training from scratch) learn
from a teacher like it by `DistillationTrainer` under torchrun, all losses, batches of 8 x 64 tokens for each process,
one thread each: a dense student, and those of both presets. Each run has a network namespace of its own, of which the
loopback has the rate of so many links; the bytes that go over it in a step are counted.

What a step takes is predicted from one process without others (forward and backward pass, the rest of the step) and
from the rate at which processes average 64 MB in the same namespace: see `predicted`. Beside it stands what was
measured, the median of all steps but the first.

The arithmetic of stage 1 takes the tokens of the papers, the FLOPs that `describe` counts, and rates of two sources:
the steps of one process here, and forward passes of 64 x 128 tokens on an H100 (benchmarks/logs/gpu_models.txt), of
which a step has one by the teacher and, counting two for the backward pass, three by the student. That leaves out the
losses, the head and the optimizer, so these hours are a lower limit. Prices and links of GPUs are assumptions, and
options.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM, TrainerCallback

from kronecker_transformers import compress, describe
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import DistillationArguments, DistillationTrainer
from kronecker_transformers.evaluation.timing import environment

STUDENTS = ("dense", "7.7x", "21x")
BATCH, LENGTH, STEPS = 8, 64, 5
PROBE_BYTES = 64 * 2**20
"""Of a tensor that is averaged to find the rate of a link."""
LINKS = (None, 1000, 100)
"""Mbit/s of each process; None: as fast as it goes."""
WIKIPEDIA_TOKENS = 0.1 * 2.5e9 * 1.3
"""Of a pass of KroneckerBERT's stage 1: a tenth of English Wikipedia (2,500 M words: BERT's paper, section 3.1), 1.3
tokens to a word."""
PASSES = 3
GPU_TOKENS = 8192
"""Of a forward pass in gpu_models.txt."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step of one process alone, and what its gradients weigh."""

    forward: float
    backward: float
    rest: float
    gradient_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.forward + self.backward + self.rest


def exchanged(processes: int, gradient_bytes: float) -> float:
    """Bytes that each process sends to average gradients in a ring."""
    return 2 * (processes - 1) / processes * gradient_bytes


def predicted(step: Step, processes: int, bytes_per_second: float, cores: float) -> float:
    """Seconds of a step of several processes that share so many cores.

    Gradients are averaged while the backward pass still runs, whichever of both takes longer.
    """
    crowd = max(1.0, processes / cores)
    transfer = exchanged(processes, step.gradient_bytes) / bytes_per_second
    return crowd * (step.forward + step.rest) + max(crowd * step.backward, transfer)


class TimedTrainer(DistillationTrainer):
    """Keeps the seconds of each forward pass, and of forward and backward pass together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forward: list[float] = []
        self.both: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        start = time.perf_counter()
        loss = super().compute_loss(*args, **kwargs)
        self.forward.append(time.perf_counter() - start)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class."""
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.both.append(time.perf_counter() - start)
        return loss


class Clock(TrainerCallback):
    """When each step ended, and how many bytes had gone over the loopback by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.sent: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at both."""
        self.ends.append(time.perf_counter())
        lines = map(str.split, Path("/proc/net/dev").read_text().splitlines())
        self.sent += [int(words[9]) for words in lines if words[0] == "lo:"]


def models_of(name: str) -> tuple[Any, Any]:
    """A teacher of BERT-base's size, and its student."""
    torch.manual_seed(0)
    teacher: Any = BertForMaskedLM(BertConfig()).eval()
    return teacher, (copy.deepcopy(teacher) if name == "dense" else compress(teacher, name).model).train()


def work(name: str, target: Path) -> None:
    """One process of a training; the first of them writes what it saw."""
    torch.set_num_threads(1)
    teacher, student = models_of(name)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    ids = torch.randint(1000, 30000, (64 * BATCH, LENGTH), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch, max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True, ddp_backend="gloo",
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        clock = Clock()
        trainer = TimedTrainer(student, teacher, arguments, train_dataset=rows, callbacks=[clock])
        rate = link_rate() if arguments.world_size > 1 else None
        trainer.train()
    if trainer.is_world_process_zero():
        steps = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
        found = {
            "step": statistics.median(steps), "forward": statistics.median(trainer.forward[1:]),
            "both": statistics.median(trainer.both[1:]), "rate": rate,
            "sent": (clock.sent[-1] - clock.sent[0]) / len(steps) / arguments.world_size,
            "gradients": sum(p.nbytes for p in student.parameters() if p.requires_grad),
        }  # fmt: skip
        target.write_text(json.dumps(found))


def link_rate() -> float:
    """Bytes a second that each process sends while all average a tensor."""
    values = torch.zeros(PROBE_BYTES // 4)
    torch.distributed.all_reduce(values)
    start = time.perf_counter()
    torch.distributed.all_reduce(values)
    return exchanged(torch.distributed.get_world_size(), PROBE_BYTES) / (time.perf_counter() - start)


def measured(name: str, processes: int, megabits: int | None) -> dict[str, Any]:
    """What the first process of a training saw, in a network namespace of its own."""
    limit = ""
    if megabits is not None:  # all go over one loopback, so it has the rate of all their links
        limit = f"tc qdisc add dev lo root tbf rate {processes * megabits}mbit burst 1mb latency 1s && "
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = f'ip link set lo up && {limit}exec "$@"'
        script = [*launcher, __file__, "--work", name, str(target)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(
            ["unshare", "--net", "sh", "-c", command, "sh", *script],
            check=True, env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(target.read_text())


def time_steps(console: Console, numbers: tuple[int, ...], links: tuple[int | None, ...]) -> dict[str, Step]:
    """Show bytes and seconds of a step, predicted and measured; the steps of one process alone."""
    alone, rows = {}, {}
    cores = os.cpu_count() or 1
    for name in STUDENTS:
        one = measured(name, 1, None)
        forward, both = one["forward"], one["both"]
        step = alone[name] = Step(forward, both - forward, one["step"] - both, one["gradients"])
        rows[f"{name}, 1 process"] = ["", f"{one['gradients'] / 1e6:.1f}", "", "", f"{step.seconds:.2f}", "", ""]
        for processes in numbers:
            for megabits in links if processes == 2 else links[:1]:
                found = measured(name, processes, megabits)
                guess = predicted(step, processes, found["rate"], cores)
                link = "none" if megabits is None else f"{megabits:,} Mbit/s"
                rows[f"{name}, {processes} processes, limit {link}"] = [
                    f"{found['rate'] * 8 / 1e6:,.0f}", "", f"{found['sent'] / 1e6:.1f}", f"{guess:.2f}",
                    f"{found['step']:.2f}", f"{guess / found['step']:.2f}",
                    f"{processes * step.seconds / found['step']:.2f}",
                ]  # fmt: skip
                print(name, processes, megabits, found, file=sys.stderr, flush=True)
    headings = [
        "link, Mbit/s", "gradients, MB", "sent, MB", "predicted, s", "a step, s", "predicted / measured",
        "times one process",
    ]  # fmt: skip
    console.print(results_table(f"A step of {BATCH} x {LENGTH} tokens for each process", headings, rows))
    return alone


def gpu_seconds() -> dict[str, float]:
    """Of a forward pass of each student over `GPU_TOKENS`, by the first table of the log."""
    table = (ROOT / "logs" / "gpu_models.txt").read_text().split("\n64 x 128, bf16 ")[1]
    return {name: 1e-3 * float(table.split(f"\n{name} ")[1].split()[0]) for name in STUDENTS}


def price_stage_1(console: Console, alone: Mapping[str, Step], options: argparse.Namespace) -> None:
    """Show tokens, FLOPs, hours and money of KroneckerBERT's first stage."""
    tokens, gpu, rows = PASSES * WIKIPEDIA_TOKENS, gpu_seconds(), {}
    for name in STUDENTS:
        teacher, student = models_of(name)
        forward = [describe(model.base_model, LENGTH).factored for model in (teacher, student)]
        flops = tokens / LENGTH * (forward[0].linear_flops + 3 * forward[1].linear_flops)
        gradients = sum(p.nbytes for p in student.parameters())
        step = Step(gpu["dense"] + gpu[name], 2 * gpu[name], 0.0, gradients)
        row = [f"{tokens / 1e9:.2f}", f"{flops:.2g}"]
        row.append(f"{tokens / (BATCH * LENGTH / alone[name].seconds) / 3600 / 24:,.0f}")
        for number in (1, 8, 64):
            seconds = predicted(step, number, 1e9 * options.link, number)
            hours = tokens / (number * GPU_TOKENS) * seconds / 3600
            row.append(f"{hours:.2f} / {hours * number * options.price:,.0f}")
        rows[name] = row
    headings = ["tokens, G", "FLOPs", "days on one core here", *(f"{n} GPU: hours / dollars" for n in (1, 8, 64))]
    title = f"Stage 1 of KroneckerBERT; ${options.price:g} an hour and GPU, links of {options.link:g} GB/s (assumed)"
    console.print(results_table(title, headings, rows))


def main() -> None:
    """Measure, then reckon."""
    parser = argparse.ArgumentParser(description="Distillation on several machines.")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4], help="(default: 2 and 4)")
    parser.add_argument("--price", type=float, default=2.5, help="dollars for a GPU and hour (default: %(default)s)")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s of each GPU (default: %(default)s)")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], Path(options.work[1]))
        return
    console = Console(width=150)
    console.print(environment(), highlight=False)
    alone = time_steps(console, tuple(options.processes), LINKS)
    price_stage_1(console, alone, options)


if __name__ == "__main__":
    main()
