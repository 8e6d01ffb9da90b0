"""BERT, GPT-2 and their kin, smaller and faster: embedding and linear layers become Kronecker products.

Importing this package registers its models with the Auto classes of transformers; all else is loaded when it is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .models import *  # noqa: F403  (every model class, named in models.__all__)
from .models import __all__ as _model_names

if TYPE_CHECKING:
    from .compression.compress import CompressionResult, compress
    from .compression.search import PlanSearch, search_plan
    from .evaluation.cost import Report, describe
    from .experiments.distill import Distilled, distill
    from .export.dense import to_dense
    from .models.kronecker_nearest import KroneckerFactors, nearest_kronecker

__version__ = version("kronecker-transformers")

_PLACES = {
    "CompressionResult": "compression.compress",
    "Distilled": "experiments.distill",
    "KroneckerFactors": "models.kronecker_nearest",
    "PlanSearch": "compression.search",
    "Report": "evaluation.cost",
    "compress": "compression.compress",
    "describe": "evaluation.cost",
    "distill": "experiments.distill",
    "nearest_kronecker": "models.kronecker_nearest",
    "search_plan": "compression.search",
    "to_dense": "export.dense",
}

__all__ = [
    "CompressionResult",
    "Distilled",
    "KroneckerFactors",
    "PlanSearch",
    "Report",
    "compress",
    "describe",
    "distill",
    "nearest_kronecker",
    "search_plan",
    "to_dense",
    *_model_names,
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
