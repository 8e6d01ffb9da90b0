"""Honest timing: both sides in one process, in turn, after warming up, and on what machine."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..checkpoint.load import load_model
from ..checkpoint.teachers import check_pad_token
from ..models.kronecker_family import family_of, has_choices, longest_sequence
from ..models.kronecker_layers import KroneckerLinear
from .cost import describe

DTYPES = ("float32", "bfloat16", "float16")


def environment() -> str:
    """Hardware and versions, for the head of a log."""
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) // 2**20 for line in _read("/proc/meminfo") if line.startswith("MemTotal")]
    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    return (
        f"{gpu}CPU {names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, "
        f"{memory[0] if memory else '?'} GiB; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def in_turn(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, device: str | torch.device = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in which all take turns; rounds of warming up are not counted.

    A candidate has ended when the device has done what it was given.
    """
    device = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + warmup):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
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
    """Of the parameters, or of the graph in another runtime."""
    flops: int
    """For the batch: linear layers and the products of the attention."""
    milliseconds: float
    """Of a forward pass, median."""
    spread: float
    """Half the distance between the quartiles, relative to it."""
    limit_milliseconds: float
    """What remains of a forward pass with its linear layers at the rates of this machine (`limit_seconds`), or, in
    another runtime, without them."""
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
    runtime: str = "torch"
    """Or onnxruntime or openvino."""

    @property
    def speedup(self) -> float:
        """Above 1 the model is faster."""
        return self.against.milliseconds / self.model.milliseconds

    def verdict(self) -> str:
        """Whether the model pays on this machine, and what would if it does not."""
        size = self.against.parameters / self.model.parameters
        smaller = f"{size:.2f} times smaller" if size >= 1 else f"{1 / size:.2f} times larger"
        noise = self.model.spread + self.against.spread
        name, other = self.model.name, self.against.name
        if self.speedup > 1 + noise:
            return f"{name} is {self.speedup:.2f} times as fast as {other} here, and {smaller}."
        how = "as fast as" if self.speedup >= 1 - noise else f"{1 / self.speedup:.2f} times as slow as"
        remedy = (
            "Where time counts more, a factored model's dense twin (kronecker-transformers export) takes the time of "
            "the dense model, and a plan can be searched for a time (kronecker-transformers search --milliseconds)."
        )
        return f"{name} does not pay here: it is {how} {other}, and {smaller}. {remedy}"

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "speedup": self.speedup}


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
        ValueError: an argument is out of range, the sequence longer than a model takes, a classifier has no token for
            padding, or there is no compiler for `compiled`.
        OSError: a model cannot be read.
    """
    check_sizes(batch, length, rounds)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}; choose one")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        raise ValueError(f"device={device!r} cannot be used here ({error}); choose another, such as cpu") from error
    sources = {"model": model, "against": against}
    sides: dict[str, Any] = {}
    for key, source in sources.items():
        side: Any = copy.deepcopy(source) if isinstance(source, PreTrainedModel) else load_model(source)[0]
        check_length(side, length, source)
        if batch > 1:
            check_pad_token(side)
        sides[key] = side.to(dtype=getattr(torch, dtype), device=device).eval()
    costs = {key: describe(side, length).factored for key, side in sides.items()}
    passes = {key: forward_pass(side, batch, length, compiled) for key, side in sides.items()}
    if compiled:
        check_compiler(passes.values())
    rates = machine_rates(getattr(torch, dtype), device)
    with torch.inference_mode():
        seconds = in_turn(passes, rounds, device=device)
    limits = {key: limit_seconds(side, batch, length, rates, rounds) for key, side in sides.items()}
    measurements: dict[str, Any] = {}
    for key, cost in costs.items():
        source, peak = sources[key], None
        if device == "cpu" and not isinstance(source, PreTrainedModel):
            peak = process_memory(source, batch, length, dtype)
        middle, spread = median_and_spread(seconds[key])
        measurements[key] = Measurement(
            name=name_of(source), parameters=cost.parameters, bytes=cost.bytes, flops=batch * cost.total_flops,
            milliseconds=middle, spread=spread, limit_milliseconds=1e3 * limits[key], peak_bytes=peak,
        )  # fmt: skip
    return Comparison(
        **measurements, batch=batch, length=length, dtype=dtype, device=device, compiled=compiled,
        gemm_rate=rates[0], copy_rate=rates[1], environment=environment(),
    )  # fmt: skip


def check_compiler(passes: Iterable[Callable[[], Any]]) -> None:
    """Compile these passes.

    Raises:
        ValueError: it cannot be done here.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second

    try:
        with torch.inference_mode():
            for forward in passes:
                forward()
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.compile cannot be used here ({reason}); install a C++ compiler, or measure without it"
        ) from error


