"""What the models of both families share: building from the plan, tying, resizing, initialising, loading."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .kronecker_layers import KroneckerEmbedding, KroneckerLinear


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
        with torch.device("meta"):  # the dense skeleton costs no memory
            super().__init__(config, *args, **kwargs)
            if self.base_model is self:
                self._factor_layers()
            else:
                setattr(self, self.base_model_prefix, self._make_base_model())
                self._tie_head()
            self.post_init()
        if device.type != "meta":
            self.to_empty(device=device)
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

    def _tie_head(self) -> None:
        """Let the output head use the factors of a factored embedding."""
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if head is None or not self.config.tie_word_embeddings or not isinstance(embedding, KroneckerEmbedding):
            return
        names = {module: name for name, module in self.named_modules()}
        source, target = names[embedding], names[head]
        ties = {key: value for key, value in self._tied_weights_keys.items() if key != f"{target}.weight"}
        self._tied_weights_keys = {**ties, **{f"{target}.{factor}": f"{source}.{factor}" for factor in "AB"}}
        tied = KroneckerLinear.tied_to(embedding, bias=head.bias is not None)
        self.set_output_embeddings(tied)
        if tied.bias is not None:
            # BERT has just made it the bias of its predictions too; the stock class ties the two after loading
            tied.bias = nn.Parameter(torch.empty_like(tied.bias))

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

        Every row of A stands for m2 words, so the new size must be a multiple of m2. New rows of A are drawn as the
        stock method draws new words: the words are linear in them.

        Raises:
            ValueError: the new size is not a multiple of m2, or too small for the terms; nothing has changed then.
        """
        embedding = self.get_input_embeddings()
        if not isinstance(embedding, KroneckerEmbedding):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        m2 = embedding.B.shape[0]
        if size < 1 or size % m2:
            raise ValueError(
                f"new_num_tokens={size} must be a positive multiple of m2={m2}, the words per row of A; "
                f"pass pad_to_multiple_of={m2}"
            )

        name = next(name for name, module in self.base_model.named_modules() if module is embedding)
        old_rows, new_rows = embedding.A.shape[0], size // m2
        self.config.resize_embedding(name, size, new_rows)  # refuses before anything has changed
        rows = self._get_resized_embeddings(_rows_of_a(embedding), new_rows, None, mean_resizing).weight.detach()
        if not mean_resizing:  # drawn with the standard deviation of a word; turn it into that of a row of A
            rows[old_rows:] *= embedding.B[:, 0].numel() ** 0.5 / torch.linalg.vector_norm(embedding.B.detach())
        embedding.A.data = rows.unflatten(-1, embedding.A.shape[1:])  # in place, as in the stock method: ties hold
        embedding.A.grad = None
        embedding.num_embeddings = size
        if embedding.padding_idx is not None and embedding.padding_idx >= size:
            embedding.padding_idx = None

        head = self.get_output_embeddings()
        if isinstance(head, KroneckerLinear):
            head.out_features = size
            if head.bias is not None:
                head.bias.data = nn.functional.pad(head.bias.data, (0, size - head.bias.numel()))
                head.bias.grad = None
        elif head is not None:
            head = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
            self.set_output_embeddings(head)
            if head.bias is not None:
                # BERT has just made it the bias of its predictions too; loading an untied model keeps them apart
                head.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=head.bias.requires_grad)
        self.tie_weights()
        return embedding

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
        if problem := _misfit(info):
            raise ValueError(
                f"the weights in {source!r} do not fit the factor plan in its config: {problem}; "
                "restore the config.json that was saved with them, and do not override its sizes"
            )
        for key, found, wanted in info["mismatched_keys"]:
            if not ignore_mismatched_sizes:
                raise RuntimeError(
                    f"{key!r} in {source!r} has shape {tuple(found)}, not {tuple(wanted)}; "
                    "pass ignore_mismatched_sizes=True to draw it anew"
                )
        return (model, info) if output_loading_info else model


def _misfit(info: dict[str, Any]) -> str | None:
    """What is wrong with the factors of a checkpoint, from the loading info; None if nothing is.

    A pooler may be missing or left over as a whole: models without one share checkpoints with models that have one.
    """
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    for keys in (missing, unexpected):
        pooler = {key for key in keys if key.rpartition(".")[0].endswith("pooler.dense")}
        if {key.rpartition(".")[2] for key in pooler} == {"A", "B", "bias"}:
            keys -= pooler
    missing_from, left_over_from = ({key.rpartition(".")[0] for key in keys} for keys in (missing, unexpected))
    for key in sorted(missing | unexpected):
        module, _, leaf = key.rpartition(".")
        if leaf in ("A", "B") or (module in missing_from and module in left_over_from):
            return f"{key!r} is {'missing' if key in missing else 'left over'}"
    for key, found, wanted in sorted(info["mismatched_keys"]):
        if key.endswith((".A", ".B")):
            return f"{key!r} has shape {tuple(found)}, not {tuple(wanted)}"
    return None


def _rows_of_a(embedding: KroneckerEmbedding) -> nn.Embedding:
    """The rows of A, (m1, R n1), as a stock embedding of their own."""
    return nn.Embedding.from_pretrained(embedding.A.detach().flatten(1))
