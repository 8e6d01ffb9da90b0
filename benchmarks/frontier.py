"""The figure of the README: quality against megabytes and against milliseconds, all in ONNX Runtime.

    python benchmarks/frontier.py --data DIR --work WORK | tee benchmarks/logs/frontier.txt

DIR holds the folders glue (the official files) and text. The teacher is all-MiniLM-L6-v2 without its pooler. Its
students are distilled as in plans.py, with the objective that its log had (800 steps of 64 texts, one seed), whatever
they are: searched plans, low rank everywhere, and what is left if layers are dropped: half of them, at two learning
rates, or all but one with an embedding of low rank; and both, half of the layers and these factored, after another 800
steps. All are exported by `export_onnx` in fp32, int8 and int4. Quality is the Spearman correlation on STS-B's dev set,
sentence by sentence; time is that of a forward pass of 1 x 128 and of 8 x 128 tokens on one thread, all models in turn
in one process. WORK keeps trained students and graphs, so that the script can be stopped at any time; --draw draws the
figure of a log without running anything.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import KEEP_MEMORY, ROOT, in_parallel, low_rank_plan
from datasets import disable_progress_bars
from device import embeddings, instructions, ours
from matplotlib.figure import Figure
from plans import STEPS, Data, Run, budget, factored, train, with_embedding
from scipy.stats import spearmanr
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.distillation.start import keep_layers
from kronecker_transformers.evaluation.sessions import session_pass
from kronecker_transformers.evaluation.timing import environment, in_turn
from kronecker_transformers.export.parity import FORMS
from kronecker_transformers.export.runtimes import open_session

ROUNDS = 21
SHAPES = ((1, 128), (8, 128))
STUDENTS = {
    "3 of 6 layers, rate 1e-3": ("", 1e-3), "3 of 6 layers": ("", 3e-4), "searched, 7.7x": ("7.7x", 1e-3),
    "low rank, 7.7x": ("7.7x", 1e-3), "1 layer, low-rank embedding": ("7.7x", 1e-3), "searched, 21x": ("21x", 1e-3),
    "low rank, 21x": ("21x", 1e-3), "3 layers, searched, 7.7x": ("7.7x", 1e-3),
    "3 layers, low rank, 7.7x": ("7.7x", 1e-3),
}  # fmt: skip
"""The preset whose size they have, and the learning rate."""
KEPT = [1, 3, 5]
"""Of the layers."""
MARKERS = {"fp32": "s", "int8": "o", "int4": "v"}
COLORS = {
    "dense": "black", "3 of 6 layers": "tab:gray", "1 layer, low-rank embedding": "tab:gray",
    "searched, 7.7x": "tab:blue", "searched, 21x": "tab:blue", "low rank, 7.7x": "tab:orange",
    "low rank, 21x": "tab:orange", "3 layers, searched, 7.7x": "tab:green", "3 layers, low rank, 7.7x": "tab:olive",
}  # fmt: skip
"""Of the models that are drawn."""
STATIC = {"potion-base-4M": (3.7, 72.19 / 78.90), "potion-base-8M": (7.5, 73.24 / 78.90)}
"""Millions of parameters, and the share of all-MiniLM's mean over MTEB's STS tasks: results/README.md of model2vec."""
FIGURE = ROOT.parent / "docs" / "frontier.png"


def made(name: str, data: Data) -> tuple[Any, list[int] | None]:
    """An untrained student, and the teacher's layers that its layers learn from if that is not one to one."""
    teacher, (size, rate) = data.teacher, STUDENTS[name]
    plan: Any
    if name.startswith("3 of 6 layers"):
        return keep_layers(teacher, KEPT), KEPT
    if name == "1 layer, low-rank embedding":
        cut = keep_layers(teacher, [0]).eval()
        plan = with_embedding(cut, {}, budget(teacher, size))
        student = compress(cut, plan, calibration=data.calibration, tokenizer=data.tokenizer).model
        return student, [teacher.config.num_hidden_layers - 1]
    if name.startswith("3 layers"):  # of the student with half of the layers, distilled once more
        half: Any = load_model(data.work / "3 of 6 layers")[0].eval()
        limit = budget(teacher, size)
        plan = low_rank_plan(half, limit)
        if "searched" in name:
            plan = search_plan(half, data.calibration, parameters=limit, tokenizer=data.tokenizer).plan
        return compress(half, plan, calibration=data.calibration, tokenizer=data.tokenizer).model, KEPT
    kind = "low rank" if name.startswith("low rank") else "searched plan"
    return factored(Run(f"{kind}, calibrated", size, rate, STEPS), data).model, None


def train_student(name: str, options: argparse.Namespace) -> None:
    """Make, distil and save one student."""
    data = Data(options.data, options.work)
    student, layer_map = made(name, data)
    size, rate = STUDENTS[name]
    train(student, Run(name, size, rate, STEPS), data, layer_map)
    student.save_pretrained(draft := options.work / f".{name}")
    data.tokenizer.save_pretrained(draft)
    draft.rename(options.work / name)


