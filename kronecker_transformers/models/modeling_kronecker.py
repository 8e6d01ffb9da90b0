"""What the models of all families share: building from the plan, tying, resizing, initialising, loading."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .factor_plan import FactorEntry
from .kronecker_embeddings import FactoredEmbeddings
from .kronecker_family import family_of, pooler_of
from .kronecker_internals import RefusesHollowCheckpoints, WeightsError
from .kronecker_layers import FrequentWords, KroneckerEmbedding, KroneckerLinear
from .kronecker_matching import matched_plan

logger = logging.get_logger(__name__)
_ENTRY = "(m1, n1, terms, frequent, frequent_terms)"


def factor_module(module: nn.Module, entry: FactorEntry, name: str = "") -> KroneckerLinear | KroneckerEmbedding:
    """An uninitialised factored layer with the sizes of a dense one (`nn.Linear`, `Conv1D` or `nn.Embedding`).

    Args:
        module: the dense one.
        entry: of a plan.
        name: of the module, for errors.

    Raises:
        TypeError: a module of another class.
        ValueError: frequent words of a layer that is no embedding.
    """
    m1, n1, terms = entry.m1, entry.n1, entry.terms
    if isinstance(module, nn.Embedding):
        sizes = module.num_embeddings, module.embedding_dim, m1, n1, terms, module.padding_idx
        return KroneckerEmbedding(*sizes, frequent=entry.frequent, frequent_terms=entry.frequent_terms)
    if entry.frequent:
        raise ValueError(
            f"frequent={entry.frequent} is for embeddings, but {name or 'the module'} is a {type(module).__name__}; "
            "leave it out"
        )
    if isinstance(module, Conv1D):
        return KroneckerLinear(module.nx, module.nf, m1, n1, terms, bias=True)
    if isinstance(module, nn.Linear):
        return KroneckerLinear(module.in_features, module.out_features, m1, n1, terms, bias=module.bias is not None)
    raise TypeError(
        f"module of type {type(module).__name__} cannot be factored; supported are nn.Linear, Conv1D and nn.Embedding"
    )


class KroneckerPreTrainedModel(FactoredEmbeddings, RefusesHollowCheckpoints, PreTrainedModel):
    """To stand before a stock class: builds its model with factored layers in the places of `config.factor_plan`."""

    config_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        device = torch.empty(0).device  # honours torch.device contexts and torch.set_default_device
        checkpointing = vars(config).pop("gradient_checkpointing", False)  # for the layers that will stay
        empty = _can_be_empty()
        with torch.device("meta") if empty else nullcontext():  # a dense skeleton on the meta device costs no memory
            super().__init__(config, *args, **kwargs)
            if self.base_model is self:
                base_class = type(self).config_class.base_class
                if not isinstance(self, base_class):
                    raise TypeError(
                        f"{type(self).__name__} has no base model when {type(config).__name__} is factored; derive it "
                        f"from a class with a head, or from the stock class with a {base_class.__name__} in it"
                    )
                self._factor_layers()
            else:
                setattr(self, self.base_model_prefix, self._make_base_model())
                self._tie_head()
            if checkpointing:
                self.config.gradient_checkpointing = True
            self.post_init()
        if empty and device.type != "meta":
            self._allocate(device)
            self.init_weights()

    def _make_base_model(self) -> PreTrainedModel:
        """The factored base model that takes the place of the stock one, `self.base_model`."""
        choices = {"add_pooling_layer": pooler_of(self.base_model) is not None} if self.config.family.pooler else {}
        return type(self).config_class.base_class(self.config, **choices)

    def _factor_layers(self) -> None:
        modules = dict(self.named_modules())
        for name, entry in matched_plan(self, self.config.factor_plan).items():
            parent, _, leaf = name.rpartition(".")
            if name in modules:  # a model may have been built without its pooler
                setattr(modules[parent], leaf, factor_module(modules[name], entry, name))

    def _allocate(self, device: torch.device) -> None:
        """Give the skeleton its memory; buffers get their values too, which nothing else would restore.

        Parameters are registered one by one, as in a stock constructor, for those who watch this (accelerate's
        `init_empty_weights`).
        """
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                setattr(module, name, made[parameter])
            buffers = list(module.named_buffers(recurse=False))
            for name, buffer in buffers:
                setattr(module, name, torch.empty_like(buffer, device=device))
            if buffers:
                self._init_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding, FrequentWords)):
            module.init_factors(self.config.initializer_range)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As the stock method, but what the config does not describe is refused, since it could not be loaded again.

        Raises:
            ValueError: layers are not those of the plan, or the output head is not the one that the config says; or
                `push_to_hub=True` for a sentence encoder, of which the stock method would send the weights alone.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):  # then adapters alone are saved
            self._check_config()
        modules = getattr(self, "sentence_modules", None)  # what the package took over from a sentence encoder
        if modules is not None and kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True of save_pretrained would leave out the pooling and prompts of this sentence encoder; "
                "call model.push_to_hub(name), or kronecker-transformers push"
            )
        if modules is not None and is_main_process:
            modules.write(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # PEFT has put its adapters in place
            head = self.get_output_embeddings()
            names = [n for n, m in self.named_modules() if isinstance(m, KroneckerLinear) and m is not head]
            if names and not any(name.endswith(".base_layer") for name in names):
                logger.warning(
                    "none of the %d factored layers has got an adapter: PEFT looks for nn.Linear, in all-linear too; "
                    "make its config with kronecker_transformers.adapters.lora_config",
                    len(names),
                )

    def _check_config(self) -> None:
        modules = dict(self.base_model.named_modules())
        planned = {
            name: tuple(asdict(entry).values())
            for name, entry in matched_plan(self.base_model, self.config.factor_plan).items()
        }
        for name, module in modules.items():
            is_factored = isinstance(module, (KroneckerLinear, KroneckerEmbedding))
            built = module.entry if is_factored else None
            if built != planned.get(name):
                raise ValueError(
                    f"module {name!r} has {_ENTRY} = {built}, but {planned.get(name)} in config.factor_plan "
                    "(None is dense), so the model could not be loaded again; make both agree"
                )
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if head is None:
            return
        tied, factored = self.config.tie_word_embeddings, isinstance(head, KroneckerLinear)
        if factored and not tied:
            raise ValueError(
                "config.tie_word_embeddings=False, but the output head is made of factors, and only a tied one can be; "
                "set it to True, or set_output_embeddings(nn.Linear) with the head's to_dense() as its weight"
            )
        is_shared = not factored or (head.tied is not None and head.tied[0] is embedding)
        if tied and (factored != isinstance(embedding, KroneckerEmbedding) or not is_shared):
            raise ValueError(
                "config.tie_word_embeddings=True, but the output head is not made of the embedding's factors; call "
                "tie_weights(), or give the head its own weights by set_output_embeddings"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the stock method, but factors that do not fit the plan are one clear error.

        The stock method would draw factors that are missing at random, with a warning.

        Raises:
            ValueError: factors are missing, left over, or of another shape.
            RuntimeError: another weight has another shape, unless `ignore_mismatched_sizes`.
            OSError: a weights file is truncated or corrupted.
        """
        source = str(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            logger.warning(
                "quantization_config: quantisers look for nn.Linear, so they pass by the factored layers of %s, which "
                "hold most of its weights and stay as they are; for 8 bits, export it for ONNX Runtime "
                "(kronecker-transformers export --format onnx --int8)",
                cls.__name__,
            )
        load: Any = super().from_pretrained
        try:
            model, info = load(
                pretrained_model_name_or_path, *args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise OSError(
                    f"the weights in {source!r} are truncated or corrupted ({error}); copy or download them again"
                ) from error
            raise
        if problem := _misfit(model, info):
            raise WeightsError(f"the weights in {source!r} do not fit the factor plan in its config: {problem}")
        for key, found, wanted in info["mismatched_keys"]:
            if not ignore_mismatched_sizes:
                raise RuntimeError(
                    f"{key!r} in {source!r} has shape {tuple(found)}, not {tuple(wanted)}; "
                    "pass ignore_mismatched_sizes=True to draw it anew"
                )
        return (model, info) if output_loading_info else model


def _can_be_empty() -> bool:
    """Whether a module may be made on the meta device: not where every parameter is moved to a device at once.

    That is so under accelerate's `init_on_device` and DeepSpeed's `zero.Init`.
    """
    try:
        with torch.device("meta"):
            return nn.Linear(1, 1).weight.is_meta
    except NotImplementedError:
        return False


def _misfit(model: KroneckerPreTrainedModel, info: dict[str, Any]) -> str | None:
    """What is wrong with the factors of a checkpoint, from the loading info, and the remedy; None if nothing is.

    A pooler may be missing or left over as a whole: models without one share checkpoints with models that have one.
    So may what belongs to an output head that this class does not have.
    """
    remedy = "restore the config.json that was saved with them, and do not override its sizes or its plan"
    prefix, base = f"{model.base_model_prefix}.", model.base_model
    modules = dict(model.named_modules()) | {f"{prefix}{name}": module for name, module in base.named_modules()}
    parts = {name for name, _ in base.named_children()}
    pooler_name = family_of(base).pooler
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    for keys in (missing, unexpected):
        pooler = {key for key in keys if pooler_name and key.rpartition(".")[0].endswith(pooler_name)}
        if {key.rpartition(".")[2] for key in pooler} == {"A", "B", "bias"}:
            keys -= pooler
    for key in sorted(missing):
        if key.endswith((".A", ".B", ".words")):
            return f"{key!r} is missing; {remedy}"
    for key in sorted(unexpected):
        name, _, leaf = key.rpartition(".")
        known = name in modules or key.removeprefix(prefix).split(".")[0] in parts
        factored = isinstance(modules.get(name), (KroneckerLinear, KroneckerEmbedding))
        if factored and modules[name] is model.get_output_embeddings():
            return f"{key!r} is left over: their output head is not tied; load them with tie_word_embeddings=False"
        if known and leaf in (("weight",) if factored else ("A", "B", "words")):
            return f"{key!r} is left over; {remedy}"
    for key, found, wanted in sorted(info["mismatched_keys"]):
        if key.endswith((".A", ".B", ".words")):
            return f"{key!r} has shape {tuple(found)}, not {tuple(wanted)}; {remedy}"
    embedding: Any = model.get_input_embeddings()
    if isinstance(embedding, KroneckerEmbedding) and embedding.frequent is not None:
        words = embedding.frequent.words
        ascending = words.is_meta or bool((words[1:] > words[:-1]).all())
        if not ascending or (not words.is_meta and (words[0] < 0 or words[-1] >= embedding.num_embeddings)):
            return f"the frequent words are not ascending indices of {embedding.num_embeddings} words; save them anew"
    return None
