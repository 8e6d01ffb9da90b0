"""LoRA on factored layers, by PEFT.

    student = get_peft_model(student, lora_config(student, r=8, task_type="SEQ_CLS"))
    student.save_pretrained("adapter")
    student = load_adapter(student_without_it, "adapter")

PEFT's own `target_modules="all-linear"` looks for `nn.Linear` and finds no factored layer. An adapter that was trained
on factored layers fits the dense twin too, where stock PEFT loads and merges it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .models.factor_plan import FactorPlan
from .models.kronecker_layers import KroneckerEmbedding, KroneckerLinear
from .models.kronecker_matching import matched_plan


def lora_config(model: PreTrainedModel, **options: Any) -> LoraConfig:
    """A configuration of LoRA for all linear layers of the base model, factored and dense ones.

    Args:
        model: factored.
        options: of `peft.LoraConfig`, `r` and `task_type` among them; `target_modules` if not all layers are wanted.

    Returns:
        For `peft.get_peft_model` or the model's own `add_adapter`.

    Raises:
        ValueError: an option for which an embedding would have to be one matrix.
    """
    _check_embeddings(model, options)
    if options.get("target_modules", "all-linear") == "all-linear":
        options["target_modules"] = sorted(_linear_layers(model))
    options.setdefault("fan_in_fan_out", any(isinstance(m, Conv1D) for m in model.modules()))  # of dense layers
    return _registered(LoraConfig(**options))


def _check_embeddings(model: PreTrainedModel, options: dict[str, Any]) -> None:
    head: Any = model.get_output_embeddings()
    refused = ["target_modules"] + ["modules_to_save"] * bool(getattr(head, "tied", None))
    for name in (name for name, module in model.named_modules() if isinstance(module, KroneckerEmbedding)):
        if options.get("trainable_token_indices"):
            raise ValueError(
                f"trainable_token_indices needs an embedding of one matrix, and {name} has factors; leave it out"
            )
        for option in refused:
            given = options.get(option) or ()
            if not isinstance(given, str) and any(f".{name}".endswith(f".{end}") for end in given):
                raise ValueError(
                    f"{option} names {name}, an embedding of factors, which takes no adapter, nor a copy of its own "
                    "where an output head is tied to it; leave it out"
                )


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str], **options: Any) -> PeftModel:
    """A factored model with an adapter that was saved.

    Args:
        model: factored, as when the adapter was trained; its layers are changed in place.
        folder: of the adapter, or its name on the Hub.
        options: of `peft.PeftModel.from_pretrained`, `is_trainable` among them.

    Raises:
        ValueError: the adapter is not LoRA.
    """
    name = os.fspath(folder)
    where = {key: options[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in options}
    config: Any = PeftConfig.from_pretrained(name, **where)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{name!r} holds an adapter of kind {config.peft_type}; factored layers take LoRA alone")
    return PeftModel.from_pretrained(model, name, config=_registered(config), **options)


def merge_adapter(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The factored model with its adapter multiplied in, and the plan that it now has in its config.

    A product of rank R and one of rank r are one of rank R + r, so low-rank layers can be merged. No other sum has a
    single shape.

    Args:
        model: with active adapters, of `get_peft_model` or of its own `add_adapter`; it is used up.

    Returns:
        The model without PEFT's layers; it can be saved.

    Raises:
        ValueError: an adapted layer is not of low rank or would have too many terms (nothing is changed), or an
            adapter's numbers are not finite.
    """
    merged: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted: list[tuple[str, Any]] = [(name, m) for name, m in merged.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        if isinstance(base := layer.get_base_layer(), KroneckerLinear):
            _check_low_rank(base, name)
            rank = sum(layer.r.get(adapter, 0) for adapter in layer.active_adapters)
            most = min(base.in_features, base.out_features)
            if base.terms + rank > most:
                raise ValueError(
                    f"{name} of {base.terms} terms and its adapter of rank {rank} would have more than {most} terms, "
                    "the most that a plan allows; keep the adapter apart, or train one of a smaller rank"
                )
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        merged.set_submodule(name, layer.get_base_layer())
    for name, layer in list(merged.named_modules()):  # a head that was trained with the adapter
        if isinstance(layer, AuxiliaryTrainingWrapper):
            merged.set_submodule(name, layer.unload_and_optionally_merge_module(True, True, None))
    if "peft_config" in vars(merged):
        del merged.peft_config
    merged._hf_peft_config_loaded = False  # else adapters alone would be saved
    base, plan = merged.base_model, {}
    layers = dict(base.named_modules())
    for name, entry in matched_plan(base, merged.config.factor_plan).items():
        plan[name] = replace(entry, terms=layers[name].terms) if name in layers else entry
    merged.config.factor_plan = FactorPlan(plan).to_dict()
    return merged


def _check_low_rank(layer: KroneckerLinear, name: str = "a factored layer") -> None:
    if not (layer.n1 == layer.m2 == 1 or layer.m1 == layer.n2 == 1):
        raise ValueError(
            f"{name} with (m1, n1, terms) = {(layer.m1, layer.n1, layer.terms)} and its adapter have no product of one "
            "shape; keep the adapter apart, or merge it into the dense twin (kronecker-transformers export --format "
            "dense), which takes the same adapter"
        )


def _linear_layers(model: PreTrainedModel) -> Iterator[str]:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, module in model.base_model.named_modules():
        if isinstance(module, (KroneckerLinear, nn.Linear, Conv1D)):
            yield prefix + name


_STARTS = (True, False, "gaussian", "eva")
"""Initial values of an adapter that do not need the weight as a matrix."""


def _registered(config: LoraConfig) -> LoraConfig:
    if config.init_lora_weights not in _STARTS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs the matrix of a layer, which a factored one does "
            f"not hold; choose from {', '.join(map(str, _STARTS))}"
        )
    config._register_custom_module({KroneckerLinear: LoraKroneckerLinear})
    return config


