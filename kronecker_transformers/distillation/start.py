"""Where a student starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import load_student
from ..compress import compress


def start_student(
    teacher: PreTrainedModel, plan: str | Mapping[str, Any] = "7.7x", start: str | os.PathLike[str] | None = None
) -> PreTrainedModel:
    """A student of `teacher`: factored from it, or the student of an earlier stage with the teacher's head.

    KroneckerBERT, section 3.5: for a task the student comes from the first stage and its prediction layer from the
    teacher. What the earlier student lacks, such as a pooler, comes from the teacher as well.

    Args:
        teacher: with the head that the student shall have.
        plan: as for `compress`; not used with `start`, which has its own.
        start: folder or Hub name of a factored model of the same sizes, with any head.

    Returns:
        A student whose parameters all train.

    Raises:
        ValueError, OSError: as `compress`; or `start` is of other sizes.
    """
    if start is None:
        return compress(teacher, plan).model.requires_grad_(True).train()
    earlier, _ = load_student(start)
    student = compress(teacher, earlier.config.factor_plan).model
    wanted, found = student.base_model.state_dict(), earlier.base_model.state_dict()
    for name, value in found.items():
        if name in wanted and wanted[name].shape != value.shape:
            raise ValueError(
                f"{name!r} in {os.fspath(start)!r} has shape {tuple(value.shape)}, not {tuple(wanted[name].shape)} as "
                "a student of this teacher; start from a student of a teacher of the same sizes"
            )
    student.base_model.load_state_dict(found, strict=False)
    return student.requires_grad_(True).train()
