"""Checkpoints of a training that were written to their end."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.trainer_callback import TrainerState

from ..hub.trainer import STATE_FILE

logger = logging.getLogger(__name__)


def newest_checkpoint(folder: str | Path) -> Path:
    """The checkpoint of the highest step in `folder` that was written to its end.

    A run that was killed while it saved leaves an unfinished one behind; it is passed over.

    Raises:
        ValueError: there is none.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        if is_complete(path):
            return path
        logger.warning("%s was not written to its end and is passed over", path)
    raise ValueError(f"output_dir={str(folder)!r} holds no complete checkpoint to resume from; start anew")


def is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer has written the last of the files of a checkpoint."""
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return False
    return True
