"""A family of models, such as BERT or GPT-2, as data: where its parts are, what its heads give, which plans it has.

Each family has one file, with one `Family` and one call of `register_family`; BERT and GPT-2 have their configurations
in files of their own. Whatever compresses, distils, measures or publishes a model asks `family_of`, for dense ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

FAMILIES: dict[str, Any] = {}
"""Configuration class of each family, by the `model_type` of its dense models and by its own."""
DENSE_CLASSES: dict[Any, Any] = {}
"""Stock class by its factored class."""
FACTORED_CLASSES: dict[Any, Any] = {}
"""Factored class by its stock class."""


@dataclass(frozen=True)
class Head:
    """One output of a model, and the labels that it is trained on.

    Attributes:
        kind: "sequence" (examples, classes) or, for a regression, (examples, outputs); "next_sentence" (examples, 2);
            "choices" (examples, choices); "tokens" and, over the vocabulary, "words" (examples, length, classes);
            "next_token", the same for the token that follows; "span" (examples, length); "replaced", whether another
            word stood there (examples, length).
        logits: its name in the model's output.
        labels: its name in the model's input.
        share: factor of its loss in the sum over all heads of the model, as in transformers.
    """

    kind: str
    logits: str = "logits"
    labels: str = "labels"
    share: float = 1.0


SPAN = (
    Head("span", "start_logits", "start_positions", share=0.5),
    Head("span", "end_logits", "end_positions", share=0.5),
)
"""Heads of extractive question answering."""


@dataclass(frozen=True)
class Family:
    """Names are those of modules: of the base model, or, where it says so, of one of its layers.

    Attributes:
        layers: the stack of layers.
        words: the word embedding.
        positions: the position embedding.
        embedded: the module whose output goes into the first layer, or into the projection.
        attention: in a layer, the self-attention, with its `scaling`; without, scores are divided by sqrt(d).
        query, key, value: in the attention; the same module where one gives all three in equal parts.
        default_ratio: how many times smaller a student is by default, where its plan is searched.
        presets: plans of the papers by name, functions of a config; the first is the default.
        norm: the norm after the last layer, if there is one.
        projection: the linear layer from the size of the embedding to that of the layers, as in ELECTRA; models where
            the two are the same lack it.
        position_bias: the module that gives (length, length, heads) to add to the scores of every layer, as in MPNet.
        pooler: the linear layer of the pooler, which sees the first token only; models may lack it.
        causal: whether it reads from left to right and counts positions from the left.
        pads_positions: whether positions are counted from the one after that of the padding token, as in RoBERTa.
    """

    layers: str
    words: str
    positions: str
    embedded: str
    attention: str
    query: str
    key: str
    value: str
    default_ratio: float
    presets: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    norm: str | None = None
    projection: str | None = None
    position_bias: str | None = None
    pooler: str | None = None
    causal: bool = False
    pads_positions: bool = False

    @property
    def pooler_module(self) -> str | None:
        """The pooler of a base model, around its linear layer; None for a family without."""
        return self.pooler.partition(".")[0] if self.pooler else None


def register_family(config_class: Any, models: Mapping[str, tuple[type, tuple[Head, ...]]]) -> None:
    """Make a family known: to the rest of this package, to the Auto classes, and to checkpoints that carry its code.

    Args:
        config_class: with `family`, `dense_config_class` and `model_type`.
        models: for each Auto class the factored class and its heads; "AutoModel" is the base model.
    """
    config_class.heads = dict(models.values())
    config_class.base_class = models["AutoModel"][0]
    for cls, _ in models.values():
        # the stock class is the first of its bases that comes with transformers
        DENSE_CLASSES[cls] = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        FACTORED_CLASSES[DENSE_CLASSES[cls]] = cls
    classes = {"AutoConfig": config_class, **{auto: cls for auto, (cls, _) in models.items()}}
    config_class.auto_classes = {auto: _reference(cls) for auto, cls in classes.items()}
    config_class.register_for_auto_class()
    for auto, (cls, _) in reversed(list(models.items())):  # of several Auto classes for one class the first one stays
        cls.register_for_auto_class(auto)  # type: ignore[attr-defined]
    FAMILIES[config_class.model_type] = FAMILIES[config_class.dense_config_class.model_type] = config_class
    if config_class.__module__.startswith("transformers_modules."):
        return  # code that came with a checkpoint, which is the business of that checkpoint alone
    transformers.AutoConfig.register(config_class.model_type, config_class)
    for auto, (cls, _) in models.items():
        getattr(transformers, auto).register(config_class, cls)


def _reference(cls: type) -> str:
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def family_of(model: Any) -> Family:
    """The family of a dense or factored model, or of its config.

    Raises:
        ValueError: a model of no known family.
    """
    config = getattr(model, "config", model)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported; supported families are {supported_families()}"
        )
    family: Family = FAMILIES[config.model_type].family
    return family


def supported_families() -> str:
    """Their names, for messages."""
    return ", ".join(sorted({config.dense_config_class.model_type for config in FAMILIES.values()}))


def heads_of(model: Any) -> tuple[Head, ...]:
    """The heads of a dense or factored model; none for a base model.

    Raises:
        ValueError: not one of the classes that this package knows.
    """
    factored = type(model) if type(model) in DENSE_CLASSES else FACTORED_CLASSES.get(type(model))
    if factored is None:
        raise ValueError(f"model of class {type(model).__name__} is not supported; supported are {supported_classes()}")
    heads: tuple[Head, ...] = factored.config_class.heads[factored]
    return heads


def supported_classes() -> str:
    """The stock classes that can be compressed, for messages."""
    return ", ".join(sorted(cls.__name__ for cls in FACTORED_CLASSES))


def has_choices(model: Any) -> bool:
    """Whether its inputs are (examples, choices, length) rather than (examples, length)."""
    return any(head.kind == "choices" for head in heads_of(model))


def pooler_of(base: Any) -> Any:
    """The pooler of a base model, a module; None where there is none."""
    return getattr(base, family_of(base).pooler_module or "", None)


def projection_of(base: Any) -> Any:
    """The projection after the embedding of a base model, a module; None where there is none."""
    return getattr(base, family_of(base).projection or "", None)


def longest_sequence(model: Any) -> int:
    """Tokens that a model takes at most."""
    longest: int = model.config.max_position_embeddings
    if not family_of(model).pads_positions:
        return longest
    padding: int = model.base_model.get_submodule(family_of(model).positions).padding_idx
    return longest - padding - 1
