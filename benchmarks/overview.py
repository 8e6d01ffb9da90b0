"""The figure of the README: quality and speed against size, drawn from the logs of plans.py and speed.py.

    python benchmarks/overview.py

Quality is that of students of all-MiniLM-L6-v2 after 800 steps of distillation, Spearman correlation on STS-B's dev
set, mean and standard deviation over seeds; speed is that of one forward pass of 8 x 128 tokens in fp32 on two CPU
cores, each model in the quicker of its two ways, eager and compiled. It runs nothing.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from speed import MINILM, PLANS
from transformers import BertConfig, BertModel

from kronecker_transformers import KroneckerBertConfig, KroneckerBertModel

ROOT = Path(__file__).parent
TARGET = ROOT.parent / "docs" / "overview.png"
STEPS = "800"
"""Of the curves that are drawn."""
STUDENTS = {
    "searched plan, calibrated": "searched plan, calibrated",
    "paper shapes, nearest": "papers' shapes and start",
}


def teacher() -> tuple[float, float]:
    """Millions of parameters and STS-B of the teacher, without its pooler."""
    line = re.search(r"Teacher: ([\d,]+) parameters, STS-B ([\d.]+)", (ROOT / "logs" / "plans.txt").read_text())
    if line is None:
        raise ValueError("logs/plans.txt has no line about the teacher; write it again with plans.py")
    return int(line[1].replace(",", "")) / 1e6, float(line[2])


def quality() -> dict[str, list[tuple[float, float, float]]]:
    """Millions of parameters, mean and standard deviation, by student."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    sizes: dict[tuple[str, str], float] = {}
    for line in map(json.loads, (ROOT / "logs" / "plans.jsonl").read_text().splitlines()):
        if line["student"] in STUDENTS and STEPS in line.get("curve", {}):
            key = line["student"], line["size"]
            scores[key].append(line["curve"][STEPS][0])
            sizes[key] = line["parameters"] / 1e6
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for (student, size), values in scores.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[STUDENTS[student]].append((sizes[student, size], statistics.mean(values), spread))
    return found


def size_ratios(**sizes: Any) -> list[float]:
    """How many times fewer parameters a BERT of these sizes has by each preset."""
    with torch.device("meta"):
        dense = BertModel(BertConfig(**sizes))
        students = [KroneckerBertModel(KroneckerBertConfig(factor_plan=plan, **sizes)) for plan in PLANS]
    return [dense.num_parameters() / student.num_parameters() for student in students]


def speed() -> dict[str, list[tuple[float, float]]]:
    """Ratio of size and of speed to the dense model, by model."""
    ratios = {"BERT-base": size_ratios(), "MiniLM": size_ratios(**MINILM)}
    found = {}
    for line in (ROOT / "logs" / "speed.txt").read_text().splitlines():
        words = line.replace("x ", "x").split()
        if len(words) > 3 and words[0] in ratios and words[1:3] == ["float32", "8x128"]:
            seven, twenty_one = (float(word.removesuffix("x")) for word in (words[8], words[12]))
            small, smaller = ratios[words[0]]
            found[words[0]] = [(1.0, 1.0), (small, seven), (smaller, twenty_one)]
    return found


def main() -> None:
    """Draw both."""
    dense, students = teacher(), quality()
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), color in zip(sorted(students.items()), ("tab:grey", "tab:blue"), strict=True):
        x, y, error = zip(*sorted(points), strict=True)
        left.errorbar(x, y, error, marker="o", color=color, capsize=3)
        left.annotate(name, (x[-1], y[-1]), xytext=(8, -4), textcoords="offset points", color=color)
    left.axhline(dense[1], color="black", linewidth=0.8, linestyle="--")
    left.plot(*dense, "s", color="black")
    left.annotate("teacher, all-MiniLM-L6-v2", dense, xytext=(-4, -14), textcoords="offset points", ha="right")
    left.set(xscale="log", xlabel="million parameters", ylabel="STS-B, Spearman, per cent", title="Quality")
    ticks = {f"{x:.1f}": x for x in (dense[0], *(point[0] for points in students.values() for point in points))}
    left.set_xticks(list(ticks.values()), list(ticks))
    left.minorticks_off()
    for (name, ratios), color in zip(speed().items(), ("tab:blue", "tab:orange"), strict=True):
        smaller, speeds = zip(*ratios, strict=True)
        right.plot(smaller, speeds, marker="o", color=color)
        label = {"MiniLM": "all-MiniLM-L6"}.get(name, name)
        place = {"xytext": (-6, 8), "ha": "right"} if name == "BERT-base" else {"xytext": (6, -14), "ha": "left"}
        right.annotate(label, (smaller[-1], speeds[-1]), textcoords="offset points", color=color, **place)
    right.axhline(1, color="black", linewidth=0.8, linestyle="--")
    right.set(
        xlabel="times smaller", ylabel="times as fast", title="Speed, 8 x 128 tokens, two CPU cores", ylim=(0, 6.2)
    )
    right.set_xticks([1, 5, 10, 15, 20])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
