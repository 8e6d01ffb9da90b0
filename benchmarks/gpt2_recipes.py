"""KnGPT2's question with both sides at their best: factors, or fewer layers? And what should a small GPT-2 learn from?

    python benchmarks/gpt2_recipes.py --data DIR --work WORK > benchmarks/logs/gpt2_recipes.txt

The teacher, of 16.35 M parameters, is that of kngpt2.py, whose WORK may be used again. Students of 11.04 M learn from
it on the same text in the same steps, each in several ways: factored by the papers' plan or by a searched one,
calibrated on the training text; or dense, with the layers of DistilGPT2's rule or with those three of six that lose
least, found by the loss of all twenty choices on that text. Muon is for factors; a dense student has AdamW alone.
--students and --ways choose among them. The log has two teachers, trained alike on two machines: that of seed 0, and
that of the others. Finished runs are lines of logs/gpt2_recipes.jsonl, and are not made again. --table shows them
without a run.
"""

from __future__ import annotations

import functools
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from common import QUIET, RunLog, example, runs_parser, shuffled_text, spread
from kngpt2 import LAYERS, LENGTH, METHODS, STUDENT_STEPS, train_teacher
from rich.console import Console

from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import keep_layers
from kronecker_transformers.distillation.losses import logit_kl
from kronecker_transformers.experiments.run import teacher_and_tokenizer
from kronecker_transformers.tasks.language_modeling import block_examples
from kronecker_transformers.tasks.text import TextSource

LOG = RunLog("gpt2_recipes")
PARAMETERS = 11_040_794
"""Of the papers' plan."""
BEST = "best three layers"
STUDENTS = ("papers' plan", "searched plan", "layers 1, 3, 5", BEST)
VALIDATION, BLOCKS = "wikitext2_valid.txt", 64
"""Text to judge on, of which so many blocks tell how far a student is from its teacher; and blocks of the training text
on which choices of layers are compared.
"""
START = "as it starts"
LOGITS = {**METHODS["labels only"], "logits_weight": 1}
ALL, RATE = "ILKD, logits, balanced, Muon", 1e-3
"""The way and the learning rate of what gpt2_tasks.py goes on with."""
WAYS: dict[str, dict[str, Any]] = {
    "ILKD": {},
    "ILKD, logits": {"logits_weight": 1},
    "ILKD, logits, balanced": {"logits_weight": 1, "balanced": True},
    ALL: {"logits_weight": 1, "balanced": True, "muon": True},
    "ILKD, logits, Muon": {"logits_weight": 1, "muon": True},
    "logits, labels": LOGITS,
    "logits, labels, Muon": {**LOGITS, "muon": True},
    "logits": {**LOGITS, "supervised_weight": 0},
}


@dataclass(frozen=True)
class Run:
    """A student, and how it learns."""

    student: str
    way: str
    rate: float
    seed: int

    def folder(self, work: Path) -> Path:
        """For its student."""
        return work / "-".join(map(str, asdict(self).values()))


