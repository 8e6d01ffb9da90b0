"""Distillation of a dense teacher into a factored student (KroneckerBERT, section 3.5; KnGPT2, section 3)."""

from .arguments import OBJECTIVES, DistillationArguments
from .losses import LOSSES, Loss
from .memory import TeacherMemory
from .objective import Objective
from .start import keep_layers, start_student
from .trainer import DistillationTrainer

__all__ = [
    "LOSSES",
    "OBJECTIVES",
    "DistillationArguments",
    "DistillationTrainer",
    "Loss",
    "Objective",
    "TeacherMemory",
    "keep_layers",
    "start_student",
]
