import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kronecker_sum

from kronecker_transformers.compression import calibrated
from kronecker_transformers.compression.calibrated import calibrated_kronecker, weighted_kronecker
from kronecker_transformers.compression.moments import Moments, MomentSums, kronecker_product
from kronecker_transformers.models.kronecker_nearest import nearest_kronecker


@pytest.fixture(params=[calibrated._LARGEST, 0], ids=["direct", "gradients"], scope="module", autouse=True)
def largest_system(request):
    """All tests of this module with systems solved at once, and by conjugate gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "_LARGEST", request.param)
        yield


SHAPES = [(7, 5, 2, 3), (3, 2, 11, 5), (2, 3, 5, 11), (14, 3, 1, 4), (6, 10, 2, 1)]


def data(m, n, tokens=200, seed=0):
    """A weight, correlated inputs that are not centred, and outputs that are not quite linear in them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    W = randn(m, n)
    x = randn(tokens, n) @ randn(n, n) + 3 * randn(n)
    return W, x, x @ W.t() + 0.3 * randn(tokens, m) + 2 * randn(m)


def moments(x, y):
    sums = MomentSums()
    sums.add(x, y)
    return sums.finish()


def objective(A, B, W, x, y, ridge):
    """J, from the tokens themselves."""
    x, y = x - x.mean(0), y - y.mean(0)
    product = kronecker_sum(A, B)
    strength = ridge * x.square().mean()
    return float((y - x @ product.t()).square().sum(1).mean() + strength * (W - product).square().sum())


def test_moments_in_blocks_are_those_of_all_tokens():
    _, x, y = data(6, 5)
    sums = MomentSums()
    for part in (slice(0, 1), slice(1, 1), slice(1, 80), slice(80, 200)):
        sums.add(x[part].float(), y[part].float())
    found = sums.finish()
    xs, ys = x.float().double().numpy(), y.float().double().numpy()
    together = np.cov(np.hstack([xs, ys]).T, bias=True)
    for ours, theirs in (
        (found.input_mean, xs.mean(0)),
        (found.output_mean, ys.mean(0)),
        (found.inputs, together[:5, :5]),
        (found.cross, together[5:, :5]),
        (found.output_variance, together.diagonal()[5:]),
    ):
        torch.testing.assert_close(ours, torch.from_numpy(np.ascontiguousarray(theirs)), rtol=1e-5, atol=1e-4)


