"""Two constants of the calibration: the pull towards the dense weight (RIDGE) and the counts of unseen words (UNSEEN).

    python benchmarks/constants.py --data DIR --work WORK | tee benchmarks/logs/constants.txt

Students, text and judgement are those of benchmarks/plans.py, without any training: the searched plans of
logs/plans_searched.jsonl (which were searched with the constants as they are), the papers' shapes and low rank, each
calibrated with one constant changed. Spearman on STS-B, in per cent, on the first 1,500 training pairs and on the dev
set.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from unittest.mock import patch

import plans
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers.compression import calibration
from kronecker_transformers.compression.calibrated import RIDGE, calibrated_kronecker
from kronecker_transformers.display import results_table
from kronecker_transformers.evaluation.timing import environment

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
COUNTS = (0.01, 0.1, 0.3, 1.0, 3.0)
STUDENTS = (
    ("searched plan, calibrated", "7.7x"), ("searched plan, calibrated", "21x"), ("paper shapes, calibrated", "7.7x"),
    ("low rank, calibrated", "7.7x"),
)  # fmt: skip


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description="Constants of the calibration.")
    parser.add_argument("--data", type=Path, required=True, help="folder with glue and text")
    parser.add_argument("--work", type=Path, required=True, help="folder for the text")
    options = parser.parse_args()
    disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    data, console = plans.Data(options.data, options.work), Console(width=140)
    console.print(environment(), highlight=False)

    def judged(student: str, size: str, ridge: float, unseen: float) -> str:
        with (
            patch.object(calibration, "calibrated_kronecker", partial(calibrated_kronecker, ridge=ridge)),
            patch.object(calibration, "UNSEEN", unseen),
        ):
            model = plans.factored(plans.Run(student, size, 0.0, 0), data).model
        return " / ".join(f"{data.similarity(model, split):.1f}" for split in ("train", "validation"))

    rows = {f"{size}, {student}": [judged(student, size, r, calibration.UNSEEN) for r in RIDGES]
            for student, size in STUDENTS}  # fmt: skip
    console.print(results_table("RIDGE: STS-B train / dev", [f"{r:g}" for r in RIDGES], rows))
    rows = {f"{size}, {student}": [judged(student, size, RIDGE, c) for c in COUNTS] for student, size in STUDENTS[:2]}
    console.print(results_table("UNSEEN: STS-B train / dev", [f"{c:g}" for c in COUNTS], rows))


if __name__ == "__main__":
    main()
