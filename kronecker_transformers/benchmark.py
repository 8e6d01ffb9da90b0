"""Honest timing: both sides in one process, in turn, after warming up, and on what machine."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .checkpoint import load_model
from .models.kronecker_layers import KroneckerLinear
from .report import describe

DTYPES = ("float32", "bfloat16", "float16")


def environment() -> str:
    """Hardware and versions, for the head of a log."""
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) // 2**20 for line in _read("/proc/meminfo") if line.startswith("MemTotal")]
    return (
        f"CPU {names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, "
        f"{memory[0] if memory else '?'} GiB; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def in_turn(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in which all take turns; rounds of warming up are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + warmup):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[warmup:] for name, times in seconds.items()}


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """Median in milliseconds, and half the distance between the quartiles relative to it."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return 1e3 * middle, (high - low) / 2 / middle


@dataclass(frozen=True)
class Measurement:
    """What one model costs on this machine, for one batch."""

    name: str
    parameters: int
    bytes: int
    """Of the parameters."""
    flops: int
    """For the batch: linear layers and the products of the attention."""
    milliseconds: float
    """Of a forward pass, median."""
    spread: float
    """Half the distance between the quartiles, relative to it."""
    limit_milliseconds: float
    """What a forward pass takes at least: linear layers at the rates of this machine, the rest as measured, eager."""
    peak_bytes: int | None
    """Memory of a process that loads the model and makes one forward pass, above that of one which has only imported
    the libraries; None where it cannot be known (no folder, another system than Linux)."""


@dataclass(frozen=True)
class Comparison:
    """A model and another one, measured in turn."""

    model: Measurement
    against: Measurement
    batch: int
    length: int
    """Tokens of a sequence."""
    dtype: str
    device: str
    compiled: bool
    gemm_rate: float
    """FLOPs per second of a large matrix product."""
    copy_rate: float
    """Bytes per second, read and written, of a large copy."""
    environment: str

    @property
    def speedup(self) -> float:
        """Above 1 the model is faster."""
        return self.against.milliseconds / self.model.milliseconds

    def table(self) -> Table:
        """Both models and their ratios, for a terminal."""
        compiled = ", compiled" if self.compiled else ""
        title = f"{self.batch} x {self.length} tokens, {self.dtype}, {self.device}{compiled}"
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("")
        for heading in (self.against.name, self.model.name, "ratio"):
            table.add_column(heading, justify="right", overflow="fold")
        sides = (self.against, self.model)
        rows: list[tuple[str, list[float], str]] = [
            ("parameters", [side.parameters for side in sides], "{:,.0f}"),
            ("megabytes", [side.bytes / 1e6 for side in sides], "{:,.1f}"),
            ("GFLOPs", [side.flops / 1e9 for side in sides], "{:,.2f}"),
            ("milliseconds", [side.milliseconds for side in sides], "{:,.2f}"),
        ]
        if all(side.peak_bytes for side in sides):
            rows.append(("peak megabytes of a process", [(side.peak_bytes or 0) / 1e6 for side in sides], "{:,.0f}"))
        for label, values, form in rows:
            table.add_row(label, *map(form.format, values), f"{values[0] / values[1]:.2f}x")
        rates = [1e3 * self.batch / side.milliseconds for side in sides]
        table.add_row("sequences per second", *(f"{rate:,.1f}" for rate in rates), f"{rates[1] / rates[0]:.2f}x")
        limits = [side.limit_milliseconds for side in sides]
        table.add_row("at least milliseconds", *(f"{limit:,.2f}" for limit in limits), f"{limits[0] / limits[1]:.2f}x")
        table.add_row("of this limit", *(f"{side.limit_milliseconds / side.milliseconds:.0%}" for side in sides), "")
        return table

    def verdict(self) -> str:
        """Whether the model pays on this machine, and what would if it does not."""
        size = self.against.parameters / self.model.parameters
        smaller = f"{size:.2f} times smaller" if size >= 1 else f"{1 / size:.2f} times larger"
        noise = self.model.spread + self.against.spread
        name, other = self.model.name, self.against.name
        if self.speedup > 1 + noise:
            return f"{name} is {self.speedup:.2f} times as fast as {other} here, and {smaller}."
        how = "as fast as" if self.speedup >= 1 - noise else f"{1 / self.speedup:.2f} times as slow as"
        twin = "its dense twin (kronecker-transformers expand) takes the time of the dense model"
        return f"{name} does not pay here: it is {how} {other}, though {smaller}. Where time counts more, {twin}."

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "speedup": self.speedup}

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Both models, time against size, and the limits, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a picture needs matplotlib; pip install matplotlib") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for side in (self.against, self.model):
            megabytes = side.bytes / 1e6
            points = axes.plot(megabytes, side.milliseconds, "o", label=side.name)
            axes.plot(megabytes, side.limit_milliseconds, "_", color=points[0].get_color(), markersize=12)
        axes.set(
            xlabel="megabytes of parameters", ylabel="milliseconds (bar: the limit)", xlim=(0, None), ylim=(0, None)
        )
        axes.set_title(f"{self.batch} x {self.length} tokens, {self.dtype}, {self.device}")
        axes.legend()
        figure.savefig(path, dpi=110)