def check_sizes(batch: int, length: int, rounds: int) -> None:
    """Refuse what cannot be timed.

    Raises:
        ValueError: fewer than 1 sequence or token, or fewer than 2 rounds.
    """
    for name, value in (("batch", batch), ("length", length), ("rounds", rounds)):
        if value < (least := 2 if name == "rounds" else 1):
            raise ValueError(f"{name}={value} must be at least {least}; give a larger number")


def check_length(model: PreTrainedModel, length: int, source: str | os.PathLike[str] | PreTrainedModel) -> None:
    """Refuse sequences that a model does not take.

    Raises:
        ValueError: more tokens than it has positions.
    """
    if length > (most := longest_sequence(model)):
        raise ValueError(f"length={length} is more than the {most} tokens of {name_of(source)}; give a smaller one")


def name_of(source: str | os.PathLike[str] | PreTrainedModel) -> str:
    """What a model is called in tables: as it was given, or by its class."""
    return type(source).__name__ if isinstance(source, PreTrainedModel) else os.fspath(source)


def forward_pass(model: PreTrainedModel, batch: int, length: int, compiled: bool = False) -> Callable[[], Any]:
    """A function that runs the model on random tokens, without a cache for generation."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, length) if has_choices(model) else (batch, length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    options = {"use_cache": False} if family_of(model).causal else {}
    run: Any = torch.compile(model) if compiled else model
    return partial(run, ids, **options)


@contextmanager
def without_linear_layers(model: nn.Module) -> Iterator[None]:
    """In the block, linear layers give, at no cost, what one of their size once gave for an input of this shape."""
    outputs: dict[tuple[int, torch.Size], torch.Tensor] = {}

    def recall(size: int, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if (size, x.shape) not in outputs:
            outputs[size, x.shape] = compute(x)
        return outputs[size, x.shape]

    layers: list[Any] = list(_linear_layers(model))
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(recall, layer.nf if isinstance(layer, Conv1D) else layer.out_features, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _linear_layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D, KroneckerLinear)))


def limit_seconds(model: PreTrainedModel, batch: int, length: int, rates: tuple[float, float], rounds: int) -> float:
    """What remains of a forward pass if its linear layers only take the time of their products, or of their weights.

    That is the larger of their FLOPs at the rate of a large GEMM and of their bytes at that of a large copy; all else
    is measured, eager. Weights that stay in a cache between two passes may be read faster.
    """
    forward = forward_pass(model, batch, length)
    with torch.inference_mode(), without_linear_layers(model):
        rest = statistics.median(in_turn({"rest": forward}, rounds, device=model.device)["rest"])
    weights = {weight for layer in _linear_layers(model) for weight in layer.parameters()}
    flops = batch * describe(model, length).factored.linear_flops
    return rest + max(flops / rates[0], sum(weight.nbytes for weight in weights) / rates[1])


def machine_rates(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """FLOPs per second of a large matrix product, and bytes per second, read and written, of a large copy."""
    size, count = (2048, 2**27) if torch.device(device).type == "cpu" else (8192, 2**30)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = {"product": partial(torch.matmul, a, b), "copy": partial(target.copy_, source)}
    best = {name: min(times) for name, times in in_turn(works, 7, device=device).items()}
    return 2 * size**3 / best["product"], 2 * count / best["copy"]


def process_memory(source: str | os.PathLike[str], batch: int, length: int, dtype: str) -> int | None:
    """Peak memory, in bytes, of a process of its own that loads a model and makes one forward pass, on the CPU.

    What the libraries hold is not counted. None where the system does not tell.

    Raises:
        OSError: the process failed.
    """
    return memory_of(_print_memory, source, batch, length, dtype)


def memory_of(function: Callable[..., None], source: str | os.PathLike[str], *arguments: Any) -> int | None:
    """The number that a function of a module prints in a process of its own; None where the system tells no memory.

    Raises:
        OSError: the process failed.
    """
    if not tells_memory():
        return None
    name = function.__name__
    code = f"from {function.__module__} import {name}; {name}(*{(os.fspath(source), *arguments)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"memory of {os.fspath(source)!r} could not be measured: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def tells_memory() -> bool:
    """Whether the system tells the peak memory of a process: on Linux, unless a sandbox forbids it."""
    return os.access("/proc/self/clear_refs", os.W_OK) and os.access("/proc/self/status", os.R_OK)


def _print_memory(source: str, batch: int, length: int, dtype: str) -> None:
    with peak_memory() as extra, torch.inference_mode():
        forward_pass(load_model(source)[0].to(getattr(torch, dtype)), batch, length)()
    print(extra())


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Gives a function: bytes of the peak of this process since the block began, above what it held then (Linux)."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    yield lambda: _memory("VmHWM") - before


def _memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the memory held now, VmHWM its peak."""
    return 1024 * int(next(line.split()[1] for line in _read("/proc/self/status") if line.startswith(field)))
