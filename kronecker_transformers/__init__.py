"""Smaller and faster BERT and GPT-2 models: embedding and linear layers become Kronecker products.

Importing this package registers its models with the Auto classes of transformers.
"""

from importlib.metadata import version

from .compression.compress import CompressionResult, compress
from .compression.search import PlanSearch, search_plan
from .evaluation.cost import Report, describe
from .export.dense import to_dense
from .models import *  # noqa: F403  (every model class, named in models.__all__)
from .models import __all__ as _model_names
from .models.kronecker_nearest import KroneckerFactors, nearest_kronecker

__version__ = version("kronecker-transformers")

__all__ = [
    "CompressionResult",
    "KroneckerFactors",
    "PlanSearch",
    "Report",
    "compress",
    "describe",
    "nearest_kronecker",
    "search_plan",
    "to_dense",
    *_model_names,
]
