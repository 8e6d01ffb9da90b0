"""Time and extra memory of factoring all of BERT-base (Van Loan-Pitsianis), embedding included.

    python benchmarks/factorize.py | tee benchmarks/logs/factorize.txt

The weights are drawn as for training from scratch, seed 0: time and memory do not depend on their values. Extra
memory is the peak of the process above what it held before, the student included (Linux only).
"""

from __future__ import annotations

import time

import torch
from transformers import BertConfig, BertModel

from kronecker_transformers import compress, nearest_kronecker
from kronecker_transformers.evaluation.timing import environment, peak_memory

ROUNDS = 3


def main() -> None:
    """Print one table."""
    print(environment())
    torch.manual_seed(0)
    teacher = BertModel(BertConfig()).eval()
    nearest_kronecker(teacher.pooler.dense.weight, 384, 384)  # loads the linear algebra library
    print(f"{'BERT-base':10s} {'round':>5s} {'seconds':>8s} {'extra MB':>9s} {'student MB':>10s}")
    for plan in ("7.7x", "21x"):
        for number in range(ROUNDS):
            with peak_memory() as extra:
                start = time.perf_counter()
                result = compress(teacher, plan)
                seconds = time.perf_counter() - start
            size = result.report.factored.bytes
            print(f"{plan:10s} {number:5d} {seconds:8.2f} {extra() / 1e6:9.0f} {size / 1e6:10.1f}")


if __name__ == "__main__":
    main()
