"""Honest timing: both sides in one process, in turn, after warming up, and on what machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers


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
