"""Smaller and faster BERT and GPT-2 models: embedding and linear layers become Kronecker products.

Importing this package registers its models with the Auto classes of transformers.
"""

from importlib.metadata import version

from .compress import CompressionResult, compress, to_dense
from .factorization import KroneckerFactors, nearest_kronecker
from .models import *  # noqa: F403  (every model class, named in models.__all__)
from .models import __all__ as _model_names
from .report import Report, describe
from .search import PlanSearch, search_plan

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
