"""Distillation of a dense teacher into a factored student (KroneckerBERT, section 3.5; KnGPT2, section 3)."""

from .arguments import OBJECTIVES, TERMS, DistillationArguments
from .objective import Objective
from .start import keep_layers, start_student
from .trainer import DistillationTrainer

__all__ = [
    "OBJECTIVES",
    "TERMS",
    "DistillationArguments",
    "DistillationTrainer",
    "Objective",
    "keep_layers",
    "start_student",
]