def in_process(name: str, options: argparse.Namespace) -> None:
    """One student, in a process of its own."""
    places = ["--data", str(options.data), "--work", str(options.work)]
    command = [sys.executable, __file__, *places, "--student", name]
    subprocess.run(command, check=True, env={**os.environ, **KEEP_MEMORY})


def measure(options: argparse.Namespace) -> None:
    """Print a row for each model and form."""
    data = Data(options.data, options.work)
    table, tokenizer = data.sts["validation"], data.tokenizer
    models = {"dense": data.teacher, **{name: load_model(options.work / name)[0] for name in STUDENTS}}
    paths: dict[tuple[str, str], Path] = {}
    for name, model in models.items():
        folder = ours(model, options.work / f"graphs-{name}")
        paths |= {(name, form): folder / FORMS[form] for form in MARKERS}
    sessions = {key: open_session(path, 1) for key, path in paths.items()}
    times: dict[Any, list[float]] = defaultdict(list)
    for batch, length in SHAPES:
        passes = {f"{name}|{form}": session_pass(s, batch, length) for (name, form), s in sessions.items()}
        for key, seconds in in_turn(passes, ROUNDS if batch == 1 else ROUNDS // 2).items():
            times[tuple(key.split("|"))].append(1e3 * statistics.median(seconds))
    print(f"{'model':32s}{'parameters':>12s}{'form':>6s}{'MB':>7s}{'1x128':>8s}{'8x128':>8s}{'STS-B':>8s}")
    for (name, form), path in paths.items():
        first, second = (
            embeddings(sessions[name, form], tokenizer, table[side][:]) for side in ("sentence1", "sentence2")
        )
        score = 100 * spearmanr((first * second).sum(1), table["label"][:]).statistic
        row = f"{name:32s}{models[name].num_parameters():12,d}{form:>6s}{path.stat().st_size / 1e6:7.1f}"
        print(row + "".join(f"{time:8.2f}" for time in times[name, form]) + f"{score:8.2f}", flush=True)


def draw(log: Path) -> None:
    """The figure, from the rows of a log."""
    row = r"^(.{32}) *[\d,]+ +(fp32|int8|int4) +([\d.]+) +([\d.]+) +[\d.]+ +([\d.]+)$"
    rows = re.findall(row, log.read_text(), re.MULTILINE)
    found = {(name.strip(), form): tuple(map(float, values)) for name, form, *values in rows}
    figure = Figure(figsize=(12, 5), layout="constrained")
    sizes, speeds = figure.subplots(1, 2, sharey=True)
    for name, color in COLORS.items():
        for axes, column in ((sizes, 0), (speeds, 1)):
            points = [(found[name, form][column], found[name, form][2]) for form in MARKERS]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.4)
            for marker, point in zip(MARKERS.values(), points, strict=True):
                axes.plot(*point, marker, color=color, markersize=6)
            place = (0, 8 if name == "dense" else -13)
            axes.annotate(
                name, points[1], place, textcoords="offset points", fontsize="small", color=color, ha="center"
            )
    teacher = found["dense", "fp32"][2]
    for name, (millions, share) in STATIC.items():
        sizes.plot(4 * millions, share * teacher, "*", color="grey", markersize=10)
        sizes.annotate(
            name, (4 * millions, share * teacher), (0, -14), textcoords="offset points", fontsize="small", color="grey",
            ha="center",
        )  # fmt: skip
    for form, marker in MARKERS.items():
        speeds.plot([], [], marker, color="black", label=form, linestyle="")
    speeds.legend(loc="lower right")
    sizes.set(xlabel="megabytes", ylabel="STS-B dev, Spearman, per cent", ylim=(77, 88))
    speeds.set(xlabel="milliseconds, 1 x 128 tokens, one thread")
    for axes, ticks in ((sizes, [1, 2, 4, 8, 16, 32, 64, 128]), (speeds, [1, 2, 4, 8, 16, 32, 64])):
        axes.set_xscale("log")
        axes.set_xlim(ticks[0] / 1.2, ticks[-1])
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Train what is missing, measure all, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with glue and text")
    parser.add_argument("--work", type=Path, help="folder for students and graphs")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--draw", type=Path, metavar="LOG", help="only draw the figure of a log")
    parser.add_argument("--student", help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if options.draw:
        draw(options.draw)
    elif options.student:
        train_student(options.student, options)
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        missing = [name for name in STUDENTS if not (options.work / name).exists()]
        in_parallel([partial(in_process, name, options) for name in missing], options.processes)
        torch.set_grad_enabled(False)
        print(f"{environment()}, onnxruntime {onnxruntime.__version__}; {instructions()}")
        measure(options)


if __name__ == "__main__":
    main()
