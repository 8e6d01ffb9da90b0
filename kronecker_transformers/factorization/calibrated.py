"""Factors that are near the dense layer on the inputs that it really gets, not in the Frobenius norm.

A layer y = W x + b of the teacher is replaced by one that sees the student's own inputs x', which earlier factored
layers have already changed. Its factors minimise, over calibration text,

    J(A, B) = E || (y - E y) - W' (x' - E x') ||^2 + ridge || W - W' ||_F^2,   W' = sum over r of A_r (x) B_r,

and its bias makes the means agree. With C = Cov(x') + ridge I (n, n) and D = Cov(y, x') + ridge W (m, n),

    J = const - 2 <W', D> + tr(W' C W'^T),

quadratic in A for fixed B and in B for fixed A: alternating least squares, in closed form. All rows of A solve one
system of R n1 unknowns; likewise B with R n2. Van Loan and Pitsianis' rearrangement of C, to (n1 n1, n2 n2), makes both
systems from one matrix. Where the sum is of low rank, (m1, n1) = (m, 1) or (1, n), the optimum is a truncated singular
value decomposition for whitened inputs instead.

An embedding has no inputs but words, so its rows are weighted by how often the text has them.

Everything is in float64: covariances of hidden states have condition numbers that float32 does not bear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .nearest import nearest_kronecker

_ROWS = 4096  # of an embedding at a time

RIDGE = 1e-2
"""Pull towards the dense weight, as a share of the mean variance of an input."""
MAX_SWEEPS = 40
"""Alternations over A and B at most."""
TOLERANCE = 1e-4
"""A sweep that lowers J by less than this share of the variance of y is the last."""


@dataclass(frozen=True)
class Moments:
    """What calibration text tells of a layer: moments of its inputs x' in the student and outputs y in the teacher.

    All float64; covariances are divided by the number of tokens.
    """

    input_mean: Tensor
    """(n,)"""
    output_mean: Tensor
    """(m,)"""
    inputs: Tensor
    """Cov(x'), (n, n)."""
    cross: Tensor
    """Cov(y, x'), (m, n)."""
    output_variance: Tensor
    """Var(y), (m,)"""

    def rows(self, part: slice) -> Moments:
        """Those of some of the outputs."""
        return Moments(
            self.input_mean, self.output_mean[part], self.inputs, self.cross[part], self.output_variance[part]
        )

    def relative_error(self, A: Tensor, B: Tensor, bias: Tensor) -> float:
        """Root of E || y - W' x' - bias ||^2 / E || y - E y ||^2."""
        total = float(self.output_variance.sum())
        M, H = _normal_equations(rearranged(self.inputs, A.shape[2]), self._cross_blocks(A, B), B.double())
        a = A.double().flatten(1)  # (m1, R n1)
        squared = total - 2 * float((a * H).sum()) + float(((a @ M) * a).sum())
        mean = kronecker_product(A, B) @ self.input_mean + bias.double()
        squared += float((self.output_mean - mean).square().sum())
        return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0

    def _cross_blocks(self, A: Tensor, B: Tensor) -> Tensor:
        return self.cross.reshape(A.shape[0], B.shape[0], A.shape[2], B.shape[2])  # (m1, m2, n1, n2)


class MomentSums:
    """Sums over calibration tokens, taken in block by block."""

    def __init__(self) -> None:
        self._tokens = 0
        self._shifts: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in a block of tokens.

        Args:
            x: inputs in the student (tokens, n); half precision is widened to float32.
            y: outputs in the teacher (tokens, m).
        """
        if not len(x):
            return
        x, y = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x, y))
        if self._shifts is None:  # products of what is far from 0 would lose digits in float32
            n, m = x.shape[1], y.shape[1]
            self._shifts = x.mean(0), y.mean(0)
            self._x, self._y, self._power, self._xx, self._yx = (
                torch.zeros(size, dtype=torch.float64, device=x.device) for size in ((n,), (m,), (m,), (n, n), (m, n))
            )
        x, y = x - self._shifts[0], y - self._shifts[1]
        self._tokens += len(x)
        self._x += x.sum(0, dtype=torch.float64)
        self._y += y.sum(0, dtype=torch.float64)
        self._power += y.double().square().sum(0)
        self._xx += x.t() @ x
        self._yx += y.t() @ x

    def finish(self) -> Moments:
        """The moments of all that was taken in.

        Raises:
            ValueError: no tokens, or values that are not finite.
        """
        if self._shifts is None:
            raise ValueError("calibration text gave no tokens; give more text")
        x, y = self._x / self._tokens, self._y / self._tokens
        moments = Moments(
            x + self._shifts[0],
            y + self._shifts[1],
            self._xx / self._tokens - torch.outer(x, x),
            self._yx / self._tokens - torch.outer(y, x),
            (self._power / self._tokens - y.square()).clamp_min(0),
        )
        if not all(torch.isfinite(t).all() for t in (moments.inputs, moments.cross, moments.output_variance)):
            raise ValueError("calibration text gives NaN or infinite activations; check the teacher and its dtype")
        return moments


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
    W: Tensor, moments: Moments, m1: int, n1: int, terms: int = 1, ridge: float = RIDGE
) -> CalibratedFactors:
    """The sum of Kronecker products that is nearest to a layer on calibration text. Deterministic.

    Alternating least squares start from the best of three nearest sums, that to W among them; each half of a sweep
    lowers J, to a local minimum. For low rank the optimum is global.

    Args:
        W: the dense weight (m, n).
        moments: of its inputs and outputs.
        m1, n1, terms: shape of A_r and number of terms, as in `nearest_kronecker`.
        ridge: pull towards W, as a share of the mean variance of an input; > 0.

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
        A, B = _low_rank(C, D, m1, n1, terms)
        history = [_objective(C, D, total, A, B) / scale]
    else:
        A, B, history = _alternate(W, C, D, total, scale, m1, n1, terms)
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


def kronecker_product(A: Tensor, B: Tensor) -> Tensor:
    """The sum of A_r (x) B_r (m, n), float64."""
    (m1, _, n1), (m2, _, n2) = A.shape, B.shape
    return torch.einsum("irj,krl->ikjl", A.double(), B.double()).reshape(m1 * m2, n1 * n2)


def _low_rank(C: Tensor, D: Tensor, m1: int, n1: int, terms: int) -> tuple[Tensor, Tensor]:
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
    W: Tensor, C: Tensor, D: Tensor, total: float, scale: float, m1: int, n1: int, terms: int
) -> tuple[Tensor, Tensor, list[float]]:
    m2, n2 = len(D) // m1, len(C) // n1
    blocks = D.reshape(m1, m2, n1, n2)
    form = rearranged(C, n1)
    # of three starts the best: the nearest sum to the regression, as it is and with its columns weighted, and to W
    regression = torch.cholesky_solve(D.t(), torch.linalg.cholesky(C)).t()
    targets = (regression, regression * C.diagonal().sqrt(), W.double())
    starts = [_orthonormal(nearest_kronecker(target, m1, n1, terms).B) for target in targets]
    A, value = min((_solve(form, blocks, B, total) for B in starts), key=itemgetter(1))
    history = [value / scale]
    for _ in range(MAX_SWEEPS):
        A = _orthonormal(A)
        B, value = _solve(form.t(), blocks.permute(1, 0, 3, 2), A, total)
        history.append(value / scale)
        if len(history) > 2 and history[-3] - history[-1] < TOLERANCE:
            break
        B = _orthonormal(B)
        A, value = _solve(form, blocks, B, total)
        history.append(value / scale)
    return *_canonical(A, B), history


