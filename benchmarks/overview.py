"""The figure of the README: quality and speed against size, drawn from the logs of plans.py and speed.py.

    python benchmarks/overview.py

Quality is that of students of all-MiniLM-L6-v2 after 800 steps of distillation, Spearman correlation on STS-B's dev
set, mean and standard deviation over seeds; speed is that of one forward pass of 8 x 128 tokens in fp32 on two CPU
cores, each model in the quicker of its two ways, eager and compiled. It runs nothing.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent
TARGET = ROOT.parent / "docs" / "overview.png"
STEPS, TEACHER = "800", (22.57, 86.7)
"""Of the curves that are drawn, and the teacher without its pooler: millions of parameters, STS-B."""
STUDENTS = {
    "searched plan, calibrated": "searched plan, calibrated",
    "paper shapes, nearest": "papers' shapes and start",
}


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


def speed() -> dict[str, list[tuple[float, float]]]:
    """Ratio of size and of speed to the dense model, by model."""
    ratios = {"BERT-base": (7.70, 20.94), "MiniLM": (7.43, 15.76)}
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
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), color in zip(sorted(quality().items()), ("tab:grey", "tab:blue"), strict=True):
        x, y, error = zip(*sorted(points), strict=True)
        left.errorbar(x, y, error, marker="o", color=color, capsize=3)
        left.annotate(name, (x[-1], y[-1]), xytext=(8, -4), textcoords="offset points", color=color)
    left.axhline(TEACHER[1], color="black", linewidth=0.8, linestyle="--")
    left.plot(*TEACHER, "s", color="black")
    left.annotate("teacher, all-MiniLM-L6-v2", TEACHER, xytext=(-4, -14), textcoords="offset points", ha="right")
    left.set(xscale="log", xlabel="million parameters", ylabel="STS-B, Spearman, per cent", title="Quality")
    left.set_xticks([1.29, 3.02, 22.57], ["1.3", "3.0", "22.6"])
    left.minorticks_off()
    for (name, ratios), color in zip(speed().items(), ("tab:blue", "tab:orange"), strict=True):
        sizes, speeds = zip(*ratios, strict=True)
        right.plot(sizes, speeds, marker="o", color=color)
        label = {"MiniLM": "all-MiniLM-L6"}.get(name, name)
        place = {"xytext": (-6, 8), "ha": "right"} if name == "BERT-base" else {"xytext": (6, -14), "ha": "left"}
        right.annotate(label, (sizes[-1], speeds[-1]), textcoords="offset points", color=color, **place)
    right.axhline(1, color="black", linewidth=0.8, linestyle="--")
    right.set(
        xlabel="times smaller", ylabel="times as fast", title="Speed, 8 x 128 tokens, two CPU cores", ylim=(0, 6.2)
    )
    right.set_xticks([1, 7.7, 15.8, 20.9], ["1", "7.7", "15.8", "20.9"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
