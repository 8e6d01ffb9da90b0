"""Independent references: plain loops in float64."""

import numpy as np
import torch


def kronecker_sum(A, B):
    """W = sum of A_r (x) B_r from A (m1, R, n1) and B (m2, R, n2), entry by entry in float64."""
    A, B = A.detach().double().numpy(), B.detach().double().numpy()
    (m1, terms, n1), (m2, _, n2) = A.shape, B.shape
    W = np.zeros((m1 * m2, n1 * n2))
    for r in range(terms):
        for i1 in range(m1):
            for j1 in range(n1):
                for i2 in range(m2):
                    for j2 in range(n2):
                        W[i1 * m2 + i2, j1 * n2 + j2] += A[i1, r, j1] * B[i2, r, j2]
    return torch.from_numpy(W)
