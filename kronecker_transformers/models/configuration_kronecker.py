"""What the configurations of both families share: the factor plan, and the classes a checkpoint can be loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from .factor_plan import FactorEntry, resolve_plan

# Facts of the dense teacher's checkpoint that are not facts of the student's.
_NOT_INHERITED = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")


class KroneckerConfigMixin:
    """Mixin before a stock config class: resolves and validates `factor_plan`, and keeps `auto_map` complete."""

    dense_config_class: ClassVar[type[PreTrainedConfig]]
    auto_classes: ClassVar[dict[str, str]]
    factor_plan: Any
    vocab_size: int

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        plan = resolve_plan(self.factor_plan, self)
        plan.match(self.factorable_modules())
        self.factor_plan = plan.to_dict()

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
        return cls(**{**settings, "factor_plan": plan})

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

    def to_dict(self) -> dict[str, Any]:
        """As the stock method, with every class of the family in `auto_map`.

        The stock `save_pretrained` records only the class that was saved, so a checkpoint of a masked
        language model could not be opened as its base model.
        """
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        own_files = {reference.split(".")[0] for reference in self.auto_classes.values()}
        foreign = {
            auto_class: reference
            for auto_class, reference in settings.get("auto_map", {}).items()
            if reference.split("--")[-1].split(".")[0] not in own_files
        }
        settings["auto_map"] = {**self.auto_classes, **foreign}
        return settings
