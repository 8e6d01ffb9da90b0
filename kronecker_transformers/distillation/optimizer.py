"""How factors learn: at rates of their own, and by steps that move all their directions alike (Muon).

Rates: a step moves the product as far as it would move a dense weight.

Adam moves every entry by about the learning rate, whatever its size. The factors of W = sum over r of A_r (x) B_r have
entries of very different sizes: of a 384 x 384 weight at 7.7x those of the large factor are several times smaller than
those of W, those of the small one a hundred times larger. So one learning rate makes a step of several per cent in one
factor and none to speak of in the other, and which rate is best depends on the plan.

The rule: a factor X of W learns at

    rate of X = learning rate * rms(X) / rms(W),

rms the root mean square of the entries at the start. A step of A alone, or of B alone, then changes W by the same root
mean square as a step of a dense W, the learning rate itself; so the same learning rate suits a dense model and every
plan (benchmarks/learning_rates.py shows it). That is for one term; with several, whose singular values s differ, it is
(sum s) / sqrt(R sum s^2) times the learning rate, which is at most 1. The rule depends on W only, not on how its scale
is split between A and B, so the factors need no balancing: A c and B / c train to the same products, as long as the
norm of the gradient, which depends on c, is not clipped. Weight decay is divided by the same ratio, and halved as both
factors decay: W shrinks as a dense weight would. The rule is for Adam and other optimizers whose steps do not depend on
the scale of the gradient.

Qiu et al., "Compute Better Spent" (ICML 2024), argue for structure-aware learning rates from the fan-in of each factor;
those assume factors at their initial scale for training from scratch, where here they come from a trained weight.

Muon (Jordan et al., 2024) takes, in place of the gradient's running mean M = U S V^T, its orthogonal factor U V^T: a
direction that seldom has a gradient moves as far as one that always has. Factors of low rank have few columns, and each
must do something of its own. Steps have the root mean square of Adam's (0.2; Liu et al., "Muon is scalable for LLM
training", 2025). The best learning rate is another one all the same (benchmarks/learning_rates.py compares).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models.kronecker_layers import FrequentWords, KroneckerEmbedding, KroneckerLinear


@torch.no_grad()
def product_rms(A: Tensor, B: Tensor) -> float:
    """Root mean square of the entries of W = sum over r of A_r (x) B_r, without forming W.

    <A_r (x) B_r, A_s (x) B_s> = <A_r, A_s> <B_r, B_s>.

    Args:
        A: (m1, R, n1).
        B: (m2, R, n2).
    """
    gram_a, gram_b = (torch.einsum("irj,isj->rs", X, X) for X in (A.double(), B.double()))
    entries = A.shape[0] * A.shape[2] * B.shape[0] * B.shape[2]
    return float((gram_a * gram_b).sum().clamp(min=0) / entries) ** 0.5


@torch.no_grad()
def learning_rate_scales(model: nn.Module) -> dict[nn.Parameter, float]:
    """rms(X) / rms(W) for every factor X of the model; 1 where W is 0."""
    scales: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding, FrequentWords)):
            whole = {factor: gathered(factor) for factor in (module.A, module.B)}
            rms = product_rms(*whole.values())
            for factor, values in whole.items():
                scales[factor] = float(values.double().square().mean()) ** 0.5 / rms if rms else 1.0
    return scales


def scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give every factor that `optimizer` trains a group of its own, with its own learning rate and weight decay.

    All other parameters stay in their groups. The order of the groups depends on the model only, so that the state of
    an optimizer can be restored.
    """
    scales = learning_rate_scales(model)
    for group in list(optimizer.param_groups):
        options: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
        factors = [p for p in group["params"] if p in scales]
        group["params"] = [p for p in group["params"] if p not in scales]
        for factor in factors:
            own = {"lr": group["lr"] * scales[factor]}
            if group.get("weight_decay"):
                own["weight_decay"] = group["weight_decay"] / (2 * scales[factor])
            optimizer.add_param_group({**options, **own, "params": [factor]})


FACTORED_RATE, DENSE_RATE, HIDDEN_SIZE = 1e-3, 3e-4, 384
"""Learning rates of a factored and of a dense student of this hidden size, or of a smaller one."""


def rate_for_size(rate: float, hidden_size: int) -> float:
    """A learning rate that was found at hidden size 384, for another: above, it falls with the square of the size."""
    return rate * min(1.0, (HIDDEN_SIZE / hidden_size) ** 2)


MOMENTUM = 0.95
STEP_RMS = 0.2
"""Root mean square of the entries of a step at learning rate 1, as Adam's."""
_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_PADDED = 16
"""Sizes that are padded to the same multiple of it are worked on together; of 8 to 64 the fastest on a CPU."""
_UNFOLDINGS = (((0, 1, 2), 1), ((0, 1, 2), 2), ((1, 0, 2), 1))
"""Of a factor (m1, R, n1), as an order of its axes and how many of them are for rows."""