class LoraKroneckerLinear(LoraLinear):
    """y = (sum over r of A_r (x) B_r) x + bias + s lora_B lora_A x.

    PEFT makes it for each adapted layer. DoRA and other variants, which need W, are refused by PEFT.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone."""
        return {(): None}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        base: Any = self.get_base_layer()
        A = base.A
        for part in (self.lora_A, self.lora_B):
            if adapter_name in part:
                part[adapter_name].to(device or A.device, A.dtype if A.is_floating_point() else None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter's product to a low-rank layer.

        Raises:
            ValueError: the layer is not of low rank, or the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                layer: Any = self.get_base_layer()
                _check_low_rank(layer)
                A, B = self._with_adapter(layer, name)
                if safe_merge and not (A.isfinite().all() and B.isfinite().all()):
                    raise ValueError(f"the adapter {name} has numbers that are not finite; train it again")
                self._set_factors(layer, A, B)
                if self.lora_bias[name]:
                    layer.bias.data += self.lora_B[name].bias * self.scaling[name]
                self.merged_adapters.append(name)

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: PEFT sets `weight`, which a factored layer does not have.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "PEFT cannot unload an adapter from factored layers; merge it with kronecker_transformers.adapters."
            "merge_adapter, or load the model again without it"
        )

    def unmerge(self) -> None:
        """Take the adapters out again, the last one first."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            layer: Any = self.get_base_layer()
            self._set_factors(layer, layer.A.data[:, : -self.r[name]], layer.B.data[:, : -self.r[name]])
            if self.lora_bias[name]:
                layer.bias.data -= self.lora_B[name].bias * self.scaling[name]

    def _with_adapter(self, layer: KroneckerLinear, name: str) -> tuple[Tensor, Tensor]:
        parts: Any = self.lora_A[name], self.lora_B[name]
        down, up = parts[0].weight, parts[1].weight * self.scaling[name]  # (r, n), (m, r)
        A, B = layer.A.data, layer.B.data
        more = up[:, :, None], down[None]
        if layer.n1 != 1 or layer.m2 != 1:  # A (1, R, n), B (m, R, 1) instead of A (m, R, 1), B (1, R, n)
            more = more[1], more[0]
        return torch.cat([A, more[0].to(A)], 1), torch.cat([B, more[1].to(B)], 1)

    @staticmethod
    def _set_factors(layer: KroneckerLinear, A: Tensor, B: Tensor) -> None:
        layer.A, layer.B = (nn.Parameter(x.detach().contiguous(), requires_grad=False) for x in (A, B))
        layer.terms = A.shape[1]
