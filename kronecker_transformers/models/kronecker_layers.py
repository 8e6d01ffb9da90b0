"""Linear, embedding and output layers whose weight is a sum of Kronecker products.

    W = sum over r of A_r (x) B_r,   W (m, n),   A_r (m1, n1),   B_r (m2, n2),   m = m1 m2,   n = n1 n2

Block (i, j) of A (x) B is A[i, j] * B, so row i1 * m2 + i2 and column j1 * n2 + j2 of W hold
sum over r of A_r[i1, j1] B_r[i2, j2]. With x reshaped to X (n1, n2),

    (A (x) B) x = vec(A X B^T)

(KroneckerBERT, Tahaei et al., NAACL 2022, section 3; KnGPT2, Edalati et al., ACL 2022, section 2).
W itself is never formed, neither forward nor backward.

Layout. The factors are parameters `A` of shape (m1, R, n1) and `B` of shape (m2, R, n2), in memory and
on disk; A_r is `A[:, r, :]`. So A is, without a copy, the matrix (m1, R n1) that consumes all terms and
the matrix (m1 R, n1) that produces them, and likewise B; and an embedding with m2 = 1 has one
contiguous row of A for each word.

Frequent words. A text is mostly made of few words, so an embedding may give these a product of low rank of
their own, beside the sum that all words share: W = sum over r of A_r (x) B_r + P U V, U (k, q), V (q, n),
where P (m, k) puts row j of U V into the row of frequent word j.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .kronecker_contraction import contract
from .kronecker_nearest import nearest_kronecker


def kronecker_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute y = W x + bias, W = sum over r of A_r (x) B_r.

    Args:
        x: (..., n), any leading dimensions, also empty.
        A: (m1, R, n1).
        B: (m2, R, n2).
        bias: (m,) or None.

    Returns:
        (..., m), in the dtype of x (under autocast, in the autocast dtype, as for a dense layer).
    """
    n1, n2 = A.shape[2], B.shape[2]
    if x.shape[-1] != n1 * n2:
        raise ValueError(
            f"input has {x.shape[-1]} features, not n1 n2 = {n1} * {n2} = {n1 * n2}; check its last dimension"
        )
    y = contract(*_autocast(x.reshape(-1, n1 * n2), A, B, bias))
    return y.reshape(*x.shape[:-1], y.shape[1])


def _autocast(x: Tensor, *others: Any) -> list[Any]:
    """All in the dtype that autocast asks of a matrix product."""
    kind = x.device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return [x, *others]
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others)]


def _has_autocast(kind: str) -> bool:
    """Whether this kind of device has autocast; the compiler of older versions breaks its graph at the question."""
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)


