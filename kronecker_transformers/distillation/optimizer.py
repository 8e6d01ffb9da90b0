"""Learning rates for factors: a step moves the product as far as it would move a dense weight.

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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.kronecker_layers import KroneckerEmbedding, KroneckerLinear


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
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            rms = product_rms(module.A, module.B)
            for factor in (module.A, module.B):
                scales[factor] = float(factor.double().square().mean()) ** 0.5 / rms if rms else 1.0
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
