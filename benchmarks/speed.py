"""Speed and memory of whole models on a CPU, beside the dense models they come from.

    python benchmarks/speed.py --picture benchmarks/logs/speed.png | tee benchmarks/logs/speed.txt

Weights are drawn as for training from scratch, seed 0. All ways to run a model take turns in one process; median of the
rounds, and ratios to the better of the dense model's two ways, eager and under `torch.compile` (dynamic shapes). Above
1 the factored model is faster. The limit is the ratio that linear layers at the rate of a large GEMM (or their bytes at
that of a large copy, if that takes longer) would give, with all else as measured in the factored model. --only SECTION
runs one section, --trial all of them with tiny models; --picture draws speed against size, fp32, without torch.compile.
At the end of the log are two sections of a later run, on another processor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import low_rank_plan
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_model, save_folder
from kronecker_transformers.display import picture_axes
from kronecker_transformers.evaluation.cost import describe
from kronecker_transformers.evaluation.timing import (
    environment,
    in_turn,
    limit_seconds,
    machine_rates,
    median_and_spread,
    peak_memory,
    process_memory,
)

BATCHES = ((1, 16), (1, 128), (8, 128), (32, 128), (1, 512), (8, 512))  # batch x length
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 200,
}
PLANS = ("7.7x", "21x")
PROMPT, NEW = 128, 128
"""Tokens of a generation."""


@dataclass(frozen=True)
class Point:
    """Of the picture."""

    work: str
    model: str
    megabytes: float
    """Of parameters."""
    speedup: float
    """Over the dense model."""


def megabytes(model: Any) -> float:
    """Of parameters, those that are tied counted once."""
    return describe(model, 1).factored.bytes / 1e6


def rounds(tokens: int) -> int:
    """Fewer for what takes seconds."""
    return 15 if tokens < 1000 else 7


def inference(trial: bool) -> list[Point]:
    """One forward pass, fp32 and bf16."""
    points = []
    models: dict[str, dict[str, Any]] = {"tiny": TINY} if trial else {"BERT-base": {}, "MiniLM": MINILM}
    columns = "".join(f"{plan:>9s} {'compiled':>9s} {'ratio':>7s} {'limit':>7s}" for plan in PLANS)
    print(f"{'model':10s} {'dtype':9s} {'batch':>7s} {'dense ms':>9s} {'compiled':>9s} {'spread':>7s} {columns}")
    for name, sizes in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()  # all models share code objects, of which only so many versions are compiled
            torch.manual_seed(0)
            dense = BertModel(BertConfig(**sizes)).eval()
            sides: dict[str, Any] = {"dense": dense, **{plan: compress(dense, plan).model for plan in PLANS}}
            sides = {side: model.to(dtype) for side, model in sides.items()}
            compiled = {side: torch.compile(model, dynamic=True) for side, model in sides.items()}
            rates = machine_rates(dtype)
            for batch, length in ((2, 16),) if trial else BATCHES:
                torch.manual_seed(0)
                ids = torch.randint(100, dense.config.vocab_size, (batch, length))
                ways = {(side, way): partial(model, ids) for way, models_ in (("eager", sides), ("compiled", compiled))
                        for side, model in models_.items()}  # fmt: skip
                seconds = in_turn({f"{side} {way}": run for (side, way), run in ways.items()}, rounds(batch * length))
                found = {key: median_and_spread(times) for key, times in seconds.items()}
                best, spread = min(found["dense eager"], found["dense compiled"])
                row = f"{found['dense eager'][0]:9.2f} {found['dense compiled'][0]:9.2f} {spread:7.0%} "
                for plan in PLANS:
                    limit = 1e3 * limit_seconds(sides[plan], batch, length, rates, rounds(batch * length))
                    times = [found[f"{plan} {way}"][0] for way in ("eager", "compiled")]
                    row += f"{times[0]:9.2f} {times[1]:9.2f} {best / min(times):6.2f}x {best / limit:6.2f}x"
                print(f"{name:10s} {str(dtype)[6:]:9s} {batch:3d}x{length:3d} {row}", flush=True)
                if dtype == torch.float32 and (name, length) == ("BERT-base", 128):
                    points += [
                        Point(f"{name}, {batch} x {length}", side, megabytes(model), eager / found[f"{side} eager"][0])
                        for eager in [found["dense eager"][0]] for side, model in sides.items()
                    ]  # fmt: skip
    return points


def generation(trial: bool) -> list[Point]:
    """GPT-2 with its cache, greedy; tokens per second, and the prompt alone."""
    points = []
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 200} if trial else {}
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    half = GPT2LMHeadModel(GPT2Config(**{**sizes, "n_layer": dense.config.n_layer // 2})).eval()
    models = {"dense": dense, "kngpt2": compress(dense, "kngpt2").model, "half of the layers": half}
    new = 4 if trial else NEW
    print(f"{'model':20s} {'batch':>5s} {'prompt ms':>10s} {'ratio':>6s} {'tokens/s':>9s} {'spread':>7s} {'ratio':>6s}")
    for batch in (1, 8):
        ids = torch.randint(100, dense.config.vocab_size, (batch, PROMPT))
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0,
                   "attention_mask": torch.ones_like(ids)}  # fmt: skip
        prompts = in_turn({name: partial(model, ids, use_cache=True) for name, model in models.items()}, 9)
        works = {name: partial(model.generate, ids, **options) for name, model in models.items()}
        seconds = in_turn(works, 5, warmup=1)
        for name in models:
            prompt, (whole, spread) = median_and_spread(prompts[name])[0], median_and_spread(seconds[name])
            first, reference = (median_and_spread(times["dense"])[0] for times in (prompts, seconds))
            print(
                f"{name:20s} {batch:5d} {prompt:10.1f} {first / prompt:5.2f}x {1e3 * batch * new / whole:9.1f} "
                f"{spread:7.0%} {reference / whole:5.2f}x", flush=True,
            )  # fmt: skip
            if name != "half of the layers":
                points.append(Point(f"GPT-2, {batch} x {new} new", name, megabytes(models[name]), reference / whole))
    return points


def training_step(model: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Forward and backward, and a step if there is an optimizer."""
    model(ids).last_hidden_state.square().mean().backward()
    if optimizer:
        optimizer.step()
    model.zero_grad()


