"""Learning rates for factors: as large a step of the product as a dense weight would make."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.kronecker_layers import KroneckerEmbedding, KroneckerLinear


@torch.no_grad()
def product_rms(A: Tensor, B: Tensor) -> Tensor:
    """Root mean square of the entries of W = sum over r of A_r (x) B_r, without forming W.

    <A_r (x) B_r, A_s (x) B_s> = <A_r, A_s> <B_r, B_s>.

    Args:
        A: (m1, R, n1).
        B: (m2, R, n2).

    Returns:
        A scalar.
    """
    grams = [torch.einsum("irj,isj->rs", X, X) for X in (A.double(), B.double())]
    entries = A.shape[0] * A.shape[2] * B.shape[0] * B.shape[2]
    return ((grams[0] * grams[1]).sum() / entries).clamp(min=0).sqrt()


@torch.no_grad()
def learning_rate_scales(model: nn.Module) -> dict[nn.Parameter, float]:
    """Scale of the learning rate of every factor."""
    scales: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            rms = float(product_rms(module.A, module.B))
            for factor in (module.A, module.B):
                scales[factor] = float(factor.double().square().mean().sqrt()) / rms
    return scales


def scale_learning_rates(optimizer: torch.optim.Optimizer, scales: dict[nn.Parameter, float]) -> None:
    """Give every factor a group of its own, with its own learning rate; the order depends on the model only."""
    for group in list(optimizer.param_groups):
        factors = [p for p in group["params"] if p in scales]
        group["params"] = [p for p in group["params"] if p not in scales]
        options = {key: value for key, value in group.items() if key != "params"}
        for factor in factors:
            scale = scales[factor]
            optimizer.add_param_group({**options, "params": [factor], "lr": group["lr"] * scale})