def rearranged(C: Tensor, n1: int) -> Tensor:
    """C (n, n) as (n1 n1, n2 n2)."""
    n2 = len(C) // n1
    return C.reshape(n1, n2, n1, n2).permute(0, 2, 1, 3).reshape(n1 * n1, n2 * n2)


def _normal_equations(C: Tensor, D: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The quadratic form that J is in A: tr(A M A^T) - 2 <A, H>, rows of A as (R n1).

    Args:
        C: (n1 n1, n2 n2).
        D: (m1, m2, n1, n2).
        B: (m2, R, n2), float64.

    Returns:
        M (R n1, R n1) and H (m1, R n1).
    """
    m1, _, n1, n2 = D.shape
    R = B.shape[1]
    H = torch.einsum("krl,ikjl->irj", B, D).reshape(m1, R * n1)
    M = B.new_empty(R, n1, R, n1)
    for r in range(R):
        gram = torch.einsum("kl,ksh->slh", B[:, r], B).reshape(R, n2 * n2)  # B_r^T B_s
        M[r] = (gram @ C.t()).reshape(R, n1, n1).transpose(0, 1)  # (n1, R, n1)
    return M.reshape(R * n1, R * n1), H


def _solve(C: Tensor, D: Tensor, B: Tensor, total: float) -> tuple[Tensor, float]:
    """The best A for this B, and J."""
    M, H = _normal_equations(C, D, B)
    factor = torch.linalg.cholesky((M + M.t()) / 2)
    A = torch.cholesky_solve(H.t(), factor).t()  # (m1, R n1)
    return A.reshape(D.shape[0], B.shape[1], -1), total - float((A * H).sum())


def _objective(C: Tensor, D: Tensor, total: float, A: Tensor, B: Tensor) -> float:
    product = kronecker_product(A, B)
    return total - 2 * float((product * D).sum()) + float(((product @ C) * product).sum())


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
