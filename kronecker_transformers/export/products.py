"""A factored model for exporters and quantizers: every factor is the constant weight of a product of its own.

    y = (sum over r of A_r (x) B_r) x   is   Y = sum over r of A_r X B_r^T,   X (n1, n2), Y (m1, m2)

The larger factor is a linear layer with a constant weight, which every runtime keeps packed and every quantizer knows;
the smaller one stands on the left, S H. Either comes first, whichever needs fewer multiplications. The sum over r is
inside one of the two products, so no node reshapes or transposes a weight. Activations are reshaped, which costs
nothing, and transposed only where A is the larger factor: once before and once after, and not where an axis has length
1. A low-rank product is two linear layers, without a single reshape.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from ..models.kronecker_layers import FrequentWords, KroneckerEmbedding, KroneckerLinear


def as_products(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, factored or dense, for inference alone: its outputs, from products with constant weights.

    Args:
        model: of the classes of this package, or of their stock classes; it is not changed.

    Returns:
        A model in evaluation mode without gradients. It cannot be saved: its modules have other parameters.
    """
    result = copy.deepcopy(model).eval().requires_grad_(False)
    embeddings = {m.A: product_embedding(m) for m in result.modules() if isinstance(m, KroneckerEmbedding)}
    for name, module in list(result.named_modules()):
        if isinstance(module, KroneckerEmbedding):
            result.set_submodule(name, embeddings[module.A])
        elif isinstance(module, KroneckerLinear):
            tied = embeddings.get(module.A)
            result.set_submodule(name, product_linear(module) if tied is None else TiedHead(tied, module.bias))
        elif isinstance(module, Conv1D):
            result.set_submodule(name, linear_of(module.weight.t(), module.bias))
        elif isinstance(module, NewGELUActivation):  # written out, it would be nine nodes of a graph
            result.set_submodule(name, nn.GELU(approximate="tanh"))
    return result


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with this weight (m, n) and bias (m,)."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def product_linear(layer: KroneckerLinear) -> nn.Module:
    """The products of one layer."""
    A, B = layer.A.detach(), layer.B.detach()  # (m1, R, n1), (m2, R, n2)
    if layer.n1 == layer.m2 == 1:  # low rank
        return nn.Sequential(linear_of(B[0]), linear_of(A[:, :, 0], layer.bias))
    if layer.m1 == layer.n2 == 1:
        return nn.Sequential(linear_of(A[0]), linear_of(B[:, :, 0], layer.bias))
    return KroneckerProducts(A, B, layer.bias)


