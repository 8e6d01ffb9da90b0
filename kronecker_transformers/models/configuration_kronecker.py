"""What the configurations of all families share: the factor plan, and the classes a checkpoint can be loaded with."""

from __future__ import annotations

import re
import sys

from transformers import __version__ as _TRANSFORMERS

# before anything is imported that older versions do not have
if sys.version_info < (3, 11) or [int(part) for part in re.findall(r"\d+", _TRANSFORMERS)[:2]] < [5, 17]:
    raise ImportError(
        "this model needs Python >= 3.11 and transformers >= 5.17, not Python "
        f"{sys.version.split()[0]} and transformers {_TRANSFORMERS}; pip install --upgrade transformers"
    )

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from .factor_plan import resolve_plan
from .kronecker_family import Family, Head, supported_families

_REFERENCE = r"([\w.-]+(/[\w.-]+)?--)?\w+\.\w+"  # [repository--]file.Class

# Facts of the dense teacher's checkpoint that are not facts of the student's.
_NOT_INHERITED = (
    "model_type",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "transformers_version",
    "_name_or_path",
)


LARGEST_SIZE, MOST_LAYERS, MOST_ENTRIES = 2**24, 1_000, 100_000
"""Bounds on what a config may ask for. It may come from anywhere, and what it asks for is built."""


class KroneckerConfigMixin:
    """Mixin before a stock config class: resolves `factor_plan` and keeps `auto_map` complete.

    The plan is matched with the modules of a model when the model is built.
    """

    family: ClassVar[Family]
    dense_config_class: ClassVar[type[PreTrainedConfig]]
    auto_classes: ClassVar[dict[str, str]] = {}
    """Auto class to file and class; this and the next two come from `register_family`."""
    heads: ClassVar[dict[type, tuple[Head, ...]]]
    base_class: ClassVar[Any]
    factor_plan: Any

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self._check_sizes()
        plan = resolve_plan(self.factor_plan, self)
        if len(plan) > MOST_ENTRIES:
            raise ValueError(f"factor_plan has {len(plan):,} entries, more than {MOST_ENTRIES:,}; use wider patterns")
        self.factor_plan = plan.to_dict()

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "n_inner", "hidden_dim", "embedding_size",
                 "max_position_embeddings", "type_vocab_size", "num_attention_heads",
                 "relative_attention_num_buckets")  # fmt: skip
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
            TypeError, ValueError: another family, a malformed plan, or a preset that does not divide the sizes. Whether
                the plan fits shows when a model is built.
        """
        if dense_config.model_type != cls.dense_config_class.model_type:
            raise ValueError(
                f"model_type={dense_config.model_type!r} must be {cls.dense_config_class.model_type!r} "
                f"for {cls.__name__}; supported families are {supported_families()}"
            )
        settings = {key: value for key, value in dense_config.to_dict().items() if key not in _NOT_INHERITED}
        settings |= {"factor_plan": plan, "attn_implementation": dense_config._attn_implementation}
        return cls(**settings)

    def to_dense_config(self) -> PreTrainedConfig:
        """The stock config of the dense twin."""
        settings = {key: value for key, value in self.to_dict().items() if key not in (*_NOT_INHERITED, "factor_plan")}
        return self.dense_config_class(**settings)

    def to_dict(self) -> dict[str, Any]:
        """As the stock method, with every class of the family in `auto_map`.

        The stock `save_pretrained` records only the class that was saved, so a checkpoint of a masked
        language model could not be opened as its base model.
        """
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        known: dict[str, str] = {}
        foreign: dict[str, str] = {}
        for auto_class, reference in (settings.get("auto_map") or {}).items():
            if re.fullmatch(_REFERENCE, str(reference)):
                local = reference.split("--")[-1]
                if "_kronecker" in local.split(".")[0]:
                    known[auto_class] = local  # in a checkpoint whose models were not imported yet, all there is
                else:
                    foreign[auto_class] = reference
        settings["auto_map"] = {**known, **self.auto_classes, **foreign}
        return settings
