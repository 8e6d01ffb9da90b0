"""What calibration text tells of a layer: moments of its inputs and outputs, and the error of factors by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's inputs x' in the student and of its outputs y in the teacher.

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
        product = kronecker_product(A, B)
        squared = squared_error(self.inputs, self.cross, total, product)
        squared += float((self.output_mean - product @ self.input_mean - bias.double()).square().sum())
        return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0


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


class SplitSums:
    """The same for one part of a model, with the tokens that are held out apart.

    Args:
        what: the part, for errors.
    """

    def __init__(self, what: str) -> None:
        self._what, self._sums = what, {held_out: MomentSums() for held_out in (False, True)}

    def add(self, held_out: bool, x: Tensor, y: Tensor) -> None:
        """As `MomentSums.add`."""
        self._sums[held_out].add(x, y)

    def finish(self) -> tuple[Moments, Moments]:
        """The moments to fit on, and those that are held out.

        Raises:
            ValueError: as `MomentSums.finish`.
        """
        try:
            return self._sums[False].finish(), self._sums[True].finish()
        except ValueError as error:
            raise ValueError(f"{self._what}: {error}") from error


def kronecker_product(A: Tensor, B: Tensor) -> Tensor:
    """The sum of A_r (x) B_r (m, n), float64."""
    (m1, _, n1), (m2, _, n2) = A.shape, B.shape
    return torch.einsum("irj,krl->ikjl", A.double(), B.double()).reshape(m1 * m2, n1 * n2)


def squared_error(C: Tensor, D: Tensor, total: float, product: Tensor) -> float:
    """Of outputs by a product W' (m, n), with C = Cov(x'), D = Cov(y, x'): total - 2 <W', D> + tr(W' C W'^T)."""
    return total - 2 * float((product * D).sum()) + float(((product @ C) * product).sum())