@functools.cache
def best_layers(work: Path, text: Path) -> str:
    """Those whose student, as it is cut, loses least."""
    teacher, tokenizer = teacher_and_tokenizer(str(work / "teacher"))
    blocks = islice(block_examples(TextSource((str(text),)), tokenizer, LENGTH), BLOCKS)
    ids = torch.tensor([block["input_ids"] for block in blocks])

    @torch.no_grad()
    def loss(layers: Iterable[int]) -> float:
        student: Any = keep_layers(teacher, list(layers)).eval()
        return sum(float(student(input_ids=some, labels=some).loss) for some in ids.split(16))

    return ",".join(map(str, min(combinations(range(LAYERS), LAYERS // 2), key=loss)))


@torch.no_grad()
def divergence(folder: Path, options: Any) -> float:
    """KL(teacher || student) of the next word, in nats, mean over the first blocks of the validation text."""
    teacher, tokenizer = teacher_and_tokenizer(str(options.work / "teacher"))
    student: Any = load_model(folder / "student")[0].eval()
    source = TextSource((str(options.data / "text" / VALIDATION),))
    ids = torch.tensor([block["input_ids"] for block in islice(block_examples(source, tokenizer, LENGTH), BLOCKS)])
    found = [logit_kl(student(input_ids=some).logits, teacher(input_ids=some).logits) for some in ids.split(8)]
    return float(torch.cat(found).mean())


def options_of(student: str, options: Any, text: Path) -> dict[str, Any]:
    """How it starts."""
    if student == "papers' plan":
        return {"plan": "kngpt2"}
    if student == "searched plan":
        whole = teacher_and_tokenizer(str(options.work / "teacher"))[0].num_parameters()
        return {"plan": "search", "ratio": whole / PARAMETERS, "calibration": text}
    return {"layers": best_layers(options.work, text) if student == BEST else "1,3,5"}


def perform(run: Run, options: Any) -> None:
    """Train and judge one student."""
    train_teacher(options.data, options.work / "teacher")
    text, output = shuffled_text(options.data, options.work), run.folder(options.work)
    shutil.rmtree(output, ignore_errors=True)
    results = example(
        "run_clm_kd", recipe="kngpt2", teacher=options.work / "teacher", train_text=text, output_dir=output,
        max_length=LENGTH, validation_text=options.data / "text" / VALIDATION, window=LENGTH,
        stride=LENGTH * 3 // 4, normalisation="wikitext", max_steps=STUDENT_STEPS, per_device_train_batch_size=16,
        learning_rate=run.rate, dropout=0, seed=run.seed, **options_of(run.student, options, text), **WAYS[run.way],
        **QUIET,
    )  # fmt: skip
    layers = results.pop("options")["layers"]  # the others name folders of the machine that ran it
    LOG.add(asdict(run), {"layers": layers, **results, "divergence": divergence(output, options)})
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Students of a small GPT-2, each at its best.", "the models")
    parser.add_argument("--students", nargs="*", default=STUDENTS, choices=STUDENTS, help="(default: all)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="(default: all)")
    parser.add_argument("--rate", type=float, default=RATE, help="of learning (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    if not options.table:
        runs = [
            Run(student, way, options.rate, seed)
            for seed in range(options.seeds) for student in options.students for way in options.ways
        ]  # fmt: skip
        LOG.finish(runs, perform, options)
    teachers: dict[str, int] = {}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    distances: dict[str, list[float]] = defaultdict(list)
    for line in LOG.lines():
        title = f"{line['student']}{': ' + line['layers'] if line['layers'] else ''}"
        for model, number, value in zip(line["models"], *list(line["rows"].values())[:2], strict=True):
            if model == "teacher":
                teachers[f"{value:.0f}"] = number
            else:
                cut = model.endswith("undistilled")
                way = line["way"].removesuffix(", Muon") if line["layers"] else line["way"]
                name = f"{title}, " + (START if cut else f"{way}, rate {line['rate']:g}")
                found[title]["sizes"] = [number]
                found[title][name].append(value)
                if not cut:
                    distances[name].append(line["divergence"])
    rows: dict[str, list[Any]] = {}
    if teachers:
        rows["teacher"] = [f"{max(teachers.values()):,}", ", ".join(teachers), None, None]
    for values in found.values():
        size = f"{values.pop('sizes')[0]:,}"
        for name, perplexities in values.items():
            if name.endswith(START):  # which is the teacher's, whatever the seed
                rows[name] = [size, ", ".join(dict.fromkeys(f"{value:.0f}" for value in perplexities)), None, None]
            else:
                rows[name] = [size, spread(perplexities), spread(distances[name], 4), len(perplexities)]
    console = Console(width=110)
    console.print(LOG.environments(), highlight=False)
    console.print(
        results_table(
            "WikiText-2, validation", ["parameters", "perplexity per token", "KL to the teacher", "runs"], rows
        )
    )


if __name__ == "__main__":
    main()
