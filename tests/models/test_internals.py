"""What relies on private parts of transformers is still needed, and still fits; when one of these fails, it may go."""

import inspect

import torch
from students import student
from transformers import BertModel, PreTrainedModel

import kronecker_transformers as kt
from kronecker_transformers.models.kronecker_internals import is_watched


def test_hooks_of_transformers_stay_and_bear_the_name_by_which_they_are_told_apart():
    model = student(kt.KroneckerBertModel)
    assert not is_watched(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(ids, output_hidden_states=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks, "transformers leaves no hooks: is_watched need not know their name any longer"
    assert not is_watched(model)
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert is_watched(model)


def test_transformers_makes_what_a_checkpoint_lacks_in_this_method():
    method = PreTrainedModel._move_missing_keys_from_meta_to_device
    assert list(inspect.signature(method).parameters)[:2] == ["self", "missing_keys"]
    assert "_move_missing_keys_from_meta_to_device" in inspect.getsource(PreTrainedModel)
    assert BertModel._move_missing_keys_from_meta_to_device is method
