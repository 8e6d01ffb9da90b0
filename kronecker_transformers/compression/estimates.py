"""How near a layer can come at what size, and which sizes are the best for all layers together.

Errors. The calibrated error of a sum of R terms has no formula, but a good estimate for all R at once. With the nearest
Kronecker product of the covariance of the inputs, C ~ C1 (x) C2, C1 = L1 L1^T and C2 = L2 L2^T,

    || (W - sum of A_r (x) B_r) (L1 (x) L2) ||_F = || W (L1 (x) L2) - sum of (A_r L1) (x) (B_r L2) ||_F,

so the singular values of the rearranged W (L1 (x) L2) give it (Van Loan and Pitsianis). For low rank it is exact. For
other shapes inputs of an outstanding variance, which C1 (x) C2 would follow at the cost of all others, are taken to
have a lower one: the terms fit those few inputs first.

Choice. One candidate for each layer, so that the sum of their values is smallest and the sum of their costs within a
budget, is a multiple-choice knapsack problem: dynamic programming over the budget in small units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .calibrated import kronecker_roots, times_kronecker

UNITS = 20_000
"""Steps in which a budget is spent; costs are rounded up to them."""
_OUTLIER = 16  # times the median variance, above which an input is outstanding


def factor_shapes(m: int, n: int) -> list[tuple[int, int]]:
    """Every shape (m1, n1) of A for a weight (m, n): all pairs of divisors, low rank once, as (m, 1)."""
    shapes = [(m1, n1) for m1 in _divisors(m) for n1 in _divisors(n)]
    return [shape for shape in shapes if shape not in ((1, 1), (m, n), (1, n))]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@torch.no_grad()
def error_curves(W: Tensor, C: Tensor, shapes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """Estimated relative errors of the outputs with 1, 2, ... terms, for each shape.

    Args:
        W: the weight (m, n).
        C: covariance of its inputs (n, n), positive definite.
        shapes: (m1, n1) of A_r, dividing m and n.

    Returns:
        For each shape (s,), s = min(m1 n1, m2 n2); root of E || (W - W') x ||^2 / E || W x ||^2, falling to 0. For low
        rank it is exact.
    """
    m, n = W.shape
    total = float(((W.double() @ C) * W).sum())
    shrink = (_OUTLIER * C.diagonal().median() / C.diagonal()).sqrt().clamp_max(1)
    clipped = C * shrink * shrink.unsqueeze(1)
    curves = {}
    for n1, group in groupby(sorted(shapes, key=itemgetter(1)), itemgetter(1)):
        n2 = n // n1
        left, right = kronecker_roots(clipped if 1 < n1 < n else C, n1)
        whitened = times_kronecker(W.float(), left.float(), right.float())
        for m1, _ in group:  # float32 bears an estimate, in half the time
            P = whitened.reshape(m1, m // m1, n1, n2).transpose(1, 2).reshape(m1 * n1, -1)
            curves[m1, n1] = (_tail(P) / max(total, torch.finfo(P.dtype).tiny)).sqrt()
    return curves


@torch.no_grad()
def weighted_error_curve(W: Tensor, weights: Tensor, n1: int) -> Tensor:
    """The same for an embedding whose rows are weighted, with a row of A for every row of W; exact.

    Args:
        W: (m, n).
        weights: (m,), at least 0.
        n1: length of a row of A_r, dividing n.
    """
    rest = _tail((W.double() * weights.double().sqrt().unsqueeze(1)).reshape(len(W) * n1, -1))
    total = weights.double() @ W.double().square().sum(1)
    return (rest / total.clamp_min(torch.finfo(rest.dtype).tiny)).sqrt()


@torch.no_grad()
def frequent_error_curves(
    W: Tensor, weights: Tensor, ranks: Sequence[int], counts: Sequence[int]
) -> dict[tuple[int, int], Tensor]:
    """The same for products of low rank in which frequent words have another product beside that of all words.

    Args:
        W: (m, n).
        weights: (m,), at least 0.
        ranks: of the product of all words, each below min(m, n).
        counts: of frequent words, ascending; those are meant of which most is left.

    Returns:
        For each rank and count the relative errors for R = 1, 2, ... of the frequent words' own product.
    """
    W = W.float() * weights.sqrt().float().unsqueeze(1)
    total = float(W.square().sum())
    _, vectors = torch.linalg.eigh((W.t() @ W).double())
    curves = {}
    for rank in ranks:
        basis = vectors[:, -rank:].float()
        rest = W - (W @ basis) @ basis.t()
        lost = rest.square().sum(1)
        order = lost.argsort(descending=True)[: counts[-1]]
        left, gram, start = float(lost.sum()), torch.zeros_like(vectors), 0
        for count in counts:
            rows = rest[order[start : (start := count)]]
            gram += (rows.t() @ rows).double()
            left -= float(rows.square().sum())
            energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
            own = energies.sum() - energies.cumsum(0)
            own = own[:count]
            curves[rank, count] = ((own.clamp_min(0) + max(left, 0.0)) / max(total, 1e-30)).sqrt()
    return curves


def _tail(P: Tensor) -> Tensor:
    """For R = 1, 2, ...: the squared norm that the first R singular pairs leave of P."""
    gram = P @ P.t() if P.shape[0] <= P.shape[1] else P.t() @ P
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    rest = energies.flip(0).cumsum(0).flip(0)  # (s,), what is left before each term
    return torch.cat([rest[1:], rest.new_zeros(1)])


def best_choice(
    costs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], budget: float
) -> tuple[list[int], NDArray[np.float64]]:
    """One candidate for each layer: the smallest sum of values whose sum of costs is within the budget.

    Args:
        costs: of every candidate of every layer, at least 0.
        values: the same; small is good.
        budget: at most this in all, > 0.

    Returns:
        The index of the candidate of each layer, and the smallest sum of values for every part of the budget,
        (UNITS + 1,), infinite where it cannot be met. The sum is the smallest there is for costs rounded up to
        budget / UNITS.

    Raises:
        ValueError: the cheapest candidates cost more than the budget.
    """
    cheapest = sum(map(min, costs))
    if cheapest > budget:
        raise ValueError(f"budget of {budget:,.0f} cannot be met: the cheapest candidates need {cheapest:,.0f}")
    best = np.zeros(UNITS + 1)
    choices = []
    for layer_costs, layer_values in zip(costs, values, strict=True):
        found, chosen = np.full(UNITS + 1, np.inf), np.zeros(UNITS + 1, dtype=np.int32)
        for index, (cost, value) in enumerate(zip(layer_costs, layer_values, strict=True)):
            units = int(np.ceil(cost / budget * UNITS - 1e-9))
            if units > UNITS:
                continue
            total = best[: UNITS + 1 - units] + value
            better = total < found[units:]
            found[units:][better] = total[better]
            chosen[units:][better] = index
        best = found
        choices.append(chosen)
    if not np.isfinite(best[-1]):  # by less than the rounding
        return [int(np.argmin(layer)) for layer in costs], best
    picked, left = [], UNITS
    for chosen, layer_costs in zip(reversed(choices), reversed(costs), strict=True):
        index = int(chosen[left])
        picked.append(index)
        left -= int(np.ceil(layer_costs[index] / budget * UNITS - 1e-9))
    return picked[::-1], best