def test_moments_of_far_off_inputs_keep_their_digits():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    far = moments(x + 1000, x + 1000)
    torch.testing.assert_close(far.inputs, moments(x, x).inputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relative_error_is_that_of_the_tokens(shape):
    m1, n1, m2, n2 = shape
    W, x, y = data(m1 * m2, n1 * n2)
    A, B, _ = nearest_kronecker(W, m1, n1, 2)
    bias = torch.randn(m1 * m2, dtype=torch.float64)
    rest = y - x @ kronecker_sum(A, B).t() - bias
    direct = (rest.square().sum() / (y - y.mean(0)).square().sum()).sqrt().item()
    assert moments(x, y).relative_error(A, B, bias) == pytest.approx(direct, rel=1e-9)


def test_rows_are_the_moments_of_some_outputs():
    _, x, y = data(9, 4)
    some, alone = moments(x, y).rows(slice(2, 7)), moments(x, y[:, 2:7])
    for name in Moments.__dataclass_fields__:
        torch.testing.assert_close(getattr(some, name), getattr(alone, name), rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(st.sampled_from(SHAPES), st.integers(1, 4), st.sampled_from([1e-6, 1e-2, 1.0]), st.integers(0, 1000))
def test_objective_never_rises_and_is_the_true_one(shape, terms, ridge, seed):
    m1, n1, m2, n2 = shape
    terms = min(terms, m1 * n1, m2 * n2)
    W, x, y = data(m1 * m2, n1 * n2, seed=seed)
    found = calibrated_kronecker(W, moments(x, y), m1, n1, terms, ridge)
    falls = np.diff(found.objective)
    assert (falls <= 1e-9 * max(found.objective)).all()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    truth = objective(found.A, found.B, W, x, y, ridge) / variance
    assert found.objective[-1] == pytest.approx(truth, rel=1e-9)
    nearest = nearest_kronecker(W, m1, n1, terms)
    assert truth <= objective(nearest.A, nearest.B, W, x, y, ridge) / variance + 1e-6


def test_stopped_early_the_factors_belong_together(monkeypatch):
    monkeypatch.setattr(calibrated, "TOLERANCE", 0)
    W, x, y = data(14, 15)
    found = calibrated_kronecker(W, moments(x, y), 7, 5, 2, ridge=1e-2, sweeps=1)
    variance = float((y - y.mean(0)).square().sum(1).mean())
    assert found.objective[-1] == pytest.approx(objective(found.A, found.B, W, x, y, 1e-2) / variance, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_small_step_lowers_the_objective(shape):
    m1, n1, m2, n2 = shape
    W, x, y = data(m1 * m2, n1 * n2, seed=3)
    found = calibrated_kronecker(W, moments(x, y), m1, n1, 2)
    best = objective(found.A, found.B, W, x, y, 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        steps = [
            0.1 * f.norm() * torch.nn.functional.normalize(torch.randn(f.shape, generator=generator), dim=None)
            for f in found[:2]
        ]
        assert objective(found.A + steps[0], found.B, W, x, y, 1e-2) > best
        assert objective(found.A, found.B + steps[1], W, x, y, 1e-2) > best


@pytest.mark.parametrize("shape", [*SHAPES, (12, 1, 1, 10), (1, 10, 12, 1)], ids=str)
@pytest.mark.parametrize("terms", [1, 2])
def test_planted_factors_are_found(shape, terms):
    m1, n1, m2, n2 = shape
    W, x, _ = data(m1 * m2, n1 * n2)
    planted = kronecker_sum(torch.randn(m1, terms, n1), torch.randn(m2, terms, n2))
    bias = torch.randn(m1 * m2, dtype=torch.float64)
    found = calibrated_kronecker(W, moments(x, x @ planted.t() + bias), m1, n1, terms, ridge=1e-10)
    assert found.A.shape == (m1, terms, n1)
    assert found.B.shape == (m2, terms, n2)
    torch.testing.assert_close(kronecker_sum(found.A, found.B), planted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias, bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sides", [(12, 1, 1, 10), (1, 10, 12, 1), (9, 1, 1, 20)], ids=str)
def test_low_rank_is_the_whitened_svd(sides):
    m1, n1, m2, n2 = sides
    W, x, y = data(m1 * m2, n1 * n2)
    found = calibrated_kronecker(W, moments(x, y), m1, n1, 4, ridge=1e-2)
    xs, ys = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    strength = 1e-2 * np.square(xs).mean()
    C = xs.T @ xs / len(xs) + strength * np.eye(len(W.t()))
    regression = (ys.T @ xs / len(xs) + strength * W.numpy()) @ np.linalg.inv(C)
    values, vectors = np.linalg.eigh(C)
    root = vectors * np.sqrt(values) @ vectors.T
    U, S, Vt = np.linalg.svd(regression @ root, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vt[:4] @ np.linalg.inv(root)
    torch.testing.assert_close(kronecker_sum(found.A, found.B), torch.from_numpy(best))


def test_a_strong_ridge_gives_the_nearest_factors():
    W, x, y = data(14, 15)
    found = calibrated_kronecker(W, moments(x, y), 7, 5, 2, ridge=1e9)
    nearest = nearest_kronecker(W, 7, 5, 2)
    torch.testing.assert_close(found.A, nearest.A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.B, nearest.B, rtol=1e-4, atol=1e-4)


def test_fewer_tokens_than_inputs():
    W, x, y = data(14, 15, tokens=5)
    found = calibrated_kronecker(W, moments(x, y), 7, 5, 2)
    assert all(torch.isfinite(part).all() for part in found[:3])


def test_constant_inputs():
    W, _, y = data(14, 15)
    found = calibrated_kronecker(W, moments(torch.ones(200, 15).double(), torch.ones_like(y)), 7, 5)
    assert all(torch.isfinite(part).all() for part in found[:3])
    torch.testing.assert_close(kronecker_sum(found.A, found.B).sum(1) + found.bias, torch.ones(14).double())


def test_the_same_twice_and_balanced():
    W, x, y = data(14, 15)
    found, again = (calibrated_kronecker(W.clone(), moments(x, y), 7, 5, 3) for _ in range(2))
    assert torch.equal(found.A, again.A)
    assert torch.equal(found.B, again.B)
    norms = found.A.square().sum((0, 2)), found.B.square().sum((0, 2))
    torch.testing.assert_close(*norms)
    assert (norms[0].diff() < 0).all()


def test_no_tokens_and_bad_values_are_refused():
    with pytest.raises(ValueError, match="no tokens; give more text"):
        MomentSums().finish()
    x = torch.randn(20, 4)
    x[3, 2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite activations"):
        moments(x, torch.randn(20, 3))


def weighted_error(W, weights, A, B):
    return float((kronecker_sum(A, B) - W.double()).square().sum(1) @ weights.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_weights_give_the_nearest_sum(shape):
    m1, n1, m2, n2 = shape
    W = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    A, B = weighted_kronecker(W, torch.full((m1 * m2,), 3.0), m1, n1, 2)
    nearest = nearest_kronecker(W, m1, n1, 2)
    torch.testing.assert_close(kronecker_sum(A, B), kronecker_sum(nearest.A, nearest.B), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_count(shape):
    m1, n1, m2, n2 = shape
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(m1 * m2, n1 * n2, generator=generator)
    weights = torch.rand(m1 * m2, generator=generator).pow(4) + 1e-3
    A, B = weighted_kronecker(W, weights, m1, n1, 2)
    nearest = nearest_kronecker(W, m1, n1, 2)
    best = weighted_error(W, weights, A, B)
    assert best < weighted_error(W, weights, nearest.A, nearest.B)
    for _ in range(20):
        a, b = (1e-2 * torch.randn(f.shape, generator=generator) for f in (A, B))
        assert weighted_error(W, weights, A + a, B + b) > best * (1 - 1e-3)


def test_weighted_low_rank_is_the_svd_of_the_weighted_rows():
    W, weights = torch.randn(12, 10, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.1
    A, B = weighted_kronecker(W, weights, 12, 1, 4)
    U, S, Vh = torch.linalg.svd(W * weights.sqrt()[:, None], full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4] / weights.sqrt()[:, None]
    torch.testing.assert_close(kronecker_sum(A, B), best)
    torch.testing.assert_close(kronecker_product(A, B), best)


def test_weights_above_zero():
    with pytest.raises(ValueError, match=r"must be above 0, the smallest is 0\.0; add a constant"):
        weighted_kronecker(torch.randn(4, 6), torch.tensor([1.0, 0.0, 1.0, 1.0]), 4, 3)
