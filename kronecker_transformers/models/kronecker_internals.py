"""All that relies on private parts of transformers, each with its reason; a test says when one may go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

LARGEST_LACK = 2**26
"""Values that a checkpoint may lack whatever its size, to be drawn anew: a config may ask for more than there is."""


def is_watched(model: nn.Module) -> bool:
    """Whether a forward hook looks into the model, apart from those by which transformers collects hidden states.

    Those stay on a model once it was asked for hidden states, and only their name tells them from a user's hooks.
    """
    hooks = (
        hook
        for module in model.modules()
        if module is not model
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


class WeightsError(ValueError):
    """Weights that do not fit their config."""


class RefusesHollowCheckpoints:
    """Mixin before a `PreTrainedModel`: does not make a model of which a checkpoint holds hardly anything.

    transformers draws what a checkpoint lacks, however much it is, and has no public place to look at it before.
    """

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Iterable[str], *args: Any, **kwargs: Any) -> Any:
        """As the stock method, which makes what a checkpoint lacks.

        Raises:
            WeightsError: the checkpoint lacks most of a large model: its config belongs to another one.
        """
        model: Any = self
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        lacking = sum(sizes.get(key, 0) for key in missing_keys)
        if lacking > max(LARGEST_LACK, sum(sizes.values()) / 2):
            raise WeightsError(
                f"the weights lack {lacking:,} of the {sum(sizes.values()):,} values that the config asks for, "
                f"{min(missing_keys)!r} first; restore the config.json that was saved with them"
            )
        stock: Any = super()
        return stock._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)
