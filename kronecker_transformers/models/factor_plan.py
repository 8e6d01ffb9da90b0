"""The factor plan: which modules become Kronecker products, and with which shapes.

A plan is an ordered mapping from a module-name pattern (fnmatch, relative to the base model, for
example ``encoder.layer.*.intermediate.dense``) to the shape of the factors. A weight W of shape
(m, n), m outputs and n inputs, becomes

    W ~ sum over r of A_r (x) B_r,   A_r (m1, n1),   B_r (m / m1, n / n1),   r = 1 .. terms.

An entry holds m1, n1 and terms; m and n come from the model. What no pattern matches stays dense.
(m1, n1) = (m, 1) is the plain low-rank product of rank `terms`. An embedding counts as a matrix of
shape (vocabulary, hidden); its most frequent words may have a product of low rank of their own, which is
added: a text is mostly made of few words, and these are worth more parameters. The presets of a family are
plans too; its configuration file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

LONGEST_PATTERN = 200
"""Characters of a pattern: a plan may come from anywhere, and is matched with every module."""
_SHAPE = ("m1", "n1", "terms")


@dataclass(frozen=True)
class FactorEntry:
    """Shapes of the factors of one weight: A_r is (m1, n1), with `terms` products in the sum.

    Of an embedding, `frequent` words may have a product of rank `frequent_terms` of their own beside it.

    Raises:
        TypeError: a value is not an integer.
        ValueError: a value is too small, or only one of the last two is given.
    """

    m1: int
    n1: int
    terms: int = 1
    frequent: int = 0
    frequent_terms: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name in _SHAPE)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"{field.name}={value!r} in a factor plan must be an integer; write a number >= {least}"
                )
            if value < least:
                raise ValueError(
                    f"{field.name}={value} in a factor plan must be >= {least}; to keep a module dense, leave it out"
                )
        if (self.frequent == 0) != (self.frequent_terms == 0):
            raise ValueError(
                f"frequent={self.frequent} and frequent_terms={self.frequent_terms} in a factor plan must both be "
                ">= 1, or both be left out"
            )

    @classmethod
    def parse(cls, value: FactorEntry | Mapping[str, Any] | tuple[int, ...] | list[int]) -> FactorEntry:
        """Build an entry from itself, a mapping with the names of its fields, or their values: two, three or all."""
        if isinstance(value, FactorEntry):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            if unknown := sorted(set(value) - set(known), key=str):
                raise ValueError(
                    f"unknown field {unknown[0]!r} in a factor plan entry; known fields: {', '.join(known)}"
                )
            if missing := [name for name in _SHAPE[:2] if name not in value]:
                raise ValueError(
                    f"field {missing[0]!r} is missing from the factor plan entry {dict(value)!r}; "
                    "give m1, n1 and, if not 1, terms"
                )
            return cls(**value)
        if isinstance(value, (tuple, list)) and len(value) in (2, 3, 5):
            return cls(*value)
        raise TypeError(
            f"factor plan entry {value!r} must be (m1, n1, terms), (m1, n1, terms, frequent, frequent_terms) or a "
            "mapping with these names"
        )

    def b_shape(self, m: int, n: int) -> tuple[int, int]:
        """Shape (m2, n2) of B_r for a weight of shape (m, n).

        Raises:
            ValueError: m1 does not divide m, n1 does not divide n, or there are more terms than
                min(m1 n1, m2 n2), with which the sum is already exact.
        """
        for name, factor, size_name, size in (("m1", self.m1, "m", m), ("n1", self.n1, "n", n)):
            if size % factor:
                raise ValueError(f"{name}={factor} must divide {size_name}={size}; choose a divisor of {size}")
        m2, n2 = m // self.m1, n // self.n1
        exact = min(self.m1 * self.n1, m2 * n2)
        if self.terms > exact:
            raise ValueError(
                f"terms={self.terms} must be <= {exact} = min(m1 n1, m2 n2), with which the sum is already exact; "
                f"use at most {exact} terms"
            )
        if self.frequent > m:
            raise ValueError(f"frequent={self.frequent} must be <= {m}, the number of rows; give fewer")
        if self.frequent_terms > (most := min(self.frequent, n)):
            raise ValueError(f"frequent_terms={self.frequent_terms} must be <= {most} = min(frequent, n); use fewer")
        return m2, n2

    def parameters(self, m: int, n: int) -> int:
        """Entries of all factors of a weight of shape (m, n)."""
        m2, n2 = self.b_shape(m, n)
        return self.terms * (self.m1 * self.n1 + m2 * n2) + self.frequent_terms * (self.frequent + n)

    def to_dict(self) -> dict[str, int]:
        """The values by their names; those for frequent words only where there are any."""
        return {name: value for name, value in asdict(self).items() if value or name in _SHAPE}


class FactorPlan(Mapping[str, FactorEntry]):
    """An immutable ordered mapping from module-name pattern to `FactorEntry`.

    Args:
        entries: pattern to entry, to ``(m1, n1[, terms])`` or to a mapping with these names.

    Raises:
        TypeError, ValueError: an entry is malformed; the message names the pattern.
    """

    def __init__(self, entries: Mapping[str, Any] = {}) -> None:
        if not isinstance(entries, Mapping):
            raise TypeError(
                f"a factor plan must map patterns to entries, got {type(entries).__name__}; "
                "write {pattern: (m1, n1, terms)}"
            )
        self._entries: dict[str, FactorEntry] = {}
        for pattern, value in entries.items():
            if len(str(pattern)) > LONGEST_PATTERN:
                raise ValueError(
                    f"plan pattern {str(pattern)[:40]!r}... has {len(str(pattern)):,} characters; write at most "
                    f"{LONGEST_PATTERN}"
                )
            try:
                self._entries[str(pattern)] = FactorEntry.parse(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"plan pattern {pattern!r}: {error}") from error

    def __getitem__(self, pattern: str) -> FactorEntry:
        return self._entries[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"FactorPlan({self._entries!r})"

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The plan in plain numbers, as it stands in config.json and in plan files."""
        return {pattern: entry.to_dict() for pattern, entry in self._entries.items()}

    def match(self, modules: Mapping[str, tuple[int, int]]) -> dict[str, FactorEntry]:
        """Assign the entries to modules.

        Args:
            modules: name to weight shape (m, n) of every module that can be factored, relative to
                the base model.

        Returns:
            Name to entry of the modules that become factored, in the order of `modules`.

        Raises:
            ValueError: a pattern matches nothing, two patterns match one module, or a shape does not fit.
        """
        matched: dict[str, str] = {}
        for pattern, entry in self._entries.items():
            names = [name for name in modules if fnmatchcase(name, pattern)]
            if not names:
                raise ValueError(
                    f"plan pattern {pattern!r} matches no module that can be factored; "
                    f"names are relative to the base model, for example {', '.join(example_names(pattern, modules))}"
                )
            for name in names:
                if name in matched:
                    raise ValueError(
                        f"plan patterns {matched[name]!r} and {pattern!r} both match module {name!r}; "
                        "each module may match one pattern only, narrow one of them"
                    )
                matched[name] = pattern
                m, n = modules[name]
                try:
                    entry.b_shape(m, n)
                except ValueError as error:
                    where = f"plan pattern {pattern!r}, module {name!r} with weight ({m}, {n})"
                    raise ValueError(f"{where}: {error}") from error
        return {name: self._entries[matched[name]] for name in modules if name in matched}

    def with_entry(self, name: str, entry: Any, modules: Mapping[str, tuple[int, int]]) -> FactorPlan:
        """This plan with another entry for one module, or None; a pattern that matched others too is spelt out."""
        entries: dict[str, Any] = {}
        for pattern, old in self._entries.items():
            if fnmatchcase(name, pattern):
                entries.update({other: old for other in modules if other != name and fnmatchcase(other, pattern)})
            else:
                entries[pattern] = old
        return FactorPlan(entries if entry is None else {**entries, name: entry})


