"""Whether the classes of a teacher are those of a task, whatever their order and spelling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class LabelOrder(NamedTuple):
    """The teacher's id of each class of a task, and whether their names say so."""

    ids: tuple[int, ...]
    is_certain: bool
    """False where one side has no names, so that both are taken to be in the same order."""


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.casefold())


def match_labels(teacher: Sequence[str], task: Sequence[str]) -> LabelOrder:
    """Find the classes of a task among those of a teacher.

    Names are compared as they are, and if they differ, without case, spaces, underscores and hyphens.

    Args:
        teacher: names in the order of the teacher's ids.
        task: names in the order of the task's ids.

    Raises:
        ValueError: another number of classes, or other names.
    """
    if len(teacher) != len(task):
        raise ValueError(
            f"the teacher has {len(teacher)} labels ({', '.join(teacher)}), where the task has {len(task)} "
            f"({', '.join(task)}); give one that was fine-tuned on it, or one without a classifier"
        )
    for plain in (str, _plain):
        mine, wanted = [plain(name) for name in teacher], [plain(name) for name in task]
        if sorted(mine) == sorted(wanted) and len(set(mine)) == len(mine):
            return LabelOrder(tuple(mine.index(name) for name in wanted), True)
    if any(all(re.fullmatch(r"(?i:label[\s_-]*)?\d+", name.strip()) for name in names) for names in (teacher, task)):
        return LabelOrder(tuple(range(len(task))), False)
    raise ValueError(
        f"the teacher has the labels {', '.join(teacher)}, where the task has {', '.join(task)}; give one that was "
        "fine-tuned on it, or correct id2label and label2id in its config.json"
    )