def kronecker_embedding(indices: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Rows of W = sum over r of A_r (x) B_r, from the rows of the factors.

    Row i of W is sum over r of A_r[i // m2] (x) B_r[i % m2]; with m2 = 1 every word has its own row of A
    (KroneckerBERT, section 3.3).

    Args:
        indices: integers (...), each in [0, m1 m2).
        A: (m1, R, n1).
        B: (m2, R, n2).

    Returns:
        (..., n1 n2), in the dtype of the factors.
    """
    _, R, n1 = A.shape
    m2, _, n2 = B.shape
    outer = indices if m2 == 1 else indices.div(m2, rounding_mode="floor")
    a = _rows(outer, A)  # (..., R, n1)
    b = B.reshape(R, n2) if m2 == 1 else _rows(indices % m2, B)  # (..., R, n2)
    # under autocast too, a look-up keeps the dtype of its table
    kind = a.device.type
    exact = torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext()
    with exact:
        rows = a.transpose(-1, -2) * b if R == 1 else a.transpose(-1, -2) @ b  # (..., n1, n2)
    return rows.reshape(*indices.shape, n1 * n2)


def farthest_rows(rest: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Indices, ascending, of the rows with the largest (weighted) squared norms: what is left of them counts most.

    Args:
        rest: (m, n), what a sum of products leaves of a weight.
        count: how many.
        weights: of the rows (m,); default: all the same.
    """
    lost = rest.double().square().sum(1)
    lost = lost if weights is None else lost * weights
    return lost.topk(count).indices.sort().values


def _rows(indices: Tensor, factor: Tensor) -> Tensor:
    """Rows (..., R, k) of a factor (rows, R, k)."""
    return F.embedding(indices, factor.flatten(1)).reshape(*indices.shape, *factor.shape[1:])


class _KroneckerLayer(nn.Module):
    """Holds the factors of an (m, n) weight."""

    def __init__(self, m: int, n: int, m1: int, n1: int, terms: int, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, value in (("out", m), ("in", n), ("m1", m1), ("n1", n1), ("terms", terms)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} in {type(self).__name__} must be an integer; give a whole number")
        for name, value, size in (("m1", m1, m), ("n1", n1, n)):
            if value < 1 or size < 1 or size % value:
                raise ValueError(
                    f"{name}={value} in {type(self).__name__} must be a positive divisor of {size}; choose one"
                )
        if terms < 1:
            raise ValueError(f"terms={terms} must be >= 1 in {type(self).__name__}; use terms=1 for a single product")
        # kept as integers: a parameter that is partitioned (ZeRO-3) or offloaded does not show its shape
        self.m1, self.n1, self.m2, self.n2, self.terms = m1, n1, m // m1, n // n1, terms
        self.A = nn.Parameter(torch.empty(m1, terms, n1, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(self.m2, terms, self.n2, device=device, dtype=dtype))

    def init_factors(self, std: float) -> None:
        """Draw A and B so that the entries of W have mean 0 and standard deviation `std`.

        An entry is a sum of R products of independent entries, so both factors get (std / sqrt(R)) ** 0.5. Each A_r and
        B_r is scaled to this root mean square: a small one has too few entries to come near it by chance. Parameters
        that were loaded from a checkpoint are left alone.
        """
        # on the meta device weights are about to be loaded, and drawing would take most of the time; factors that are
        # partitioned (ZeRO-3) were drawn when they were made
        if self.A.is_meta or self.A.numel() != self.m1 * self.terms * self.n1:
            return
        target = math.sqrt(std / math.sqrt(self.terms))
        for factor in (self.A, self.B):
            values = torch.randn_like(factor, dtype=torch.float32)
            init.copy_(factor, values * (target / values.square().mean((0, 2), keepdim=True).sqrt()))

    def shared_product(self) -> Tensor:
        """The sum over r of A_r (x) B_r, (m, n)."""
        product = torch.einsum("irj,krl->ikjl", self.A, self.B)
        return product.reshape(self.m1 * self.m2, self.n1 * self.n2)

    def to_dense(self) -> Tensor:
        """The weight W (m, n), with what frequent words have, for tests and export."""
        product, own = self.shared_product(), self._own
        return product if own is None else product.index_add(0, own.words, own.shared_product())

    @property
    def _own(self) -> FrequentWords | None:
        """What frequent words have beside the sum."""
        return None

    @property
    def entry(self) -> tuple[int, ...]:
        """What a factor plan has for this layer: m1, n1, terms, and of an embedding its frequent words' numbers."""
        return self.m1, self.n1, self.terms, 0, 0

    def _factors_repr(self) -> str:
        return f"A=({self.m1}, {self.n1}), B=({self.m2}, {self.n2}), terms={self.terms}"

    def _set_nearest(self, weight: Tensor, dense: Any) -> None:
        """Set the factors to the nearest products of `weight` (m, n), that of `dense`; keep what `dense` trains."""
        result = nearest_kronecker(weight, self.m1, self.n1, self.terms)
        with torch.no_grad():
            self.A.copy_(result.A)
            self.B.copy_(result.B)
        trained = dense.weight.requires_grad  # of the weight itself: under no_grad its transpose requires none
        self.A.requires_grad_(trained)
        self.B.requires_grad_(trained)
        self.train(dense.training)


class KroneckerLinear(_KroneckerLayer):
    """y = (sum over r of A_r (x) B_r) x + bias; takes the place of `nn.Linear` and of GPT-2's `Conv1D`.

    Args:
        in_features: n, size of the last dimension of the input.
        out_features: m, size of the last dimension of the output.
        m1, n1: shape of A_r; B_r is (m / m1, n / n1). (m1, n1) = (m, 1) is the low-rank product of rank `terms`.
        terms: number R of products in the sum.
        bias: learn an additive bias (m,).

    Raises:
        TypeError: a size is not an integer.
        ValueError: m1 or n1 does not divide, or terms < 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        m1: int,
        n1: int,
        terms: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, m1, n1, terms, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.tied: tuple[KroneckerEmbedding] | None = None  # in a tuple, it is not a module of this one
        self.init_factors(std=1 / math.sqrt(3 * in_features))  # as nn.Linear initialises itself

    def init_factors(self, std: float) -> None:
        """As in the base class, but for the embedding's factors in a tied head; the bias becomes 0."""
        if self.tied is None:
            super().init_factors(std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., n) to (..., m)."""
        y = kronecker_linear(x, self.A, self.B, self.bias)
        own = self._own
        return y if own is None else own(x, y)

    @property
    def _own(self) -> FrequentWords | None:
        return None if self.tied is None else self.tied[0].frequent

    @classmethod
    def from_linear(cls, linear: nn.Linear, m1: int, n1: int, terms: int = 1) -> KroneckerLinear:
        """The nearest factored layer, in the Frobenius norm of the weight (m, n); all else of the layer comes along.

        Raises:
            TypeError: not an nn.Linear, or a size that is not an integer.
            ValueError: m1 or n1 does not divide, terms is not in 1 .. min(m1 n1, m2 n2), or the weight is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"layer of type {type(linear).__name__} must be an nn.Linear; for a Conv1D use from_conv1d")
        return cls._from_dense(linear, linear.weight, m1, n1, terms)

    @classmethod
    def from_conv1d(cls, conv: Conv1D, m1: int, n1: int, terms: int = 1) -> KroneckerLinear:
        """As `from_linear`, for GPT-2's Conv1D, which stores its weight as (n, m); m1 divides the outputs m.

        Raises:
            TypeError, ValueError: as `from_linear`.
        """
        if not isinstance(conv, Conv1D):
            raise TypeError(f"layer of type {type(conv).__name__} must be a Conv1D; for an nn.Linear use from_linear")
        return cls._from_dense(conv, conv.weight.t(), m1, n1, terms)

    @classmethod
    def _from_dense(cls, dense: nn.Linear | Conv1D, weight: Tensor, m1: int, n1: int, terms: int) -> KroneckerLinear:
        m, n = weight.shape
        layer = cls(n, m, m1, n1, terms, bias=dense.bias is not None, device=weight.device, dtype=weight.dtype)
        layer._set_nearest(weight, dense)
        if dense.bias is not None:
            layer.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=dense.bias.requires_grad)
        return layer

    @classmethod
    def tied_to(cls, embedding: KroneckerEmbedding) -> KroneckerLinear:
        """The output head of a language model: its factors are the embedding's own parameters.

        The logits of h are the sum over r of A_r H B_r^T with H = h reshaped to (n1, n2): times B, then times A, never
        the (vocabulary, hidden) matrix.
        """
        sizes = embedding.embedding_dim, embedding.num_embeddings, embedding.m1, embedding.n1, embedding.terms
        head = cls(*sizes, bias=False)
        head.A, head.B, head.tied = embedding.A, embedding.B, (embedding,)
        return head

    def extra_repr(self) -> str:
        """The sizes of the layer and of its factors."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._factors_repr()}, bias={self.bias is not None}"


class FrequentWords(_KroneckerLayer):
    """What the frequent words of an embedding have beside the sum that all words share: a product of low rank.

    Row j of A (k, R, 1) belongs to word `words[j]`, the other factor is B (1, R, n).

    Args:
        num_words: k, how many there are.
        embedding_dim: n.
        terms: rank R of the product.
    """

    words: Tensor
    """Their indices, ascending, (k,) int32."""

    def __init__(
        self, num_words: int, embedding_dim: int, terms: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_words, embedding_dim, num_words, 1, terms, device, dtype)
        self.register_buffer("words", torch.empty(num_words, dtype=torch.int32, device=device))
        self.init_factors(std=1.0)

    def init_factors(self, std: float) -> None:
        """As in the base class; the words are the first ones."""
        super().init_factors(std)
        if not self.words.is_meta:
            init.copy_(self.words, torch.arange(self.m1, dtype=torch.int32))

    def forward(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """Map integers x (...) to rows (..., n), 0 for other words; or add those of x (..., n) to logits (..., m).

        One method for both: accelerate and others bring the weights of a module when it is called.
        """
        if logits is not None:
            return logits.index_add(-1, self.words, kronecker_linear(x, self.A, self.B).to(logits.dtype))
        words = self.words.to(x.dtype)
        place = torch.searchsorted(words, x.contiguous()).clamp(max=self.m1 - 1)
        return kronecker_embedding(place, self.A, self.B) * (words[place] == x).unsqueeze(-1)

    def extra_repr(self) -> str:
        """The sizes of the factors."""
        return f"num_words={self.m1}, {self._factors_repr()}"


class KroneckerEmbedding(_KroneckerLayer):
    """Row i of W = sum over r of A_r (x) B_r for each index i; takes the place of `nn.Embedding`.

    With m1 = num_embeddings every word keeps its own row of A and B is shared: a look-up and a product of
    embedding_dim multiplications for each term.

    Args:
        num_embeddings: m, number of words.
        embedding_dim: n, size of a row.
        m1, n1: shape of A_r; B_r is (m / m1, n / n1).
        terms: number R of products in the sum.
        padding_idx: the output at this index gives no gradient; a row of its own (m2 = 1) starts at 0.
        frequent, frequent_terms: how many words have a product of their own beside the sum, and its rank.

    Raises:
        TypeError: a size is not an integer.
        ValueError: m1 or n1 does not divide, terms < 1, padding_idx is not an index, or frequent and frequent_terms are
            not both given, or too large.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        m1: int,
        n1: int,
        terms: int = 1,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        frequent: int = 0,
        frequent_terms: int = 0,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, m1, n1, terms, device, dtype)
        if not 0 <= frequent <= num_embeddings or (frequent == 0) != (frequent_terms == 0):
            raise ValueError(
                f"frequent={frequent} must be from 0 to {num_embeddings}, the number of embeddings, and frequent_terms="
                f"{frequent_terms} its rank; give both, or none"
            )
        own = frequent, embedding_dim, frequent_terms, device, dtype
        self.frequent = FrequentWords(*own) if frequent else None
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx={padding_idx} must be an index into {num_embeddings} embeddings; use None for no padding"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.init_factors(std=1.0)  # as nn.Embedding initialises itself

    def init_factors(self, std: float) -> None:
        """As in the base class; the row of the padding word becomes 0 where it has one of its own."""
        super().init_factors(std)
        # A slice does not carry the mark that protects loaded parameters, so look for it on the parameter.
        kept = getattr(self.A, "_is_hf_initialized", False) or self.A.shape[0] != self.m1  # loaded, or partitioned
        if self.padding_idx is not None and self.m2 == 1 and not kept:
            init.zeros_(self.A[self.padding_idx])
            if self.frequent is not None and not self.frequent.A.is_meta:
                for place in (self.frequent.words == self.padding_idx).nonzero().flatten().tolist():
                    init.zeros_(self.frequent.A[place])

    @property
    def _own(self) -> FrequentWords | None:
        return self.frequent

    @property
    def entry(self) -> tuple[int, ...]:
        """As in the base class."""
        own = (0, 0) if self.frequent is None else (self.frequent.m1, self.frequent.terms)
        return self.m1, self.n1, self.terms, *own

    def forward(self, indices: Tensor) -> Tensor:
        """Map integers (...) to rows (..., embedding_dim)."""
        rows = kronecker_embedding(indices, self.A, self.B)
        if self.frequent is not None:
            rows = rows + self.frequent(indices)
        # a traced graph is the same in every gradient mode; one for ONNX has no gradients
        traced = torch.jit.is_tracing()
        trained = not torch.onnx.is_in_onnx_export() if traced else torch.is_grad_enabled()
        if self.padding_idx is not None and trained:
            rows = torch.where((indices == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, m1: int, n1: int, terms: int = 1, frequent: int = 0, frequent_terms: int = 0
    ) -> KroneckerEmbedding:
        """The nearest factored embedding, in the Frobenius norm; all else of the layer comes along.

        A weight does not say how often words occur, so for frequent ones those are taken that the sum misses most.

        Raises:
            ValueError: the embedding uses max_norm, scale_grad_by_freq or sparse gradients.
        """
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if value := getattr(embedding, name):
                raise ValueError(
                    f"{name}={value!r} is not supported by {cls.__name__}; switch it off on the embedding first"
                )
        m, n = embedding.weight.shape
        layer = cls(
            m, n, m1, n1, terms, embedding.padding_idx, embedding.weight.device, embedding.weight.dtype,
            frequent=frequent, frequent_terms=frequent_terms,
        )  # fmt: skip
        layer._set_nearest(embedding.weight, embedding)
        if (frequent_words := layer.frequent) is not None:
            rest = embedding.weight.detach() - layer.shared_product()
            frequent_words.words.copy_(words := farthest_rows(rest, frequent))
            frequent_words._set_nearest(rest[words], embedding)
        return layer

    def extra_repr(self) -> str:
        """The sizes of the layer and of its factors."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        sizes = f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"
        return f"{sizes}, {self._factors_repr()}{padding}"