def benchmark(
    model: str | os.PathLike[str] | PreTrainedModel,
    against: str | os.PathLike[str] | PreTrainedModel,
    *,
    batch: int = 1,
    length: int = 128,
    dtype: str = "float32",
    device: str = "cpu",
    compiled: bool = False,
    rounds: int = 15,
) -> Comparison:
    """Measure a model beside another one, both in this process and in turn.

    Args:
        model: name on the Hub, folder, or loaded model, factored or dense; a loaded one is not changed.
        against: the same; its teacher, say.
        batch: sequences.
        length: tokens of each.
        dtype: float32, bfloat16 or float16, of weights and activations.
        device: a torch device.
        compiled: with `torch.compile`, both.
        rounds: in which both take turns, after two to warm up.

    Raises:
        ValueError: an argument is out of range, or the sequence longer than a model takes.
        OSError: a model cannot be read.
    """
    for name, value in (("batch", batch), ("length", length), ("rounds", rounds)):
        if value < (least := 2 if name == "rounds" else 1):
            raise ValueError(f"{name}={value} must be at least {least}; give a larger number")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}; choose one")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        raise ValueError(f"device={device!r} cannot be used here ({error}); choose another, such as cpu") from error
    sources = {"model": model, "against": against}
    sides: dict[str, Any] = {}
    for key, source in sources.items():
        side: Any = copy.deepcopy(source) if isinstance(source, PreTrainedModel) else load_model(source)[0]
        if length > (most := side.config.max_position_embeddings):
            raise ValueError(f"length={length} is more than the {most} tokens of {_name(source)}; give a smaller one")
        sides[key] = side.to(dtype=getattr(torch, dtype), device=device).eval()
    gemm_rate, copy_rate = machine_rates(getattr(torch, dtype), device)
    with torch.inference_mode():
        plain = {key: forward_pass(side, batch, length) for key, side in sides.items()}
        ways = {key: forward_pass(side, batch, length, compiled) for key, side in sides.items()} if compiled else plain
        seconds = in_turn(ways, rounds)
        with ExitStack() as stack:
            for side in sides.values():
                stack.enter_context(without_linear_layers(side))
            rests = {key: statistics.median(times) for key, times in in_turn(plain, rounds).items()}
    measurements = {}
    for key, side in sides.items():
        source, costs, peak = sources[key], describe(side, length).factored, None
        if device == "cpu" and not isinstance(source, PreTrainedModel):
            peak = process_memory(source, batch, length, dtype)
        middle, spread = median_and_spread(seconds[key])
        limit = rests[key] + max(batch * costs.linear_flops / gemm_rate, costs.bytes / copy_rate)
        measurements[key] = Measurement(
            name=_name(source), parameters=costs.parameters, bytes=costs.bytes, flops=batch * costs.total_flops,
            milliseconds=middle, spread=spread, limit_milliseconds=1e3 * limit, peak_bytes=peak,
        )  # fmt: skip
    return Comparison(
        **measurements, batch=batch, length=length, dtype=dtype, device=device, compiled=compiled,
        gemm_rate=gemm_rate, copy_rate=copy_rate, environment=environment(),
    )  # fmt: skip


def _name(source: str | os.PathLike[str] | PreTrainedModel) -> str:
    return type(source).__name__ if isinstance(source, PreTrainedModel) else os.fspath(source)


def forward_pass(model: PreTrainedModel, batch: int, length: int, compiled: bool = False) -> Callable[[], Any]:
    """A function that runs the model on random tokens, and waits for its device; without a cache for generation."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, length) if "MultipleChoice" in type(model).__name__ else (batch, length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    options = {"use_cache": False} if model.config.model_type.endswith("gpt2") else {}
    run: Any = torch.compile(model) if compiled else model

    def forward() -> Any:
        output = run(ids, **options)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize()
        return output

    return forward


@contextmanager
def without_linear_layers(model: nn.Module) -> Iterator[None]:
    """In the block, every linear layer gives what it once gave for an input of this shape, at no cost."""
    outputs: dict[tuple[nn.Module, torch.Size], torch.Tensor] = {}

    def recall(layer: nn.Module, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if (layer, x.shape) not in outputs:
            outputs[layer, x.shape] = compute(x)
        return outputs[layer, x.shape]

    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D, KroneckerLinear))
    ]
    for layer in layers:
        layer.forward = partial(recall, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def machine_rates(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """FLOPs per second of a large matrix product, and bytes per second, read and written, of a large copy."""
    a, b = torch.randn(2, 2048, 2048, device=device).to(dtype)
    source = torch.zeros(2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = {"product": partial(torch.matmul, a, b), "copy": partial(target.copy_, source)}

    def timed(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            if a.device.type != "cpu":
                torch.accelerator.synchronize()

        return run

    best = {name: min(times) for name, times in in_turn({k: timed(w) for k, w in works.items()}, 7).items()}
    return 2 * 2048**3 / best["product"], 2 * source.nbytes / best["copy"]


def process_memory(source: str | os.PathLike[str], batch: int, length: int, dtype: str) -> int | None:
    """Peak memory, in bytes, of a process of its own that loads a model and makes one forward pass, on the CPU.

    What the libraries hold is not counted. None where the system does not tell (other than Linux).

    Raises:
        OSError: the process failed.
    """
    if not Path("/proc/self/status").exists():
        return None
    code = f"from {__name__} import _print_memory; _print_memory(*{(os.fspath(source), batch, length, dtype)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"memory of {os.fspath(source)!r} could not be measured: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def _print_memory(source: str, batch: int, length: int, dtype: str) -> None:
    before = memory("VmRSS")
    model = load_model(source)[0].to(getattr(torch, dtype))
    with torch.inference_mode():
        forward_pass(model, batch, length)()
    print(memory("VmHWM") - before)


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the memory that this process holds, VmHWM its peak (Linux)."""
    return 1024 * int(next(line.split()[1] for line in _read("/proc/self/status") if line.startswith(field)))
