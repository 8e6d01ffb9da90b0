"""A plan meets the modules of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .factor_plan import FactorEntry, example_names, resolve_plan
from .kronecker_family import family_of
from .kronecker_layers import KroneckerEmbedding, KroneckerLinear

MOST_PARAMETERS = 10**11
"""Bound on what a plan may ask for; see `configuration_kronecker.LARGEST_SIZE`."""


def weight_shape(module: Any) -> tuple[int, int] | None:
    """Shape (m outputs, n inputs) of the weight of a module that a plan may name, dense or factored; None for others.

    An embedding counts as (vocabulary, hidden).
    """
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, (nn.Linear, KroneckerLinear)):
        return module.out_features, module.in_features
    if isinstance(module, (nn.Embedding, KroneckerEmbedding)):
        return module.num_embeddings, module.embedding_dim
    return None


def factorable_modules(base: Any) -> dict[str, tuple[int, int]]:
    """Weight shape (m, n) of every module of a base model that a plan may name, by its name.

    The pooler is among them also in a model that was built without one: both share plans and checkpoints.
    """
    shapes = {name: shape for name, module in base.named_modules() if (shape := weight_shape(module))}
    pooler = family_of(base).pooler
    if pooler is not None:
        shapes.setdefault(pooler, (base.config.hidden_size, base.config.hidden_size))
    return shapes


def matched_plan(base: Any, plan: str | Mapping[str, Any]) -> dict[str, FactorEntry]:
    """The entry of every module of a base model that a plan factors, by its name.

    Raises:
        ValueError: the plan does not fit, see `FactorPlan.match`; or asks for too much.
    """
    modules = factorable_modules(base)
    if not isinstance(plan, str) and len(plan) > len(modules):
        raise ValueError(
            f"factor_plan has {len(plan):,} entries for {len(modules):,} modules; each module may match one only"
        )
    matched = resolve_plan(plan, base.config).match(modules)
    parameters = sum(matched[name].parameters(m, n) if name in matched else m * n for name, (m, n) in modules.items())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"config asks for {parameters:,} parameters, more than {MOST_PARAMETERS:,}; check its sizes")
    return matched


def selected_modules(base: Any, only: str | Iterable[str] | None) -> set[str]:
    """Names of the modules of a base model that may be factored.

    Args:
        base: dense or factored.
        only: patterns (fnmatch) of names; "embedding" stands for the word embedding; None for all modules.

    Raises:
        ValueError: a pattern matches nothing, or there is none.
    """
    modules = factorable_modules(base)
    if only is None:
        return set(modules)
    patterns = [only] if isinstance(only, str) else list(only)
    if not patterns:
        raise ValueError("only=[] leaves no module to factor; give a pattern, or leave it out")
    found: set[str] = set()
    for pattern in patterns:
        names = [family_of(base).words] if pattern == "embedding" else [n for n in modules if fnmatchcase(n, pattern)]
        if not names:
            raise ValueError(
                f"only={pattern!r} matches no module that can be factored; write embedding, or a pattern of names "
                f"relative to the base model, for example {', '.join(example_names(pattern, modules))}"
            )
        found.update(names)
    return found