def muon_factors(model: nn.Module) -> set[nn.Parameter]:
    """What Muon is for: the factors of linear layers, but not of a head that is tied to an embedding."""
    layers = [module for module in model.modules() if isinstance(module, KroneckerLinear) and not module.tied]
    return {X for layer in layers for X in (layer.A, layer.B)}


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the factors of linear layers. Those of embeddings, and of heads tied to them, are AdamW's.

    Args:
        groups: of parameters, as for AdamW; a factor (m1, R, n1) of a linear layer has a group of its own, as
            `scale_learning_rates` gives it.
        model: whose parameters they are.
        **options: as for AdamW, but for `fused`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], model: nn.Module, **options: Any) -> None:
        factors = muon_factors(model)
        super().__init__(
            [{**group, "fused": None, "muon": not factors.isdisjoint(group["params"])} for group in groups], **options
        )

    def step(self, closure: Any = None) -> Any:
        """One step of all parameters that have a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._step_factors()
        return loss

    @torch.no_grad()
    def _step_factors(self) -> None:
        items: list[tuple[nn.Parameter, float]] = []
        directions: list[Tensor] = []
        for group in self.param_groups:
            for X in group["params"] if group["muon"] else ():
                if X.grad is None:
                    continue
                state = self.state[X]
                if not state:
                    state |= {
                        "step": torch.tensor(0.0),
                        "momentum": torch.zeros_like(X),
                    }  # AdamW loads none without step
                state["step"] += 1
                state["momentum"].lerp_(X.grad, 1 - MOMENTUM)
                X.mul_(1 - group["lr"] * group["weight_decay"])
                items.append((X, group["lr"]))
                directions.append(gathered(X.grad.lerp(state["momentum"], MOMENTUM)))  # as Nesterov's
        unfoldings = [max(_UNFOLDINGS, key=lambda unfolding: min(_sides(X.shape, *unfolding))) for X, _ in items]
        steps = orthogonalized(
            [
                direction.permute(order).reshape(_sides(direction.shape, order, rows))
                for direction, (order, rows) in zip(directions, unfoldings, strict=True)
            ]
        )
        for (X, rate), (order, _), step in zip(items, unfoldings, steps, strict=True):
            folded = step.reshape([X.shape[axis] for axis in order]).permute(order)  # each order is its own inverse
            X.sub_(divided_like(X, folded), alpha=rate * STEP_RMS * max(step.shape) ** 0.5)


def gathered(X: Tensor) -> Tensor:
    """All of a parameter or gradient, of which each process may hold a part (FSDP2)."""
    return X.full_tensor() if isinstance(X, DTensor) else X


def divided_like(X: Tensor, values: Tensor) -> Tensor:
    """Values that all processes have, divided between them as X is."""
    if not isinstance(X, DTensor):
        return values
    return distribute_tensor(values.contiguous(), X.device_mesh, X.placements, src_data_rank=None)


def _sides(shape: torch.Size, order: tuple[int, ...], rows: int) -> tuple[int, int]:
    """Sizes of the matrix."""
    sizes = [shape[axis] for axis in order]
    return math.prod(sizes[:rows]), math.prod(sizes[rows:])


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """About U V^T of each matrix X = U S V^T, with singular values near 1: five steps of Newton and Schulz.

    A step takes X to P(G) X with G = X X^T, where P is a polynomial. So all five are made of G alone, which is small,
    as X has few rows or few columns; matrices of nearly one size together, padded with zeros.

    Args:
        matrices: (p, q) each, of any sizes.
    """
    whole = [X.to(torch.promote_types(X.dtype, torch.float32)) for X in matrices]
    wide = [X.mT if X.shape[0] > X.shape[1] else X for X in whole]
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, X in enumerate(wide):
        alike[math.ceil(len(X) / _PADDED) * _PADDED, X.device, X.dtype].append(place)
    found = list(whole)
    for (size, *_), places in alike.items():
        polynomials = _newton_schulz(torch.stack([_padded(wide[place] @ wide[place].mT, size) for place in places]))
        for place, polynomial in zip(places, polynomials, strict=True):
            X = wide[place]
            result = polynomial[: len(X), : len(X)] @ X
            found[place] = result if X is whole[place] else result.mT
    return found


def _padded(X: Tensor, size: int) -> Tensor:
    return nn.functional.pad(X, (0, size - len(X)) * 2)


def _newton_schulz(gram: Tensor) -> Tensor:
    """The matrices that take X to the result, for X X^T (batch, p, p)."""
    a, b, c = _NEWTON_SCHULZ
    squared = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    gram, product = gram / squared, torch.eye(gram.shape[1]).to(gram) / squared.sqrt()
    for _ in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product  # all of these are polynomials of one matrix, in any order
        gram = factor @ gram @ factor
    return product
