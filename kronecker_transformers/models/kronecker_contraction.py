"""The product of a sum of Kronecker products and many vectors, with its gradients.

    (A (x) B) x = vec(A X B^T)

(KroneckerBERT, Tahaei et al., NAACL 2022, section 3; KnGPT2, Edalati et al., ACL 2022, section 2), with the layout of
the factors of `kronecker_layers`. The cost depends on the order and on how the parts lie in memory:

- the larger factor is one contiguous GEMM over all tokens; the smaller one goes over it as a batch of small products.
  The obvious code, with the larger factor in the batch, is slower than a dense layer;
- on a CPU a block of tokens goes through at a time, so that what lies between the factors stays in the cache;
- only the input is kept for the gradients, as in a dense layer; what lies between the factors is computed again.

A sum of low rank, where A or B is one column for each term, is two dense products, and PyTorch's own are the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_AT_A_TIME = 512
"""On a CPU (benchmarks/blocks.py)."""


def multiplications(m1: int, n1: int, m2: int, n2: int, terms: int) -> tuple[int, int]:
    """Multiplications per token of both contraction orders: X B^T first, and A X first."""
    return terms * n1 * n2 * m2 + terms * m2 * n1 * m1, terms * n2 * n1 * m1 + terms * m1 * n2 * m2


def _left_multiply(M: Tensor, X: Tensor, bias: Tensor | None = None) -> Tensor:
    """M X[t] + bias for every t: M (p, k) and bias (p, q) shared, X (T, k, q), result (T, p, q)."""
    p, k = M.shape
    tokens, _, q = X.shape
    if q == 1:
        return _plus(F.linear(X.squeeze(-1), M).unsqueeze(-1), bias)
    # the exporter that traces would write down this number of tokens in `expand`
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        return _plus(torch.matmul(M, X), bias)
    if min(p, k) > q:  # the gradient of M, (T, p, k) before the sum over T, would be larger than the activations
        return _plus(F.linear(X.transpose(1, 2), M).transpose(1, 2), bias)
    # not matmul, which folds this into one very thin GEMM when M needs a gradient, ten times slower on a CPU
    if bias is None or _is_traced():  # a compiler adds the bias as it likes
        return _plus(torch.bmm(M.expand(tokens, p, k), X), bias)
    return torch.baddbmm(bias, M.expand(tokens, p, k), X)


def _plus(Y: Tensor, bias: Tensor | None) -> Tensor:
    """Y + bias, in place: Y is fresh, and saved for no gradient."""
    return Y if bias is None else Y.add_(bias)


def _sum_of_outer(G: Tensor, X: Tensor) -> Tensor:
    """Sum over t of G[t] X[t]^T, the gradient of M in `_left_multiply`: G (T, p, q), X (T, k, q), result (p, k)."""
    (_, p, q), k = G.shape, X.shape[1]
    if 1 < q >= min(p, k):
        return torch.bmm(G, X.transpose(1, 2)).sum(0)
    return G.transpose(1, 2).reshape(-1, p).t() @ X.transpose(1, 2).reshape(-1, k)


class _Contraction:
    """A X B^T, summed over the terms, in the cheaper of the two orders; x (T, n), A (m1, R, n1), B (m2, R, n2).

    P is the factor that comes first, Q the other one; V is X, or its transpose, with the side of P in front:

        Z[t, i, r, j] = sum over k of P[i, r, k] V[t, k, j],   Y[t, i, l] = sum over r, j of Q[l, r, j] Z[t, i, r, j]
    """

    def __init__(self, x: Tensor, A: Tensor, B: Tensor) -> None:
        self.m1, R, n1 = A.shape
        self.m2, _, n2 = B.shape
        X = x.reshape(-1, n1, n2)
        b_first, a_first = multiplications(self.m1, n1, self.m2, n2, R)
        self.b_first = b_first <= a_first
        P, Q, self.V = (B, A, X.transpose(1, 2)) if self.b_first else (A, B, X)  # V (T, p1, q1)
        (self.p2, self.R, self.p1), (self.q2, _, self.q1) = P.shape, Q.shape
        self.P, self.Q = P.reshape(self.p2 * R, self.p1), Q.reshape(self.q2, R * self.q1)
        self.large_last = self.q1 == 1 or Q.numel() >= P.numel()
        self.swapped = self.b_first == self.large_last  # is Y (T, m2, m1) or (T, m1, m2)?

    def intermediate(self) -> Tensor:
        """Z: (T, p2, R q1) if the larger factor comes last, else (T, R q1, p2)."""
        if self.large_last:
            return _left_multiply(self.P, self.V).reshape(-1, self.p2, self.R * self.q1)
        Z = F.linear(self.V.transpose(1, 2), self.P).reshape(-1, self.q1, self.p2, self.R)
        return Z.permute(0, 3, 1, 2).reshape(-1, self.R * self.q1, self.p2)

    def output(self, bias: Tensor | None) -> Tensor:
        """Y + bias, (T, m1, m2), perhaps a view of (T, m2, m1)."""
        Z, Q = self.intermediate(), self.Q
        if bias is not None:  # before the copy that the transpose below may need
            bias = bias.reshape(self.m1, self.m2)
            bias = bias.t().contiguous() if self.swapped else bias  # a strided one is slow in half precision
        if not self.large_last:
            Y = _left_multiply(Q, Z, bias)  # (T, q2, p2)
        elif Q.shape[1] == 1 and not Z.is_cpu:  # on CPUs a matrix product is the faster one, of a column too
            Y = _plus(Z * Q.t(), bias)
        else:
            Y = _plus(F.linear(Z, Q), bias)  # (T, p2, q2)
        return Y.transpose(1, 2) if self.swapped else Y

    def gradients(self, dy: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of x as (T, n1, n2), A and B, where needed, from that of the output; Z is computed again."""
        G = dy.reshape(-1, self.m1, self.m2)
        G = G.transpose(1, 2) if self.swapped else G
        needs_P, needs_Q = (needs[2], needs[1]) if self.b_first else (needs[1], needs[2])
        dV = dP = dQ = None
        if self.large_last:
            G = G.reshape(-1, self.q2)  # (T p2, q2)
            if needs_Q:
                dQ = G.t() @ self.intermediate().reshape(-1, self.R * self.q1)
            if needs_P or needs[0]:
                dZ = (G @ self.Q).reshape(-1, self.p2 * self.R, self.q1)
                dP = _sum_of_outer(dZ, self.V) if needs_P else None
                dV = _left_multiply(self.P.t(), dZ) if needs[0] else None  # (T, p1, q1)
        else:
            if needs_Q:
                dQ = _sum_of_outer(G, self.intermediate())
            if needs_P or needs[0]:
                dZ = _left_multiply(self.Q.t(), G).reshape(-1, self.R, self.q1, self.p2)
                dZ = dZ.permute(0, 2, 3, 1).reshape(-1, self.p2 * self.R)  # (T q1, p2 R)
                dP = dZ.t() @ self.V.transpose(1, 2).reshape(-1, self.p1) if needs_P else None
                dV = (dZ @ self.P).reshape(-1, self.q1, self.p1).transpose(1, 2) if needs[0] else None
        if self.b_first:
            return [None if dV is None else dV.transpose(1, 2), dQ, dP]
        return [dV, dP, dQ]


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Parts of (T, ...) that are worked on one after the other."""
    whole = tensor.device.type != "cpu" or _is_traced() or len(tensor) <= TOKENS_AT_A_TIME
    return (tensor,) if whole else tensor.split(TOKENS_AT_A_TIME)


def _linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias for x (T, n)."""
    blocks = _blocks(x)
    if len(blocks) == 1:
        return _Contraction(x, A, B).output(bias).reshape(-1, len(A) * len(B))
    y = x.new_empty(len(x), len(A), len(B))
    for x_block, y_block in zip(blocks, _blocks(y), strict=True):
        y_block.copy_(_Contraction(x_block, A, B).output(bias))
    return y.reshape(-1, len(A) * len(B))


