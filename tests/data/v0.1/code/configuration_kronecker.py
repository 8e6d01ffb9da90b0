"""What the configurations of both families share: the factor plan, and the classes a checkpoint can be loaded with."""

# ruff: noqa: E402 - the versions are looked at before anything is imported that older ones do not have

from __future__ import annotations

import importlib.metadata
import re
import sys

_TRANSFORMERS = importlib.metadata.version("transformers")
if sys.version_info < (3, 11) or [int(part) for part in re.findall(r"\d+", _TRANSFORMERS)[:2]] < [5, 17]:
    raise ImportError(
        "this model needs Python >= 3.11 and transformers >= 5.17, not Python "
        f"{sys.version.split()[0]} and transformers {_TRANSFORMERS}; pip install --upgrade transformers"
    )

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from .factor_plan import FactorEntry, resolve_plan

_REFERENCE = r"([\w.-]+(/[\w.-]+)?--)?\w+\.\w+"  # [repository--]file.Class

# Facts of the dense teacher's checkpoint that are not facts of the student's.
_NOT_INHERITED = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")


LARGEST_SIZE, MOST_LAYERS, MOST_PARAMETERS = 2**24, 1_000, 10**11
"""Bounds on what a config may ask for. It may come from anywhere, and what it asks for is built."""


class KroneckerConfigMixin:
    """Mixin before a stock config class: resolves and validates `factor_plan`, and keeps `auto_map` complete."""

    dense_config_class: ClassVar[type[PreTrainedConfig]]
    auto_classes: ClassVar[dict[str, str]]
    factor_plan: Any
    vocab_size: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self._check_sizes()
        plan, modules = resolve_plan(self.factor_plan, self), self.factorable_modules()
        if len(plan) > len(modules):
            raise ValueError(
                f"factor_plan has {len(plan):,} entries for {len(modules):,} modules; each module may match one only"
            )
        matched = plan.match(modules)
        parameters = 0
        for name, (m, n) in modules.items():
            entry = matched.get(name)
            parameters += m * n if entry is None else entry.parameters(m, n)
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"config asks for {parameters:,} parameters, more than {MOST_PARAMETERS:,}; check its sizes"
            )
        self.factor_plan = plan.to_dict()

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_inner", "max_position_embeddings",
                 "type_vocab_size", "num_attention_heads")  # fmt: skip
        for name, most in (("num_hidden_layers", MOST_LAYERS), *((size, LARGEST_SIZE) for size in sizes)):
            value = getattr(self, name, None)
            least = 0 if name == "num_hidden_layers" else 1
            if isinstance(value, int) and not least <= value <= most:
                raise ValueError(f"{name}={value} in the config must be from {least} to {most:,}; correct it")

    @classmethod
    def from_dense(cls, dense_config: PreTrainedConfig, plan: str | Mapping[str, Any] | None) -> Self:
        """The configuration of a student of `dense_config`.

        Args:
            dense_config: stock config of the same family.
            plan: name of a preset, a `FactorPlan`, or a mapping from pattern to ``(m1, n1, terms)``.

        Raises:
            ValueError: another family, or a plan that does not fit.
        """
        if dense_config.model_type != cls.dense_config_class.model_type:
            raise ValueError(
                f"model_type={dense_config.model_type!r} must be {cls.dense_config_class.model_type!r} "
                f"for {cls.__name__}; supported teachers are BERT and GPT-2"
            )
        settings = {key: value for key, value in dense_config.to_dict().items() if key not in _NOT_INHERITED}
        settings |= {"factor_plan": plan, "attn_implementation": dense_config._attn_implementation}
        return cls(**settings)

    def to_dense_config(self) -> PreTrainedConfig:
        """The stock config of the dense twin."""
        settings = {key: value for key, value in self.to_dict().items() if key not in (*_NOT_INHERITED, "factor_plan")}
        return self.dense_config_class(**settings)

    def factorable_modules(self) -> dict[str, tuple[int, int]]:
        """Weight shape (m outputs, n inputs) of every module that a plan may name."""
        raise NotImplementedError

    def factored_modules(self) -> dict[str, FactorEntry]:
        """Entry of every factored module, by its name relative to the base model."""
        return resolve_plan(self.factor_plan, self).match(self.factorable_modules())

    def resize_embedding(self, name: str, vocab_size: int, m1: int) -> None:
        """Give the factored word embedding `name` another number of words and of rows of A.

        Raises:
            ValueError: the plan does not fit the new size; nothing has changed then.
        """
        modules = self.factorable_modules()
        entry = replace(self.factored_modules()[name], m1=m1)
        plan = resolve_plan(self.factor_plan, self).with_entry(name, entry, modules)
        plan.match({**modules, name: (vocab_size, modules[name][1])})
        self.factor_plan, self.vocab_size = plan.to_dict(), vocab_size

    def replace_entry(self, name: str, entry: tuple[int, int, int] | None) -> None:
        """Give one module another entry of the plan, (m1, n1, terms), or none: it is dense then."""
        modules = self.factorable_modules()
        plan = resolve_plan(self.factor_plan, self).with_entry(name, entry, modules)
        self.factor_plan = plan.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """As the stock method, with every class of the family in `auto_map`.

        The stock `save_pretrained` records only the class that was saved, so a checkpoint of a masked
        language model could not be opened as its base model.
        """
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        own_files = {reference.split(".")[0] for reference in self.auto_classes.values()}
        foreign = {
            auto_class: reference
            for auto_class, reference in (settings.get("auto_map") or {}).items()
            if re.fullmatch(_REFERENCE, str(reference)) and reference.split("--")[-1].split(".")[0] not in own_files
        }
        settings["auto_map"] = {**self.auto_classes, **foreign}
        return settings
