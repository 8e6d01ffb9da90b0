"""Make the cards of the recipes: `python model_cards/make.py`, after `make demo`.

The teachers' weights are drawn as for training from scratch, seed 0: sizes, FLOPs and times do not depend on them, and
what does is not measured here. The demo's card is that of the model that it has made. The figures in the cards come
from the files in ``records``, which are written here too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.files import write_text
from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.evaluation.timing import benchmark
from kronecker_transformers.hub.card import model_card
from kronecker_transformers.hub.files import BENCHMARK_FILE, RESULTS_FILE

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo_output" / "kronecker-minilm-7.7x"
BATCH, LENGTH = 8, 128
RECIPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "kroneckerbert-7.7x": (
        "7.7x", lambda: BertForMaskedLM(BertConfig()),
        {"base_model": "google-bert/bert-base-uncased", "license": "apache-2.0", "language": "en"},
    ),
    "kroneckerbert-21x": (
        "21x", lambda: BertForMaskedLM(BertConfig()),
        {"base_model": "google-bert/bert-base-uncased", "license": "apache-2.0", "language": "en"},
    ),
    "kngpt2": (
        "kngpt2", lambda: GPT2LMHeadModel(GPT2Config()),
        {"base_model": "openai-community/gpt2", "license": "mit", "language": "en"},
    ),
}  # fmt: skip
"""Plan, teacher, and what the teacher's card says."""


NOTE = (
    "**A specimen.** The weights behind this card are not those of {base_model}: they were drawn at random, in its "
    "shape. "
    "Sizes, FLOPs and times are the recipe's; what depends on the weights was not measured."
)


def keep(name: str, record: Any) -> str:
    """Write a record beside the cards; returns its text."""
    text = json.dumps(record, indent=2) + "\n"
    write_text(HERE / "records" / f"{name}.json", text)
    return text


def main() -> None:
    """Write one card for each recipe."""
    if not DEMO.is_dir():
        sys.exit(f"{DEMO} does not exist; run make demo first")
    (HERE / "records").mkdir(exist_ok=True)
    keep(DEMO.name, json.loads((DEMO / RESULTS_FILE).read_text(encoding="utf-8")))
    write_text(HERE / f"{DEMO.name}.md", str(model_card(DEMO, f"your-name/{DEMO.name}")))
    for name, (plan, make_teacher, known) in RECIPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            teacher = make_teacher().eval()
            model = compress(teacher, plan).model
            folder = save_folder(Path(scratch) / name, model)
            found = benchmark(model, teacher, batch=BATCH, length=LENGTH)
            found = dataclasses.replace(found, against=dataclasses.replace(found.against, name="its dense twin"))
            write_text(folder / BENCHMARK_FILE, keep(name, found.to_dict()))
            card = model_card(folder, f"your-name/{name}", note=NOTE.format(**known), **known)
        write_text(HERE / f"{name}.md", str(card))


if __name__ == "__main__":
    main()
