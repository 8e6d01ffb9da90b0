"""What benchmarks share: examples as processes of their own, and logs that are gone on with."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers.evaluation.timing import environment
from kronecker_transformers.tasks.glue import glue_task, load_glue

ROOT = Path(__file__).parent
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""For glibc: memory that was freed is kept for the next step."""
QUIET: dict[str, Any] = {
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 100,
}
"""Options of all trainings."""
PROBE = 4000
"""Sentences that a probe learns from."""
GLUE_TASKS = ("sst2", "mrpc", "cola", "rte", "stsb")
"""Of which the official files are at hand."""


def example(name: str, **options: Any) -> dict[str, Any]:
    """Run a script of examples/ with these options; its results."""
    command = [sys.executable, str(ROOT.parent / "examples" / f"{name}.py")]
    for key, value in options.items():
        command += [f"--{key}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    subprocess.run(command, check=True, env={**os.environ, **KEEP_MEMORY})
    results: dict[str, Any] = json.loads((Path(options["output_dir"]) / "results.json").read_text())
    return results


def runs_parser(description: str, work: str) -> argparse.ArgumentParser:
    """The options of a benchmark of many trainings; `work` says what its folder is for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="folder with glue and text")
    parser.add_argument("--work", type=Path, help=f"folder for {work}")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="only show what is finished")
    return parser


def in_parallel(jobs: Iterable[Callable[[], object]], processes: int) -> None:
    """Do all jobs, so many at a time; the processes that they start share the cores evenly.

    Two trainings of one thread each get more done than one after the other with two.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)  # what `environment` tells
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def low_rank_plan(teacher: Any, limit: int) -> dict[str, tuple[int, int, int]]:
    """All layers of a BERT of low rank, at one ratio, so that `limit` parameters are not exceeded."""
    shapes = {"embeddings.word_embeddings": teacher.embeddings.word_embeddings.weight.shape}
    shapes |= {name: m.weight.shape for name, m in teacher.named_modules() if isinstance(m, nn.Linear)}
    rest = teacher.num_parameters() - sum(m * n for m, n in shapes.values())

    def plan(share: float) -> dict[str, tuple[int, int, int]]:
        return {name: (m, 1, max(1, int(share * m * n / (m + n)))) for name, (m, n) in shapes.items()}

    def size(share: float) -> int:
        return rest + sum(terms * sum(shapes[name]) for name, (_, _, terms) in plan(share).items())

    return plan(max((k / 10_000 for k in range(1, 5000)), key=lambda share: (size(share) <= limit, size(share))))


def shuffled_text(data: Path, work: Path, more: Sequence[str] = ()) -> Path:
    """One file of all lines of running text in ``data/text``, and more, in random order; without WikiText-2."""
    target = work / f"text-{len(more)}.txt"
    if not target.exists():
        files = sorted(path for path in (data / "text").glob("*.txt") if "wikitext" not in path.name)
        lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        lines += more
        random.Random(0).shuffle(lines)
        draft = target.with_suffix(".draft")
        draft.write_text("\n".join(lines), encoding="utf-8")
        draft.rename(target)
    return target


def unlabelled_text(data: Path, work: Path) -> Path:
    """Running text and the sentences of all tasks."""
    sentences: list[str] = []
    for task in GLUE_TASKS:
        train = load_glue(task, data / "glue", ["train"])["train"]
        sentences += [text for name in glue_task(task).text_columns for text in train[name][:]]
    return shuffled_text(data, work, list(dict.fromkeys(sentences)))


def prepared_text(options: argparse.Namespace) -> Path:
    """The text of `unlabelled_text`, in a work folder that is made; progress bars of libraries are off from here on."""
    disable_progress_bar()
    disable_progress_bars()
    options.work.mkdir(parents=True, exist_ok=True)
    return unlabelled_text(options.data, options.work)


class RunLog:
    """Finished runs, one JSON object a line: what identifies each run, its results, and where they were measured."""

    def __init__(self, name: str) -> None:
        self.path = ROOT / "logs" / f"{name}.jsonl"
        self._lock = threading.Lock()

    def lines(self) -> list[dict[str, Any]]:
        """All of them, in order."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The run that `key` identifies, if it is finished."""
        return next((line for line in self.lines() if key.items() <= line.items()), None)

    def missing(self, runs: Iterable[Any]) -> Iterator[Any]:
        """Of runs, dataclasses that identify them, those that are not finished."""
        return (run for run in runs if not self.find(asdict(run)))

    def finish(self, runs: Iterable[Any], perform: Callable[[Any, argparse.Namespace], None], options: Any) -> None:
        """Make what is missing of runs, one after the other, in the work folder of the options."""
        options.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        for run in self.missing(runs):
            perform(run, options)

    def environments(self) -> str:
        """Where the runs were measured, a line each."""
        return "\n".join(dict.fromkeys(line["environment"] for line in self.lines()))

    def add(self, key: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Keep a run that has just finished."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**key, **results, "environment": environment()}) + "\n")


def probe(encoded: Callable[[list[str]], Any], sst2: Mapping[str, Any]) -> float:
    """Accuracy on SST-2's dev set of a logistic regression on the embeddings of 4,000 sentences, in per cent."""
    train, judged = sst2["train"].select(range(PROBE)), sst2["validation"]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    model.fit(encoded(train["sentence"][:]), train["label"][:])
    return 100 * float(model.score(encoded(judged["sentence"][:]), judged["label"][:]))


def spread(values: list[float], digits: int = 1) -> str | None:
    """Mean and standard deviation, or the only value, with so many digits after the point; None for none."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else None
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"
