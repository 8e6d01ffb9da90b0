"""Factors that are near the dense layer on the inputs that it really gets, not in the Frobenius norm.

A layer y = W x + b of the teacher is replaced by one that sees the student's own inputs x', which earlier factored
layers have already changed. Its factors minimise, over calibration text,

    J(A, B) = E || (y - E y) - W' (x' - E x') ||^2 + ridge || W - W' ||_F^2,   W' = sum over r of A_r (x) B_r,

and its bias makes the means agree. With C = Cov(x') + ridge I (n, n) and D = Cov(y, x') + ridge W (m, n),

    J = const - 2 <W', D> + tr(W' C W'^T),

quadratic in A for fixed B and in B for fixed A: alternating least squares. All rows of A solve one system of R n1
unknowns; likewise B with R n2. They work in coordinates in which the nearest Kronecker product to C,
(L1 L1^T) (x) (L2 L2^T), is the identity: A_r L1 and B_r L2 take the place of A_r and B_r. There the systems for one
factor are near the identity when the other is orthonormal, so conjugate gradients solve in a few steps those that are
too large to be written down; the others are solved at once. Where the sum is of low rank, (m1, n1) = (m, 1) or (1, n),
the optimum is a truncated singular value decomposition for whitened inputs instead.

An embedding has no inputs but words, so its rows are weighted by how often the text has them.

Everything is in float64: covariances of hidden states have condition numbers that float32 does not bear.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.kronecker_contraction import contract
from ..models.kronecker_nearest import nearest_kronecker
from .moments import Moments, kronecker_product, squared_error

_ROWS = 4096  # of an embedding at a time

RIDGE = 0.1
"""Pull towards the dense weight, as a share of the mean variance of an input."""
MAX_SWEEPS = 40
"""Alternations over A and B at most."""
TOLERANCE = 5e-4
"""A sweep that lowers J by less than this share of the variance of y is the last."""
_LARGEST = 4096  # unknowns of a row for which a system is written down, where that is also the cheaper way
_STEPS, _PRECISION = 10, 1e-3  # of conjugate gradients: at most, and the residual, over the right side, that is enough
_JITTER = 1e-7  # of the mean of the diagonal, so that a covariance of few tokens has a Cholesky factor
_POWER_STEPS = 8


class CalibratedFactors(NamedTuple):
    """Factors in the layout of the layers, and the bias that goes with them."""

    A: Tensor
    """(m1, R, n1), float64."""
    B: Tensor
    """(m2, R, n2), float64."""
    bias: Tensor
    """(m,), float64."""
    objective: list[float]
    """J over the variance of y after each half of a sweep; one value where there is a formula."""


@torch.no_grad()
def calibrated_kronecker(
    W: Tensor, moments: Moments, m1: int, n1: int, terms: int = 1, ridge: float = RIDGE, sweeps: int = MAX_SWEEPS
) -> CalibratedFactors:
    """The sum of Kronecker products that is nearest to a layer on calibration text. Deterministic.

    Alternating least squares start from the better of two nearest sums, one of them to W; each half of a sweep lowers
    J, to a local minimum. For low rank the optimum is global.

    Args:
        W: the dense weight (m, n).
        moments: of its inputs and outputs.
        m1, n1, terms: shape of A_r and number of terms, as in `nearest_kronecker`.
        ridge: pull towards W, as a share of the mean variance of an input; > 0.
        sweeps: alternations over A and B at most.

    Returns:
        Factors and bias in float64 on the device of the moments.

    Raises:
        ValueError: a shape does not fit, or W is not finite.
    """
    m, n = W.shape
    strength = ridge * float(moments.inputs.diagonal().mean()) or ridge
    C = moments.inputs.clone()
    C.diagonal().add_(strength)
    D = moments.cross + strength * W.double()
    # J(W') of the regression with ridge, without its constants
    total = float(moments.output_variance.sum()) + strength * float(W.double().square().sum())
    scale = float(moments.output_variance.sum()) or 1.0
    if (m1, n1) == (m, 1) or (m1, n1) == (1, n):
        A, B = _low_rank(C, D, n1, terms)
        history = [squared_error(C, D, total, kronecker_product(A, B)) / scale]
    else:
        A, B, history = _alternate(W, C, D, total, scale, m1, n1, terms, sweeps)
    bias = moments.output_mean - kronecker_product(A, B) @ moments.input_mean
    return CalibratedFactors(A, B, bias, history)


@torch.no_grad()
def weighted_kronecker(W: Tensor, weights: Tensor, m1: int, n1: int, terms: int = 1) -> tuple[Tensor, Tensor]:
    """The sum of Kronecker products nearest to W in the norm that weights its rows. Deterministic.

    With m2 = 1, where every row has its own row of A, this is the nearest sum of the rows times the roots of their
    weights, from which B is taken; A then follows row by row, whatever the weight. Other shapes go on from there by
    alternating least squares, to a local minimum.

    Args:
        W: (m, n).
        weights: of its rows (m,), all > 0.
        m1, n1, terms: shape of A_r and number of terms, as in `nearest_kronecker`.

    Returns:
        A (m1, R, n1) and B (m2, R, n2), float64, on the device of W.

    Raises:
        ValueError: a shape does not fit, W is not finite, or a weight is not above 0.
    """
    if not (weights > 0).all():
        raise ValueError(f"weights of rows must be above 0, the smallest is {float(weights.min())}; add a constant")
    weights = weights.to(W.device, torch.float64) / weights.sum()
    B = nearest_kronecker(W.double() * weights.sqrt().unsqueeze(1), m1, n1, terms).B
    m2, n2 = B.shape[0], B.shape[2]
    blocks = W.double().reshape(m1, m2, n1, n2)
    shares = weights.reshape(m1, m2)
    B = _orthonormal(B)
    A = _solve_rows(blocks, shares, B)
    previous = math.inf
    for _ in range(0 if m2 == 1 else MAX_SWEEPS):
        A = _orthonormal(A)
        B = _orthonormal(_solve_rows(blocks.permute(1, 0, 3, 2), shares.t(), A))
        A = _solve_rows(blocks, shares, B)
        rest = (kronecker_product(A, B) - W).square().sum(1) @ weights / (W.double().square().sum(1) @ weights)
        if previous - rest < TOLERANCE:
            break
        previous = float(rest)
    return _canonical(A, B)


def _solve_rows(W: Tensor, weights: Tensor, B: Tensor) -> Tensor:
    """The best A (m1, R, n1) for W (m1, m2, n1, n2), weights of its rows (m1, m2), and an orthonormal B (m2, R, n2)."""
    if len(B) == 1:  # all systems are the identity
        return torch.einsum("rl,ijl->irj", B[0], W[:, 0])
    rows = []
    for block, shares in zip(W.split(_ROWS), weights.split(_ROWS), strict=True):
        shares = shares / shares.sum(1, keepdim=True)
        M = torch.einsum("ik,krl,ksl->irs", shares, B, B)  # (rows, R, R)
        M.diagonal(dim1=1, dim2=2).add_(torch.finfo(M.dtype).eps)
        rows.append(torch.linalg.solve(M, torch.einsum("ik,krl,ikjl->irj", shares, B, block)))
    return torch.cat(rows)


def _low_rank(C: Tensor, D: Tensor, n1: int, terms: int) -> tuple[Tensor, Tensor]:
    """The best W' of rank `terms`: with C = L L^T, W' L is the truncated SVD of D L^(-T)."""
    m, n = D.shape
    L = torch.linalg.cholesky(C)
    whitened = torch.linalg.solve_triangular(L, D.t(), upper=False).t()  # D L^(-T)
    U = _left_vectors(whitened, terms)  # (m, R)
    V = torch.linalg.solve_triangular(L.t(), (U.t() @ whitened).t(), upper=True)  # (n, R): W' = U V^T
    tall, wide = _balanced(U, V)
    if n1 == 1:
        return tall.reshape(m, terms, 1), wide.t().reshape(1, terms, n).contiguous()
    return wide.t().reshape(1, terms, n).contiguous(), tall.reshape(m, terms, 1)


def _left_vectors(P: Tensor, terms: int) -> Tensor:
    """The first left singular vectors, from the Gram matrix of the shorter side."""
    if P.shape[0] <= P.shape[1]:
        return torch.linalg.eigh(P @ P.t()).eigenvectors[:, -terms:].flip(1)
    V = torch.linalg.eigh(P.t() @ P).eigenvectors[:, -terms:].flip(1)
    return torch.linalg.qr(P @ V).Q


def _alternate(
    W: Tensor, C: Tensor, D: Tensor, total: float, scale: float, m1: int, n1: int, terms: int, sweeps: int
) -> tuple[Tensor, Tensor, list[float]]:
    roots = kronecker_roots(C, n1)
    inverses = [torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False) for L in roots]
    back = [inverse.t() for inverse in inverses]
    regression = torch.cholesky_solve(D.t(), torch.linalg.cholesky(C)).t()
    D, C = times_kronecker(D, *back), times_kronecker(times_kronecker(C, *back).t(), *back)
    # the better of two starts: the nearest sum to the regression, in these coordinates, and to W
    first = nearest_kronecker(times_kronecker(regression, *roots), m1, n1, terms)
    second = nearest_kronecker(W, m1, n1, terms)
    starts = (first.A, first.B), (second.A.double() @ roots[0], second.B.double() @ roots[1])
    system = _System(C, D.reshape(m1, len(D) // m1, n1, -1), total)
    A, B, value = min((system.solve(A, B) for A, B in starts), key=itemgetter(2))
    history = [value / scale]
    transposed = system.transposed()
    for _ in range(sweeps):
        B, A, value = transposed.solve(B, A)
        history.append(value / scale)
        if len(history) > 2 and history[-3] - history[-1] < TOLERANCE:
            break
        A, B, value = system.solve(A, B)
        history.append(value / scale)
    return *_canonical(A @ inverses[0], B @ inverses[1]), history


def times_kronecker(X: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """X (left (x) right), X (m, n)."""
    return contract(X, left.t().unsqueeze(1), right.t().unsqueeze(1), None)


def kronecker_roots(C: Tensor, n1: int) -> tuple[Tensor, Tensor]:
    """Cholesky factors (n1, n1) and (n2, n2) of the nearest Kronecker product to a covariance C (n, n)."""
    n2 = len(C) // n1
    P = rearranged(C, n1)
    right = torch.eye(n2, dtype=C.dtype, device=C.device).flatten()
    for _ in range(_POWER_STEPS):  # from a positive definite start all iterates are positive semidefinite
        left = P @ right
        left = left / left.norm().clamp_min(torch.finfo(C.dtype).tiny)
        right = P.t() @ left
    return _root(left.reshape(n1, n1)), _root(right.reshape(n2, n2))


def _root(C: Tensor) -> Tensor:
    C = (C + C.t()) / 2
    C.diagonal().add_(_JITTER * C.diagonal().mean() + torch.finfo(C.dtype).tiny)
    return torch.linalg.cholesky(C)


class _System:
    """J as a quadratic form in A for fixed B: tr(A M A^T) - 2 <A, H>, rows of A as (R n1)."""

    def __init__(self, C: Tensor, D: Tensor, total: float) -> None:
        """Take C (n, n), D (m1, m2, n1, n2), and J of A = 0."""
        self._C, self._D, self._total = C, D, total

    def transposed(self) -> _System:
        """The same for B with fixed A."""
        _, _, n1, n2 = self._D.shape
        C = self._C.reshape(n1, n2, n1, n2).permute(1, 0, 3, 2).reshape(self._C.shape)
        return _System(C, self._D.permute(1, 0, 3, 2), self._total)

    def solve(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
        """Another basis of the terms, with B orthonormal and the best A, or one that is nearer to it; and J."""
        (m2, R, n2), (m1, _, n1) = B.shape, A.shape
        q, change = torch.linalg.qr(B.transpose(1, 2).reshape(m2 * n2, R))
        B = q.unflatten(0, (m2, n2)).transpose(1, 2)
        if R * n1 <= _LARGEST and self._written_cost(A.shape, B.shape) < _STEPS * m1 * m2 * len(self._C) ** 2:
            M, H = self._matrix(B), self._inner(self._D, B)
            A = torch.cholesky_solve(H.flatten(1).t(), torch.linalg.cholesky((M + M.t()) / 2)).t().reshape(m1, R, n1)
            return A, B, self._total - float((A * H).sum())
        return self._descend(torch.einsum("irj,sr->isj", A, change), B)

    def _written_cost(self, a_shape: torch.Size, b_shape: torch.Size) -> int:
        """Multiplications to write the system down and to solve it; those of a step of `_descend` are about m n n."""
        unknowns = b_shape[1] * a_shape[2]
        return min(self._orders(b_shape)) + unknowns**3 // 3 + a_shape[0] * unknowns**2

    def _orders(self, b_shape: torch.Size) -> tuple[int, int]:
        """Multiplications of `_matrix` in two orders: from products B_r^T B_s, and from products of C and B_r."""
        (m2, R, n2), n = b_shape, len(self._C)
        return R**2 * (m2 * n2**2 + n**2), R * m2 * (n**2 + R * n // n2 * n)

    def _matrix(self, B: Tensor) -> Tensor:
        """M (R n1, R n1): sums over k of B_r[k] C[j, h] B_s[k], in the cheaper of two orders."""
        (m2, R, n2), n = B.shape, len(self._C)
        n1 = n // n2
        M = B.new_empty(R, n1, R, n1)
        from_products, from_rows = self._orders(B.shape)
        if from_products < from_rows:
            form = rearranged(self._C, n1).t()
            for r in range(R):
                gram = torch.einsum("kl,ksh->slh", B[:, r], B).reshape(R, n2 * n2)  # B_r^T B_s
                M[r] = (gram @ form).reshape(R, n1, n1).transpose(0, 1)
        else:
            rows = self._C.reshape(n * n1, n2)
            for r in range(R):
                M[r] = torch.einsum("hbjk,ksb->jsh", (rows @ B[:, r].t()).reshape(n1, n2, n1, m2), B)
        return M.reshape(R * n1, R * n1)

    def _descend(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
        """Conjugate gradients."""
        H = self._inner(self._D, B)
        rest = H - self._times(A, B)
        direction, power, enough = rest, float(rest.square().sum()), _PRECISION**2 * float(H.square().sum())
        for _ in range(_STEPS):
            if power <= enough:
                break
            image = self._times(direction, B)
            step = power / float((direction * image).sum())
            A, rest = A + step * direction, rest - step * image
            last, power = power, float(rest.square().sum())
            direction = rest + power / last * direction
        return A, B, self._total - float((A * (H + rest)).sum())

    def _times(self, A: Tensor, B: Tensor) -> Tensor:
        """A M (m1, R, n1)."""
        return self._inner((kronecker_product(A, B) @ self._C).reshape(self._D.shape), B)

    @staticmethod
    def _inner(D: Tensor, B: Tensor) -> Tensor:
        return torch.einsum("krl,ikjl->irj", B, D)


def rearranged(C: Tensor, n1: int) -> Tensor:
    """C (n, n) as (n1 n1, n2 n2)."""
    n2 = len(C) // n1
    return C.reshape(n1, n2, n1, n2).permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)


def _orthonormal(B: Tensor) -> Tensor:
    """Another basis of the same terms, orthonormal, so that the system for the other factor is well conditioned."""
    m2, R, n2 = B.shape
    q, _ = torch.linalg.qr(B.transpose(1, 2).reshape(m2 * n2, R))
    return q.unflatten(0, (m2, n2)).transpose(1, 2)


def _canonical(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum with balanced terms, contiguous."""
    (m1, _, n1), (m2, _, n2) = A.shape, B.shape
    a, b = _balanced(A.transpose(1, 2).reshape(m1 * n1, -1), B.transpose(1, 2).reshape(m2 * n2, -1))
    A, B = a.unflatten(0, (m1, n1)).transpose(1, 2), b.unflatten(0, (m2, n2)).transpose(1, 2)
    return A.contiguous(), B.contiguous()


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (p, R) and (q, R) with the same a b^T, as `nearest_kronecker` gives them.

    Terms are orthogonal, in order of their size, of equal norm in both factors, and the largest entry in the smaller
    factor is positive.
    """
    (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b)
    U, S, Vt = torch.linalg.svd(ra @ rb.t())
    left, right = qa @ U * S.sqrt(), qb @ Vt.t() * S.sqrt()
    small = left if len(left) < len(right) else right
    signs = small.gather(0, small.abs().argmax(0, keepdim=True)).sign()
    return left * signs, right * signs
