"""The nearest sum of Kronecker products (Van Loan and Pitsianis, 1993).

Rearrange W (m, n) so that every (m2, n2) patch becomes one row: a matrix P of shape (m1 n1, m2 n2). Then

    || W - sum over r of A_r (x) B_r ||_F = || P - sum over r of vec(A_r) vec(B_r)^T ||_F,

so the best R terms are the first R of the singular value decomposition of P; each singular value is split
evenly between the factors (KroneckerBERT, section 3.4; KnGPT2, section 2). One side of P is short, 4 to 32
in the papers' configurations: its singular vectors are the eigenvectors of the Gram matrix of that side,
and P itself is only ever built in slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SLICE_ENTRIES = 1 << 20  # 8 MiB in float64


class KroneckerFactors(NamedTuple):
    """Factors of a weight (m, n) in the layout of the layers, and how far their product is from it."""

    A: Tensor
    """(m1, R, n1); A_r is A[:, r, :]."""
    B: Tensor
    """(m2, R, n2); B_r is B[:, r, :]."""
    relative_error: float
    """|| W - sum of A_r (x) B_r ||_F / || W ||_F; 0 for W = 0."""


@torch.no_grad()
def nearest_kronecker(W: Tensor, m1: int, n1: int, terms: int = 1) -> KroneckerFactors:
    """The sum of `terms` Kronecker products that is nearest to W in the Frobenius norm.

    Deterministic: the entry of largest size in the short factor of each term is positive. Computed in float64, in which
    singular values below about 1e-8 of the largest are lost. Takes O(m n s + s^3) operations and O(s^2) memory besides
    its result, s = min(m1 n1, m2 n2).

    Args:
        W: (m, n), any floating dtype.
        m1, n1: shape of A_r; they divide m and n.
        terms: number R of products, at most s, with which the sum is exact.

    Returns:
        The factors in W's dtype and on its device, and the relative error before they are rounded to that dtype.

    Raises:
        ValueError: a shape does not divide, terms is not in 1 .. s, or W is not a finite matrix.
    """
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(
            f"W must be a floating-point matrix, got shape {tuple(W.shape)} and {W.dtype}; pass a weight (m, n)"
        )
    m, n = W.shape
    for name, value, size in (("m1", m1, m), ("n1", n1, n)):
        if not isinstance(value, int) or value < 1 or size % value:
            raise ValueError(f"{name}={value} must be a positive divisor of {size}; choose a divisor of {size}")
    m2, n2 = m // m1, n // n1
    short = min(m1 * n1, m2 * n2)
    if not isinstance(terms, int) or not 1 <= terms <= short:
        raise ValueError(
            f"terms={terms} must be in 1 .. {short} = min(m1 n1, m2 n2), with which the sum is exact; "
            "choose a number in this range"
        )

    patches = W.reshape(m1, m2, n1, n2).transpose(1, 2)  # (m1, n1, m2, n2)
    if m2 * n2 <= m1 * n1:
        B, A, error = _top_pairs(lambda part: patches[part].reshape(-1, m2 * n2), m1, W.numel(), terms)
    else:
        A, B, error = _top_pairs(lambda part: patches[:, :, part].reshape(m1 * n1, -1).t(), m2, W.numel(), terms)
    # cloned: `contiguous` leaves odd strides at axes of size 1, which DeepSpeed does not take
    A = A.reshape(m1, n1, terms).transpose(1, 2).to(W.dtype).clone(memory_format=torch.contiguous_format)
    B = B.reshape(m2, n2, terms).transpose(1, 2).to(W.dtype).clone(memory_format=torch.contiguous_format)
    return KroneckerFactors(A, B, error)


def _top_pairs(rows: Callable[[slice], Tensor], blocks: int, entries: int, terms: int) -> tuple[Tensor, Tensor, float]:
    """The first `terms` singular pairs of the tall matrix Q (long, short), whose rows come in `blocks` equal blocks.

    Args:
        rows: the rows of Q for a slice of blocks.
        entries: number of entries of Q.

    Returns:
        Right vectors (short, terms) and left vectors (long, terms), float64, each scaled by the root of its singular
        value, and the relative error of the truncation.
    """
    step = max(1, _SLICE_ENTRIES * blocks // entries)
    slices = [slice(start, start + step) for start in range(0, blocks, step)]

    gram = torch.zeros((), dtype=torch.float64)
    for part in slices:
        q = rows(part).double()
        gram = gram.to(q.device) + q.t() @ q  # (short, short)
    if not torch.isfinite(gram).all():
        raise ValueError("W holds NaN or infinite values; repair the weights first")
    values, vectors = torch.linalg.eigh(gram)  # ascending
    right = vectors[:, -terms:].flip(1)  # (short, terms)
    right = right * right.gather(0, right.abs().argmax(0, keepdim=True)).sign()
    left = torch.cat([rows(part).double() @ right for part in slices])  # (long, terms), times singular value
    roots = torch.linalg.vector_norm(left, dim=0).sqrt()  # (terms,)

    dropped, total = values[:-terms].clamp_min(0).sum(), gram.trace()
    error = float((dropped / total).sqrt()) if total > 0 else 0.0
    return right * roots, left / roots.clamp_min(torch.finfo(torch.float64).tiny), error