class KroneckerProducts(nn.Module):
    """y = (sum over r of A_r (x) B_r) x + bias by two products, the smaller factor on the left.

    Args:
        A: (m1, R, n1).
        B: (m2, R, n2).
        bias: (m1 m2,) or None.
    """

    small: Tensor
    bias: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.turned = A.numel() > B.numel()  # then Y^T = sum of B_r X^T A_r^T
        small, large = (B, A) if self.turned else (A, B)
        (s_out, R, s_in), (l_out, _, l_in) = small.shape, large.shape
        self.inputs = (A.shape[2], B.shape[2])
        # large first: (s_in l_in R l_out) + (s_out s_in R l_out); small first: the other way round
        self.large_first = s_in * R * l_out * (l_in + s_out) <= s_out * R * l_in * (s_in + l_out)
        if self.large_first:
            self.large = linear_of(large.permute(1, 0, 2).reshape(R * l_out, l_in))
            left = small.permute(0, 2, 1).reshape(s_out, s_in * R)
            self.middle = (s_in * R, l_out)
        else:
            left = small.reshape(s_out * R, s_in)
            self.large = linear_of(large.reshape(l_out, R * l_in))
            self.middle = (s_out, R * l_in)
        self.register_buffer("small", left.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        X = x.unflatten(-1, self.inputs)  # (..., n1, n2)
        if self.turned:
            X = _turned(X)
        if self.large_first:
            H = self.large(X).reshape(*X.shape[:-2], *self.middle)
            if self.small.shape[1] > 1:
                Y = self.small @ H
            elif self.turned:  # an outer product, of which either factor can have the rows
                return self._with_bias(_turned(H) * self.small.t())
            else:
                Y = self.small * H
        else:
            Y = self.large((self.small @ X).reshape(*X.shape[:-2], *self.middle))
        return self._with_bias(_turned(Y) if self.turned else Y)

    def _with_bias(self, Y: Tensor) -> Tensor:
        y = Y.flatten(-2)
        return y if self.bias is None else y + self.bias


def _turned(X: Tensor) -> Tensor:
    """The transpose of (..., a, b); a reshape where one of the two is 1."""
    a, b = X.shape[-2:]
    return X.reshape(*X.shape[:-2], b, a) if 1 in (a, b) else X.transpose(-1, -2)


def product_embedding(layer: KroneckerEmbedding) -> ProductEmbedding:
    """The products of one embedding."""
    return ProductEmbedding(layer.A.detach(), layer.B.detach(), layer.frequent)


class ProductEmbedding(nn.Module):
    """Row i of W = sum over r of A_r (x) B_r: the sum over r of A_r[i // m2]^T B_r[i % m2].

    Args:
        A: (m1, R, n1).
        B: (m2, R, n2).
        frequent: words that have a product of their own beside it.
    """

    B: Tensor
    place: Tensor

    def __init__(self, A: Tensor, B: Tensor, frequent: FrequentWords | None = None) -> None:
        super().__init__()
        self.own: ProductEmbedding | None = None
        if frequent is not None:  # a table of them, with a row of zeros for all others
            self.own = ProductEmbedding(nn.functional.pad(frequent.A.detach(), (0, 0, 0, 0, 0, 1)), frequent.B.detach())
            place = torch.full((len(A) * len(B),), frequent.m1, dtype=torch.int32, device=A.device)
            place[frequent.words.long()] = torch.arange(frequent.m1, dtype=torch.int32, device=A.device)
            self.register_buffer("place", place)
        m1, self.terms, self.n1 = A.shape
        self.m2, _, self.n2 = B.shape
        self.rows = nn.Embedding(m1, self.n1 * self.terms, device="meta")
        self.rows.weight = nn.Parameter(A.transpose(1, 2).reshape(m1, -1).contiguous(), requires_grad=False)
        self.register_buffer("B", B.contiguous())
        if self.m2 == 1 and self.terms > 1:
            self.mix = linear_of(B[0].t())  # (n2, R)
        if self.own is not None and self.n1 == self.m2 == 1:
            self.both = linear_of(torch.cat([B[0], self.own.B[0]]).t())

    def forward(self, indices: Tensor) -> Tensor:
        """Map integers (...) to rows (..., n)."""
        if self.own is None:
            return self._shared(indices)
        places = self.place.index_select(0, indices.flatten()).reshape(indices.shape)
        if self.n1 == self.m2 == 1:  # one product for both
            both: Tensor = self.both(torch.cat([self.rows(indices), self.own.rows(places)], -1))
            return both
        return self._shared(indices) + self.own(places)

    def _shared(self, indices: Tensor) -> Tensor:
        outer = indices if self.m2 == 1 else indices.div(self.m2, rounding_mode="floor")
        a = self.rows(outer)
        if self.m2 > 1:
            b = nn.functional.embedding(indices % self.m2, self.B.flatten(1)).unflatten(-1, self.B.shape[1:])
            return (a.unflatten(-1, (self.n1, self.terms)) @ b).flatten(-2)  # (..., n1, R) (..., R, n2)
        if self.n1 > 1:
            a = a.unflatten(-1, (self.n1, self.terms))
        rows = self.mix(a) if self.terms > 1 else a * self.B[0]  # (..., n1, n2), or (..., n)
        return rows.flatten(-2) if self.n1 > 1 else rows


class TiedHead(nn.Module):
    """The logits of h, W h + bias, with the rows of an embedding as the weight of the last product.

    With H (n1, n2), the logit of word i1 m2 + i2 is the sum over r of A_r[i1] H B_r[i2]^T.

    Args:
        embedding: whose W it is; its parameters are shared.
        bias: (m,) or None.
    """

    def __init__(self, embedding: ProductEmbedding, bias: Tensor | None) -> None:
        super().__init__()
        e = embedding
        self.inputs, self.m2 = (e.n1, e.n2), e.m2
        self.inner = linear_of(e.B.reshape(e.m2 * e.terms, e.n2))
        self.outer = nn.Linear(e.n1 * e.terms, len(e.rows.weight), bias=False, device="meta")
        self.outer.weight = e.rows.weight
        self.own = None if e.own is None else TiedHead(e.own, None)
        self.register_buffer("place", e.place if e.own is not None else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map h (..., n) to logits (..., m)."""
        n1, n2 = self.inputs
        Z = self.inner(h if n1 == 1 else h.unflatten(-1, (n1, n2)))  # (..., n1, m2 R)
        if self.m2 > 1:
            Z = Z.reshape(*h.shape[:-1], n1, self.m2, -1).transpose(-3, -2)  # (..., m2, n1, R)
            y = _turned(self.outer(Z.flatten(-2))).flatten(-2)  # (..., m1, m2)
        else:
            y = self.outer(Z if n1 == 1 else Z.flatten(-2))
        if self.own is not None:
            y = y + self.own(h).index_select(-1, self.place)
        return y if self.bias is None else y + self.bias