def training(trial: bool) -> list[Point]:
    """Forward and backward of 8 x 128 tokens, fp32; memory: the peak of a process that makes one step with AdamW.

    Beside the presets: all layers of low rank, with as many parameters.
    """
    batch, length = (2, 16) if trial else (8, 128)
    torch.manual_seed(0)
    sizes: dict[str, Any] = TINY if trial else {}
    dense: Any = BertModel(BertConfig(**sizes))
    models: dict[str, Any] = {"dense": dense}
    for plan in PLANS:
        models[plan] = compress(dense.eval(), plan).model
        low_rank = low_rank_plan(dense, models[plan].num_parameters())
        models[f"low rank, as {plan}"] = compress(dense, low_rank).model
    ids = torch.randint(100, dense.config.vocab_size, (batch, length))
    works = {name: partial(training_step, model.train(), ids) for name, model in models.items()}
    seconds = in_turn(works, rounds(batch * length))
    print(f"{'model':20s} {'step ms':>9s} {'spread':>7s} {'share':>7s} {'peak MB':>8s} {'of 4 x as many':>15s}")
    for name, model in models.items():
        peaks = []
        with tempfile.TemporaryDirectory() as scratch:
            save_folder(Path(scratch) / "model", model)
            for sequences in (batch, 4 * batch):
                command = [sys.executable, __file__, "--step", f"{scratch}/model", str(sequences), str(length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peaks.append(int(done.stdout.split()[-1]) / 1e6)
        (middle, spread), (reference, _) = median_and_spread(seconds[name]), median_and_spread(seconds["dense"])
        row = f"{name:20s} {middle:9.1f} {spread:7.0%} {middle / reference:7.2f} {peaks[0]:8.0f} {peaks[1]:15.0f}"
        print(row, flush=True)
    return []


def one_step(folder: str, batch: int, length: int) -> None:
    """In a process of its own: one step, and what memory that took above the imports."""
    with peak_memory() as extra:
        model = load_model(folder)[0].train()
        ids = torch.randint(model.config.vocab_size, (batch, length))
        training_step(model, ids, torch.optim.AdamW(model.parameters()))
    print(extra())


def footprint(trial: bool) -> list[Point]:
    """A saved model: bytes on disk, time to load, and memory of a process that loads it and runs 1 x 128 tokens."""
    sizes: dict[str, Any] = TINY if trial else {}
    dense = BertModel(BertConfig(**sizes)).eval()
    print(f"{'model':10s} {'disk MB':>8s} {'load ms':>8s} {'peak MB':>8s}")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for name in ("dense", *PLANS):
            folders[name] = Path(scratch) / name
            save_folder(folders[name], dense if name == "dense" else compress(dense, name).model)
        loads: dict[str, Callable[[], object]] = {name: partial(load_model, folder) for name, folder in folders.items()}
        seconds = in_turn(loads, 7)
        for name, folder in folders.items():
            disk = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            peak = (process_memory(folder, 1, 128, "float32") or 0) / 1e6
            print(f"{name:10s} {disk:8.1f} {median_and_spread(seconds[name])[0]:8.1f} {peak:8.0f}", flush=True)
    return []


def draw(points: list[Point], path: Path) -> None:
    """One line for each work, from the dense model to the smallest."""
    figure, axes = picture_axes()
    for work in dict.fromkeys(point.work for point in points):
        line = [point for point in points if point.work == work]
        axes.plot([point.megabytes for point in line], [point.speedup for point in line], "o-", label=work)
    highest: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: point.speedup):
        if point.model != "dense":
            highest[point.model] = point
    for name, point in highest.items():
        axes.annotate(name, (point.megabytes, point.speedup), xytext=(8, -3), textcoords="offset points")
    axes.set(
        xlabel="megabytes of parameters", ylabel="times as fast as the dense model", xlim=(0, None), ylim=(0, None)
    )
    axes.axhline(1, color="0.7", linewidth=1)
    axes.legend()
    figure.savefig(path, dpi=110)


SECTIONS: dict[str, Callable[[bool], list[Point]]] = {
    "inference": inference, "generation": generation, "training": training, "footprint": footprint
}  # fmt: skip


def main() -> None:
    """Run all sections, or one."""
    parser = argparse.ArgumentParser(description="Speed and memory of whole models on a CPU.")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--trial", action="store_true", help="tiny models")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bar()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if options.step:
        one_step(options.step[0], int(options.step[1]), int(options.step[2]))
        return
    print(environment())
    points = []
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            print(f"\n{name}: {' '.join((section.__doc__ or '').split())}", flush=True)
            start = time.perf_counter()
            with torch.set_grad_enabled(name == "training"):
                points += section(options.trial)
            print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    if options.picture:
        draw(points, options.picture)


if __name__ == "__main__":
    main()
