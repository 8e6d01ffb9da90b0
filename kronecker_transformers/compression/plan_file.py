"""Plans as files that a person can read and edit: YAML or JSON, pattern to {m1, n1, terms}."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.files import check_file, write_text
from ..models.factor_plan import FactorPlan
from ..models.kronecker_family import FAMILIES

SEARCHES = ("search", "low-rank")
"""Plans that are searched: over all shapes, or over low rank alone."""


def read_plan(plan: str | Path) -> str | FactorPlan:
    """The plan that a command-line value stands for: the name of a preset or a search as it is, or what a file holds.

    Args:
        plan: a preset such as `7.7x`, one of `SEARCHES`, or the path of a `.yaml`, `.yml` or `.json` file.

    Raises:
        ValueError: none of these, or the file holds no plan.
    """
    presets = list(dict.fromkeys(name for config in FAMILIES.values() for name in config.family.presets))
    if str(plan) in (*presets, *SEARCHES):
        return str(plan)
    path = Path(plan)
    if not path.is_file():
        known = ", ".join([*presets, *SEARCHES])
        raise ValueError(f"plan={str(plan)!r} is neither one of {known} nor a file; give one of these")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            entries = json.loads(text, object_pairs_hook=_without_repeats)
        else:
            entries = yaml.load(text, Loader=_Loader)
        if entries is None:
            raise ValueError("it is empty; write one line for each pattern")
        return FactorPlan(entries)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(
            f"plan file {str(path)!r}, line {line}: {error.problem}; a pattern that begins with * stands in quotes"
        ) from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"plan file {str(path)!r}: {error}") from error


def check_plan_path(path: str | os.PathLike[str]) -> Path:
    """Refuse a plan file before long work begins.

    Raises:
        ValueError: an ending other than `.yaml`, `.yml` or `.json`.
        OSError: as `checkpoint.files.check_file`.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"plan file {str(path)!r} must end in .yaml, .yml or .json; give it one of these endings")
    return check_file(path)


def write_plan(path: str | os.PathLike[str], plan: FactorPlan) -> Path:
    """Write a plan as a file that `read_plan` reads, whole or not at all; an older file is replaced.

    Args:
        path: ends in `.yaml`, `.yml` or `.json`.
        plan: to write.

    Raises:
        ValueError, OSError: as `check_plan_path`.
        OSError: it cannot be written.
    """
    path = check_plan_path(path)
    entries = plan.to_dict()
    if path.suffix == ".json":
        text = json.dumps(entries, indent=2)
    else:
        flow = {
            name: yaml.safe_dump(entry, default_flow_style=True, sort_keys=False) for name, entry in entries.items()
        }
        text = "\n".join(f"{_key(name)}: {entry.strip()}" for name, entry in flow.items())
    return write_text(path, text + "\n")


def _key(pattern: str) -> str:
    return pattern if re.fullmatch(r"[A-Za-z_][\w.*?-]*", pattern) else json.dumps(pattern)


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs; JSON and YAML would silently keep the last of two equal keys."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} stands there twice; each pattern may be given once, remove one")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """The safe loader, which builds plain data only, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        _without_repeats([(key.value, None) for key, _ in node.value if isinstance(key.value, str)])
        return super().construct_mapping(node, deep)
