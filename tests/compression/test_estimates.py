import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronecker_transformers.compression.calibrated import calibrated_kronecker, weighted_kronecker
from kronecker_transformers.compression.estimates import (
    UNITS,
    best_choice,
    error_curves,
    factor_shapes,
    frequent_error_curves,
    weighted_error_curve,
)
from kronecker_transformers.compression.moments import MomentSums, kronecker_product
from kronecker_transformers.models.kronecker_layers import farthest_rows
from kronecker_transformers.models.kronecker_nearest import nearest_kronecker


def covariance(n, seed=0):
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.t() @ x / len(x)


def test_all_shapes_and_low_rank_once():
    assert factor_shapes(6, 4) == [
        *[(1, 2)], *[(2, n1) for n1 in (1, 2, 4)], *[(3, n1) for n1 in (1, 2, 4)], *[(6, n1) for n1 in (1, 2)],
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 5, 2, 3), (2, 3, 5, 11), (6, 10, 2, 1)], ids=str)
def test_curve_is_exact_for_a_covariance_that_is_a_kronecker_product(shape):
    m1, n1, m2, n2 = shape
    W = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    C1, C2 = covariance(n1, 1), covariance(n2, 2)
    curve = error_curves(W, torch.kron(C1, C2), [(m1, n1)])[m1, n1]
    roots = torch.linalg.cholesky(C1), torch.linalg.cholesky(C2)
    whitened = W @ torch.kron(*roots)
    for terms, found in enumerate(curve[:-1].tolist(), start=1):
        best = nearest_kronecker(whitened, m1, n1, terms).relative_error
        assert found == pytest.approx(best, rel=2e-3, abs=1e-4)
    assert curve[-1] == 0
    assert len(curve) == min(m1 * n1, m2 * n2)


@pytest.mark.parametrize("shape", [(4, 6, 6, 8), (8, 12, 3, 4)], ids=str)
def test_curve_keeps_its_shape_beside_an_outstanding_input(shape):
    m1, n1, m2, n2 = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m1 * m2, n1 * n2, generator=generator, dtype=torch.float64)
    x = torch.randn(2000, n1 * n2, generator=generator, dtype=torch.float64)
    x[:, 5] *= 30
    sums = MomentSums()
    sums.add(x, x @ W.t())
    moments = sums.finish()
    curve = error_curves(W, moments.inputs, [(m1, n1)])[m1, n1]
    reached = {t: moments.relative_error(*calibrated_kronecker(W, moments, m1, n1, t)[:3]) for t in (6, 10)}
    ratios = [error / curve[terms - 1].item() for terms, error in reached.items()]  # 7 to 28 if C1 (x) C2 follows it
    assert 1 < ratios[0] < 3
    assert ratios[1] == pytest.approx(ratios[0], rel=0.4)  # one try scales the curve


@pytest.mark.parametrize("sides", [(12, 1, 1, 10), (9, 1, 1, 20)], ids=str)
def test_curve_of_low_rank_is_what_calibration_reaches(sides):
    m, _, _, n = sides
    W, C = torch.randn(m, n, dtype=torch.float64), covariance(n)
    x = torch.linalg.cholesky(C) @ torch.linalg.qr(torch.randn(200, n, dtype=torch.float64)).Q.t() * 200**0.5
    x = (x - x.mean(1, keepdim=True)).t()
    sums = MomentSums()
    sums.add(x, x @ W.t())
    moments = sums.finish()
    curve = error_curves(W, moments.inputs, [(m, 1)])[m, 1]
    for terms in (1, 3, 6):
        found = calibrated_kronecker(W, moments, m, 1, terms, ridge=1e-9)
        assert curve[terms - 1].item() == pytest.approx(moments.relative_error(*found[:3]), rel=1e-3)


@pytest.mark.parametrize("n1", [1, 2, 5])
def test_curve_of_an_embedding_is_what_its_factors_reach(n1):
    W, weights = torch.randn(12, 10, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.1
    curve = weighted_error_curve(W, weights, n1)
    total = W.square().sum(1) @ weights
    for terms in range(1, len(curve) + 1):
        A, B = weighted_kronecker(W, weights, 12, n1, terms)
        product = torch.einsum("irj,krl->ikjl", A, B).reshape(12, 10)
        error = ((product - W).square().sum(1) @ weights / total).sqrt().item()
        assert curve[terms - 1].item() == pytest.approx(error, rel=1e-6, abs=1e-7)


def test_curve_of_frequent_words_is_what_their_factors_reach():
    W, weights = torch.randn(30, 10), torch.rand(30, dtype=torch.float64) + 0.1
    curves = frequent_error_curves(W, weights, [1, 3], [4, 12])
    assert curves.keys() == {(1, 4), (1, 12), (3, 4), (3, 12)}
    total = W.double().square().sum(1) @ weights
    for (rank, count), curve in curves.items():
        product = kronecker_product(*weighted_kronecker(W, weights, 30, 1, rank))
        words = farthest_rows(W - product, count, weights)
        for own in range(1, min(count, 10 - rank)):
            factors = weighted_kronecker((W - product)[words], weights[words], count, 1, own)
            whole = product.index_add(0, words, kronecker_product(*factors))
            error = ((whole - W).square().sum(1) @ weights / total).sqrt().item()
            assert curve[own - 1].item() == pytest.approx(error, rel=1e-3)


OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 100)), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=60)
@given(OPTIONS, st.integers(1, 120))
def test_choice_is_the_best_of_all(layers, budget):
    costs, values = ([[pair[k] for pair in layer] for layer in layers] for k in (0, 1))
    everything = [
        (sum(v), sum(c))
        for c, v in zip(itertools.product(*costs), itertools.product(*values), strict=True)
        if sum(c) <= budget
    ]
    if not everything:
        with pytest.raises(ValueError, match="cannot be met: the cheapest candidates need"):
            best_choice(costs, values, budget)
        return
    picked, frontier = best_choice(costs, values, budget)
    assert sum(layer[i] for layer, i in zip(costs, picked, strict=True)) <= budget
    reached = sum(layer[i] for layer, i in zip(values, picked, strict=True))
    # a unit for each layer is what rounding may cost
    tight = [v for v, c in everything if c <= budget * (1 - len(layers) / UNITS)]
    assert reached <= min(tight, default=np.inf)
    assert reached >= min(v for v, _ in everything)
    assert frontier.shape == (UNITS + 1,)
    assert (np.diff(frontier[np.isfinite(frontier)]) <= 0).all()
