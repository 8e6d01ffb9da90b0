"""Plans as files that a person can read and edit: YAML or JSON, pattern to {m1, n1, terms}."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .models.factor_plan import PRESETS, FactorPlan


def read_plan(plan: str | Path) -> str | FactorPlan:
    """The plan that a command-line value stands for: the name of a preset as it is, or the contents of a file.

    Args:
        plan: a preset such as `7.7x`, or the path of a `.yaml`, `.yml` or `.json` file.

    Raises:
        ValueError: neither a preset nor a file, or the file holds no plan.
    """
    presets = [name for family in PRESETS.values() for name in family]
    if str(plan) in presets:
        return str(plan)
    path = Path(plan)
    if not path.is_file():
        raise ValueError(f"plan={str(plan)!r} is neither a preset ({', '.join(presets)}) nor a file; give one of these")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return FactorPlan(json.loads(text, object_pairs_hook=_without_repeats))
        return FactorPlan(yaml.load(text, Loader=_Loader))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"plan file {str(path)!r}: {error}") from error


def _without_repeats(pairs: list[tuple[Hashable, Any]]) -> dict[Hashable, Any]:
    """A mapping of pairs; JSON and YAML would silently keep the last of two equal keys."""
    mapping: dict[Hashable, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"{key!r} stands there twice; each pattern may be given once, remove one")
        mapping[key] = value
    return mapping


class _Loader(yaml.SafeLoader):
    """The safe loader, which builds plain data only, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        return _without_repeats(
            [(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value]
        )
