"""How many layers a student should have: sentence encoders of equal size, distilled for equally many minutes.

    python benchmarks/depth.py --data DIR --work WORK > benchmarks/logs/depth.txt

DIR holds the folders glue (the official files) and text. The teacher is all-MiniLM-L6-v2 without its pooler, of six
layers. Its students have 7.7 or 21 times fewer parameters and six, three or two layers, made by the package's `distill`
as it is (layers=, minutes=), one after the other on all cores: with fewer layers 40 per cent of the minutes go into a
dense student, which is factored then. Text: running text and the training sentences of five GLUE tasks, without labels,
of which a tenth is held out. Judged by fidelity and neighbours on that, and by the cosines of the embeddings on STS-B's
dev set, which none of this has seen. Finished runs are lines of logs/depth.jsonl, and are not made again. --table shows
them without a run.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RunLog, prepared_text, runs_parser, spread
from encoders import similarity, teacher
from rich.console import Console

from kronecker_transformers import distill
from kronecker_transformers.display import results_table

LOG = RunLog("depth")
LAYERS, RATIOS = (6, 3, 2), (7.7, 21.0)


@dataclass(frozen=True)
class Run:
    """A student and its training."""

    layers: int
    ratio: float
    minutes: float
    seed: int = 0


def perform(run: Run, text: Path, options: Any) -> None:
    """Distil and judge one student."""
    folder = options.work / "students" / "-".join(map(str, asdict(run).values()))
    shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = teacher()
    found = distill(
        model, text, folder, ratio=run.ratio, layers=run.layers, minutes=run.minutes, seed=run.seed,
        tokenizer=tokenizer, base_model="sentence-transformers/all-MiniLM-L6-v2",
    )  # fmt: skip
    record = json.loads((folder / "results.json").read_text())
    results = {"rows": found.rows, "training": found.training, "dense_training": record.get("dense_training")}
    LOG.add(asdict(run), {"stsb": similarity(found.model, tokenizer, options.data), **results})


def table(console: Console) -> None:
    """One row for each kind of student: mean and standard deviation over seeds."""
    console.print(LOG.environments(), highlight=False)
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        found = values[f"{line['ratio']:g}x, {line['layers']} layers, {line['minutes']:g} minutes"]
        rows = line["rows"]
        found["parameters"].append(rows["parameters"][-1])
        found["speed"].append(rows["examples per second"][-1] / rows["examples per second"][0])
        found["steps"].append(line["training"]["steps"])
        found["fidelity"].append(100 * rows["similarity fidelity (Spearman)"][-1])
        found["neighbours"].append(100 * rows["nearest 10 neighbours in common"][-1])
        found["stsb"].append(line["stsb"])
    shown = {
        name: [int(found["parameters"][0]), int(found["steps"][0])]
        + [spread(found[kind]) for kind in ("speed", "fidelity", "neighbours", "stsb")]
        for name, found in values.items()
    }
    headings = ["parameters", "steps since factored", "times as fast", "fidelity, %", "neighbours, %", "STS-B dev"]
    console.print(results_table("all-MiniLM-L6-v2: students of equal size", headings, shown))


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Students with fewer layers.", "text and students")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS, help="(default: 6, 3 and 2)")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS, help="(default: both)")
    options = parser.parse_args()
    if not options.table:
        text = prepared_text(options)
        runs = [
            Run(layers, ratio, options.minutes, seed)
            for seed in range(options.seeds) for ratio in options.ratios for layers in options.layers
        ]  # fmt: skip
        for run in LOG.missing(runs):
            perform(run, text, options)
    table(Console(width=150))


if __name__ == "__main__":
    main()
