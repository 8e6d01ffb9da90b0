"""What the models of both families share: building from the plan, tying, resizing, initialising, loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .kronecker_layers import KroneckerEmbedding, KroneckerLinear

logger = logging.get_logger(__name__)


def factor_module(module: nn.Module, m1: int, n1: int, terms: int) -> KroneckerLinear | KroneckerEmbedding:
    """An uninitialised factored layer with the sizes of a dense one (`nn.Linear`, `Conv1D` or `nn.Embedding`)."""
    if isinstance(module, nn.Embedding):
        return KroneckerEmbedding(module.num_embeddings, module.embedding_dim, m1, n1, terms, module.padding_idx)
    if isinstance(module, Conv1D):
        return KroneckerLinear(module.nx, module.nf, m1, n1, terms, bias=True)
    if isinstance(module, nn.Linear):
        return KroneckerLinear(module.in_features, module.out_features, m1, n1, terms, bias=module.bias is not None)
    raise TypeError(
        f"module of type {type(module).__name__} cannot be factored; supported are nn.Linear, Conv1D and nn.Embedding"
    )


BLOCK = 512 * 768
"""Entries of the hidden states that go through an encoder at a time: 512 tokens of BERT-base (benchmarks/blocks.py)."""


LARGEST_LACK = 2**26
"""Values that a checkpoint may lack whatever its size, to be drawn anew: a config may ask for more than there is."""


def in_blocks(model: PreTrainedModel, forward: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Outputs of an encoder for a batch, computed for some sequences at a time where that is faster.

    That is without gradients on a CPU. The batch stays whole for a compiled model, for a decoder or whatever else has
    a cache, for forward hooks, and for masks that are no tensors.

    Args:
        model: the encoder.
        forward: the method of its stock class.
        inputs: the arguments of this method, by name.
    """
    source = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or not isinstance(source, torch.Tensor)
        or source.device.type != "cpu"
        or source.ndim < 2
        or source.shape[0] * source.shape[1] * model.config.hidden_size <= BLOCK
        or model.config.is_decoder
        or inputs.get("past_key_values") is not None
        or not isinstance(inputs.get("attention_mask"), (torch.Tensor, NoneType))
        or _is_watched(model)
    ):
        return forward(**inputs)
    batch = source.shape[0]
    rows = max(1, BLOCK // (source.shape[1] * model.config.hidden_size))
    parts = {
        name: value.split(rows)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch
    }
    blocks = [dict(zip(parts, block, strict=True)) for block in zip(*parts.values(), strict=True)]
    return _joined([forward(**{**inputs, **block}) for block in blocks])


def _is_watched(model: nn.Module) -> bool:
    """Whether a forward hook looks into the model, apart from those by which transformers collects hidden states."""
    hooks = (
        hook
        for module in model.modules()
        if module is not model
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


def _joined(outputs: list[Any]) -> Any:
    """Outputs of blocks as one: tensors are joined along the batch, in tuples and model outputs too."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, tuple):
        return tuple(map(_joined, map(list, zip(*outputs, strict=True))))
    return first


class KroneckerPreTrainedModel(PreTrainedModel):
    """To stand before a stock class: builds its model with factored layers in the places of `config.factor_plan`."""

    config_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        device = torch.empty(0).device  # honours torch.device contexts and torch.set_default_device
        checkpointing = vars(config).pop("gradient_checkpointing", False)  # for the layers that will stay
        empty = _can_be_empty()
        with torch.device("meta") if empty else nullcontext():  # a dense skeleton on the meta device costs no memory
            super().__init__(config, *args, **kwargs)
            if self.base_model is self:
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
        raise NotImplementedError

    def _factor_layers(self) -> None:
        modules = dict(self.named_modules())
        for name, entry in self.config.factored_modules().items():
            parent, _, leaf = name.rpartition(".")
            if name in modules:  # a model may have been built without its pooler
                setattr(modules[parent], leaf, factor_module(modules[name], entry.m1, entry.n1, entry.terms))

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

    def _tie_head(self) -> None:
        """Make the output head one of the embedding's kind: of its factors, or dense; nothing if it is so already."""
        embedding: Any = self.get_input_embeddings()
        head, factored = self.get_output_embeddings(), isinstance(embedding, KroneckerEmbedding)
        if head is None or not self.config.tie_word_embeddings or isinstance(head, KroneckerLinear) == factored:
            return
        names = {module: name for name, module in self.named_modules()}
        source, target = names[embedding], names[head]
        ties = type(self)._tied_weights_keys
        if factored:
            ties = {key: value for key, value in ties.items() if key != f"{target}.weight"}
            ties |= {f"{target}.{factor}": f"{source}.{factor}" for factor in "AB"}
            tied: Any = KroneckerLinear.tied_to(embedding)
        else:
            tied = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
            tied.weight = embedding.weight
        self._tied_weights_keys, tied.bias = ties, head.bias
        super().set_output_embeddings(tied)
        if head.bias is not None and head.bias.is_meta:
            # BERT has just made it the bias of its predictions too; the stock class ties the two after loading
            tied.bias = nn.Parameter(torch.empty_like(head.bias))

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; a head that is tied becomes factored or dense, as the embedding is."""
        self._tie_head()
        super().tie_weights(*args, **kwargs)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As the stock method; the plan follows. As there, the head is tied anew by `tie_weights`."""
        if self.base_model is not self:
            super().set_input_embeddings(value)  # by this method of the base model
            return
        old = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is old)
        super().set_input_embeddings(value)
        factored = isinstance(value, KroneckerEmbedding)
        self.config.replace_entry(name, (value.m1, value.n1, value.terms) if factored else None)

    def set_output_embeddings(self, value: Any) -> None:
        """As the stock method; a dense head beside a factored embedding is one of its own, and the config says so."""
        super().set_output_embeddings(value)
        if isinstance(value, KroneckerLinear) or not isinstance(self.get_input_embeddings(), KroneckerEmbedding):
            return
        self.config.tie_word_embeddings = False
        self._tied_weights_keys = type(self)._tied_weights_keys
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        if value.bias is not None:
            # BERT has just made it the bias of its predictions too; loading an untied model keeps them apart
            value.bias = nn.Parameter(value.bias.detach().clone(), requires_grad=value.bias.requires_grad)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As the stock method; factored embeddings are embeddings too."""
        found: int = super().num_parameters(only_trainable, exclude_embeddings)
        if exclude_embeddings:
            tables = [module for module in self.modules() if isinstance(module, KroneckerEmbedding)]
            factors = {factor for table in tables for factor in (table.A, table.B)}
            found -= sum(factor.numel() for factor in factors if factor.requires_grad or not only_trainable)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (KroneckerLinear, KroneckerEmbedding)):
            module.init_factors(self.config.initializer_range)
        else:
            super()._init_weights(module)

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock method, which makes what a checkpoint lacks; but not a model that is hardly there.

        Raises:
            ValueError: the checkpoint lacks most of a large model: its config belongs to another one.
        """
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        lacking = sum(sizes.get(key, 0) for key in missing_keys)
        if lacking > max(LARGEST_LACK, sum(sizes.values()) / 2):
            raise ValueError(
                f"the weights lack {lacking:,} of the {sum(sizes.values()):,} values that the config asks for, "
                f"{min(missing_keys)!r} first; restore the config.json that was saved with them"
            )
        return super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """As the stock method, also for a factored embedding and the head that is tied to it; the plan follows.

        Every row of A stands for m2 words, so the new size must be a multiple of m2; with `pad_to_multiple_of` it
        becomes one. New rows of A are drawn as the stock method draws new words: the words are linear in them.

        Raises:
            ValueError: the new size is not a multiple of m2, or too small for the terms; nothing has changed then.
        """
        embedding = self.get_input_embeddings()
        if not isinstance(embedding, KroneckerEmbedding):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        size, m2 = embedding.num_embeddings if new_num_tokens is None else new_num_tokens, embedding.m2
        if pad_to_multiple_of is not None:
            multiple = math.lcm(pad_to_multiple_of, m2)
            size = -(-size // multiple) * multiple
        if size < 1 or size % m2:
            raise ValueError(
                f"new_num_tokens={size} must be a positive multiple of m2={m2}, the words per row of A; "
                f"pass pad_to_multiple_of={m2}"
            )

        name = next(name for name, module in self.base_model.named_modules() if module is embedding)
        old_rows, new_rows = embedding.m1, size // m2
        self.config.resize_embedding(name, size, new_rows)  # refuses before anything has changed
        rows = self._get_resized_embeddings(_rows_of_a(embedding), new_rows, None, mean_resizing).weight.detach()
        if not mean_resizing:  # drawn with the standard deviation of a word; turn it into that of a row of A
            rows[old_rows:] *= (m2 * embedding.n2) ** 0.5 / torch.linalg.vector_norm(embedding.B.detach())
        embedding.A.data = rows.unflatten(-1, embedding.A.shape[1:])  # in place, as in the stock method: ties hold
        embedding.A.grad = None
        embedding.num_embeddings, embedding.m1 = size, new_rows
        if embedding.padding_idx is not None and embedding.padding_idx >= size:
            embedding.padding_idx = None

        head = self.get_output_embeddings()
        if isinstance(head, KroneckerLinear):
            head.out_features, head.m1 = size, new_rows
            if head.bias is not None:
                head.bias.data = nn.functional.pad(head.bias.data, (0, size - head.bias.numel()))
                head.bias.grad = None
        elif head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, size, mean_resizing=mean_resizing))
        self.tie_weights()
        return embedding

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock method, but what the config does not describe is refused, since it could not be loaded again.

        Raises:
            ValueError: layers are not those of the plan, or the output head is not the one that the config says.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):  # then adapters alone are saved
            self._check_config()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_config(self) -> None:
        modules = dict(self.base_model.named_modules())
        planned = {name: (e.m1, e.n1, e.terms) for name, e in self.config.factored_modules().items()}
        for name, module in modules.items():
            is_factored = isinstance(module, (KroneckerLinear, KroneckerEmbedding))
            built = (module.m1, module.n1, module.terms) if is_factored else None
            if built != planned.get(name):
                raise ValueError(
                    f"module {name!r} has (m1, n1, terms) = {built}, but {planned.get(name)} in config.factor_plan "
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
        if tied and factored != isinstance(embedding, KroneckerEmbedding):
            raise ValueError(
                "config.tie_word_embeddings=True, but only one of embedding and output head is made of factors; "
                "call tie_weights(), or give the head its own weights by set_output_embeddings"
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
                "hold most of its weights and stay as they are",
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
            raise ValueError(f"the weights in {source!r} do not fit the factor plan in its config: {problem}")
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
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    for keys in (missing, unexpected):
        pooler = {key for key in keys if key.rpartition(".")[0].endswith("pooler.dense")}
        if {key.rpartition(".")[2] for key in pooler} == {"A", "B", "bias"}:
            keys -= pooler
    for key in sorted(missing):
        if key.endswith((".A", ".B")):
            return f"{key!r} is missing; {remedy}"
    for key in sorted(unexpected):
        name, _, leaf = key.rpartition(".")
        known = name in modules or key.removeprefix(prefix).split(".")[0] in parts
        factored = isinstance(modules.get(name), (KroneckerLinear, KroneckerEmbedding))
        if factored and modules[name] is model.get_output_embeddings():
            return f"{key!r} is left over: their output head is not tied; load them with tie_word_embeddings=False"
        if known and leaf in (("weight",) if factored else ("A", "B")):
            return f"{key!r} is left over; {remedy}"
    for key, found, wanted in sorted(info["mismatched_keys"]):
        if key.endswith((".A", ".B")):
            return f"{key!r} has shape {tuple(found)}, not {tuple(wanted)}; {remedy}"
    return None


def _rows_of_a(embedding: KroneckerEmbedding) -> nn.Embedding:
    """The rows of A, (m1, R n1), as a stock embedding of their own."""
    return nn.Embedding.from_pretrained(embedding.A.detach().flatten(1))
