"""Small factored models of every class, built on the spot."""

from importlib.util import find_spec

import pytest
import torch
from tiny import as_family, family_config, model_type, perturb

from kronecker_transformers.models import DENSE_CLASSES, kronecker_matching

# terms > 1, low rank and frequent words beside the presets, so that no path is left out
BERT_PLAN = {
    "embeddings.word_embeddings": (64, 8, 2, 10, 3),
    "encoder.layer.0.attention.self.*": (16, 8, 3),
    "encoder.layer.1.intermediate.dense": (96, 1, 6),
    "encoder.layer.1.output.dense": (2, 8),
    "encoder.layer.2.attention.output.dense": (4, 4, 2),
    "pooler.dense": (16, 16),
}
GPT2_PLAN = {
    "wte": (72, 16, 2, 12, 4),
    "h.1.attn.c_attn": (48, 32),
    "h.1.mlp.*": (4, 2, 3),
    "h.2.attn.c_proj": (32, 1, 5),
}
MODELS = list(DENSE_CLASSES)
CAN_EXPORT = hasattr(torch.onnx, "ops") and find_spec("transformers.exporters.onnxruntime_fusions") is not None
"""Whether torch and transformers are new enough for ONNX Runtime."""
ALL_MODELS = pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)


def student(model_class, plan=None, dtype=torch.float32, **changes):
    name = model_type(model_class)
    if plan is None:
        plan = GPT2_PLAN if name == "gpt2" else as_family(BERT_PLAN, name)
    if "QuestionAnswering" in model_class.__name__:
        changes = {"id2label": None, "label2id": None, **changes}
    config = model_class.config_class.from_dense(family_config(name, **changes), plan)
    model = perturb(model_class(config)).to(dtype).eval()
    frequent = getattr(model.get_input_embeddings(), "frequent", None)
    if frequent is not None:
        order = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(0))
        frequent.words.copy_(order[: frequent.m1].sort().values)
    return model


def base_model(config):
    """On the meta device."""
    with torch.device("meta"):
        return config.base_class(config)


def factorable_modules(config):
    """Weight shape of what a plan may name."""
    return kronecker_matching.factorable_modules(base_model(config))


def factored_modules(config):
    """Entry of what its plan factors."""
    return kronecker_matching.matched_plan(base_model(config), config.factor_plan)


def first_output(output):
    return next(value for key, value in output.items() if key not in ("loss", "past_key_values"))


ONE_OF_EACH_KIND = {
    "BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
    "BertForQuestionAnswering", "BertForMultipleChoice", "GPT2LMHeadModel", "MPNetModel", "ElectraForPreTraining",
}  # fmt: skip
"""Stock classes whose long tests are in the default run."""
LONG_TESTS = [
    cls if cls.__name__ in ONE_OF_EACH_KIND else pytest.param(cls, marks=pytest.mark.slow)
    for cls in DENSE_CLASSES.values()
]
"""All stock classes, for long tests."""