class _Linear(torch.autograd.Function):
    """`_linear` that keeps nothing but its inputs for the gradients, as a dense layer does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, A, B, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dA: Tensor | None, dB: Tensor | None, d_bias: Tensor | None) -> Tensor:
        x, A, B = ctx.saved_tensors
        parts: list[tuple[Any, Any, Any]] = [(dx, A, B), (x, dA, B), (x, A, dB)]
        dy = torch.zeros((), dtype=x.dtype, device=x.device) if d_bias is None else d_bias
        for part in parts:
            if all(tensor is not None for tensor in part):
                dy = dy + _linear(*part, None)
        return dy

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad
        d_bias = dy.sum(0) if needs[3] else None
        if torch.is_grad_enabled() and any(needs[:3]):  # gradients of gradients are wanted: leave all to autograd
            wanted = [tensor for tensor, need in zip(inputs, needs, strict=False) if need]
            y = _Contraction(*inputs).output(None).reshape(dy.shape)
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if need else None for need in needs[:3]), d_bias
        x, A, B = inputs
        dx: list[Tensor] = []
        sums: list[Tensor | None] = [None, None]
        for x_block, dy_block in zip(_blocks(x), _blocks(dy), strict=True):
            d_block, *parts = _Contraction(x_block, A, B).gradients(dy_block, needs)
            if d_block is not None:
                dx.append(d_block.reshape(x_block.shape))
            for index, part in enumerate(parts):
                if part is not None:
                    total, part = sums[index], part.to(torch.promote_types(part.dtype, torch.float32))
                    sums[index] = part if total is None else total.add_(part)
        dA, dB = (
            None if total is None else total.to(factor.dtype).reshape(factor.shape)
            for total, factor in zip(sums, (A, B), strict=True)
        )
        return dx[0] if len(dx) == 1 else torch.cat(dx) if dx else None, dA, dB, d_bias


def contract(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """W x + bias, W = sum over r of A_r (x) B_r.

    Args:
        x: (T, n).
        A: (m1, R, n1).
        B: (m2, R, n2).
        bias: (m,) or None; all in one dtype.

    Returns:
        (T, m).
    """
    if A.shape[2] == B.shape[0] == 1:
        return F.linear(F.linear(x, B.squeeze(0)), A.squeeze(2), bias)
    if A.shape[0] == B.shape[2] == 1:
        return F.linear(F.linear(x, A.squeeze(0)), B.squeeze(2), bias)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, bias))
    compute: Any = _Linear.apply if trained and not _is_traced() else _linear
    return compute(x, A, B, bias)
