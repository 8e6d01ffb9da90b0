import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kronecker_sum

from kronecker_transformers import nearest_kronecker
from kronecker_transformers.models import kronecker_nearest as nearest

SHAPES = [(7, 5, 2, 3), (3, 2, 11, 5), (2, 3, 5, 11), (14, 3, 1, 4), (12, 1, 1, 10), (1, 10, 12, 1), (6, 10, 2, 1)]


def rearranged(W, m1, n1):
    """Row (i1, j1) holds the patch W[i1 m2 : (i1+1) m2, j1 n2 : (j1+1) n2], row by row."""
    m2, n2 = W.shape[0] // m1, W.shape[1] // n1
    rows = [W[i * m2 : (i + 1) * m2, j * n2 : (j + 1) * n2].reshape(-1).double() for i in range(m1) for j in range(n1)]
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimal_for_every_number_of_terms(shape):
    m1, n1, m2, n2 = shape
    W = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    singular = torch.linalg.svdvals(rearranged(W, m1, n1))
    for terms in range(1, len(singular) + 1):
        A, B, error = nearest_kronecker(W, m1, n1, terms)
        assert A.shape == (m1, terms, n1)
        assert B.shape == (m2, terms, n2)
        best = (singular[terms:].square().sum() / singular.square().sum()).sqrt().item()
        actual = ((W - kronecker_sum(A, B)).norm() / W.norm()).item()
        assert actual == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert error == pytest.approx(best, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_are_split_evenly_and_signs_are_fixed(shape):
    m1, n1, m2, n2 = shape
    W = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    terms = min(3, m1 * n1, m2 * n2)
    A, B, _ = nearest_kronecker(W, m1, n1, terms)
    singular = torch.linalg.svdvals(rearranged(W, m1, n1))[:terms]
    torch.testing.assert_close(A.square().sum((0, 2)), singular)
    torch.testing.assert_close(B.square().sum((0, 2)), singular)
    short = B if m2 * n2 <= m1 * n1 else A
    flat = short.transpose(0, 1).flatten(1)
    assert (flat.gather(1, flat.abs().argmax(1, keepdim=True)) > 0).all()
    again = nearest_kronecker(W.clone(), m1, n1, terms)
    assert torch.equal(again.A, A)
    assert torch.equal(again.B, B)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planted_product_is_found(shape):
    m1, n1, m2, n2 = shape
    W = kronecker_sum(torch.randn(m1, 1, n1), torch.randn(m2, 1, n2))
    A, B, error = nearest_kronecker(W, m1, n1)
    torch.testing.assert_close(kronecker_sum(A, B), W, rtol=1e-10, atol=1e-10)
    assert error < 1e-7


@pytest.mark.parametrize("shape", [(7, 5, 2, 3), (3, 2, 11, 5)], ids=str)
def test_slices_do_not_change_the_result(shape, monkeypatch):
    m1, n1, m2, n2 = shape
    W = torch.randn(m1 * m2, n1 * n2)
    whole = nearest_kronecker(W, m1, n1, 2)
    monkeypatch.setattr(nearest, "_SLICE_ENTRIES", 40)
    sliced = nearest_kronecker(W, m1, n1, 2)
    torch.testing.assert_close(sliced.A, whole.A)
    torch.testing.assert_close(sliced.B, whole.B)


def test_low_rank_is_the_svd():
    W = torch.randn(12, 10, dtype=torch.float64)
    A, B, _ = nearest_kronecker(W, 12, 1, 4)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(kronecker_sum(A, B), (U[:, :4] * S[:4]) @ Vh[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    W = torch.randn(14, 15).to(dtype)
    A, B, error = nearest_kronecker(W, 7, 5, 2)
    assert A.dtype == B.dtype == dtype
    exact = nearest_kronecker(W.double(), 7, 5, 2)
    torch.testing.assert_close(A.double(), exact.A, rtol=1e-2, atol=1e-2)
    assert error == pytest.approx(exact.relative_error)


def test_transposed_weight_needs_no_copy_to_be_right():
    W = torch.randn(15, 14, dtype=torch.float64)
    torch.testing.assert_close(nearest_kronecker(W.t(), 7, 5, 2), nearest_kronecker(W.t().contiguous(), 7, 5, 2))


def test_zero_weight():
    A, B, error = nearest_kronecker(torch.zeros(14, 15), 7, 5, 2)
    assert not A.any()
    assert not B.any()
    assert error == 0


def test_result_carries_no_gradient():
    assert not nearest_kronecker(torch.randn(4, 6, requires_grad=True), 2, 3).A.requires_grad


@pytest.mark.parametrize(
    ("W", "arguments", "message"),
    [
        (torch.zeros(14, 15), (4, 5), "m1=4 must be a positive divisor of 14"),
        (torch.zeros(14, 15), (7, 0), "n1=0 must be a positive divisor of 15"),
        (torch.zeros(14, 15), (7, 5, 0), r"terms=0 must be in 1 \.\. 6"),
        (torch.zeros(14, 15), (7, 5, 7), r"terms=7 must be in 1 \.\. 6"),
        (torch.zeros(14, 15), (7, 5, 2.0), r"terms=2\.0 must be in 1"),
        (torch.zeros(14), (7, 5), "W must be a floating-point matrix"),
        (torch.zeros(14, 15, dtype=torch.int64), (7, 5), "W must be a floating-point matrix"),
        (torch.full((14, 15), torch.nan), (7, 5), "NaN or infinite"),
        (torch.full((14, 15), torch.inf), (1, 3), "NaN or infinite"),
    ],
)
def test_bad_input(W, arguments, message):
    with pytest.raises(ValueError, match=message):
        nearest_kronecker(W, *arguments)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.data())
def test_error_never_rises_with_more_terms(m1, n1, m2, n2, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    W = torch.randn(m1 * m2, n1 * n2, dtype=torch.float64)
    errors = [nearest_kronecker(W, m1, n1, terms).relative_error for terms in range(1, min(m1 * n1, m2 * n2) + 1)]
    assert all(later <= earlier + 1e-7 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(0, abs=1e-7)