def example_names(pattern: str, modules: Mapping[str, tuple[int, int]]) -> list[str]:
    """A few names for an error message: those most like the pattern, else some that differ in kind."""
    kinds: dict[str, str] = {}
    for name in modules:
        kinds.setdefault("".join(c for c in name if not c.isdigit()), name)
    return get_close_matches(pattern, modules, n=2) or list(kinds.values())[:4]


def preset_entry(
    preset: str, part: str, m: int, n: int, *, a: tuple[int, int] | None = None, b: tuple[int, int] | None = None
) -> FactorEntry:
    """The entry of a preset for a weight (m, n), of which one factor, A or B, keeps its size.

    Raises:
        ValueError: that size does not divide the weight's; the message names preset and part.
    """
    fixed = a or b
    assert fixed is not None
    if m % fixed[0] or n % fixed[1]:
        raise ValueError(
            f"preset {preset!r} cannot be scaled to this model: the {part} has weight ({m}, {n}), "
            f"which must divide by ({fixed[0]}, {fixed[1]}); use another model or a FactorPlan of your own"
        )
    return FactorEntry(*(a or (m // fixed[0], n // fixed[1])))


def resolve_plan(plan: str | Mapping[str, Any] | None, config: Any) -> FactorPlan:
    """Turn the name of a preset, a mapping or None (all dense) into a plan for `config`.

    Raises:
        ValueError: unknown preset, or a preset that does not divide this model's sizes.
    """
    if plan is None:
        return FactorPlan()
    if isinstance(plan, FactorPlan):
        return plan
    if isinstance(plan, str):
        presets = config.family.presets
        if plan not in presets:
            raise ValueError(
                f"plan={plan!r} is not a preset for {config.dense_config_class.model_type}; "
                f"choose {' or '.join(map(repr, presets))}, or write a plan of your own"
            )
        return presets[plan](config)
    return FactorPlan(plan)
