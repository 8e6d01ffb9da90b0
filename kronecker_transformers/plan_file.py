"""Plans as files that a person can read and edit: YAML or JSON, pattern to {m1, n1, terms}."""

from __future__ import annotations

import json
from pathlib import Path

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
        entries = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        return FactorPlan(entries)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"plan file {str(path)!r}: {error}") from error
