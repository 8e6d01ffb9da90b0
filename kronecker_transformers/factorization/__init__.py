"""From dense weights to factors."""

from .nearest import KroneckerFactors, nearest_kronecker

__all__ = ["KroneckerFactors", "nearest_kronecker"]
