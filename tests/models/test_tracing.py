"""Traced and exported models run at every shape, as the dense model's do, whatever the gradient mode."""

import io

import onnxruntime
import pytest
import torch
from students import student
from tiny import inputs
from torch import nn

import kronecker_transformers as kt

pytestmark = [
    # the sizes of factors, which are the same in every call; a size that is not would show in the outputs below
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Using len to get tensor shape:torch.jit.TracerWarning"),
    # that tracing is an old way to export, which is why it is tested
    pytest.mark.filterwarnings("ignore:.torch.jit.trace.*deprecated:DeprecationWarning:torch.jit._trace"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning:torch.onnx"),
    # tracing and its exporter look at every attribute of the stock classes, and index with tensors in them
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:Exporting aten..index operator:UserWarning:torch.onnx"),
]

# low rank, several terms, rows of several words; the larger factor first and last
BERT_PLANS = [
    "7.7x",
    {"embeddings.word_embeddings": (64, 8, 2), "encoder.layer.*.attention.self.*": (16, 8, 3)},
    {
        "embeddings.word_embeddings": (8, 4, 3), "encoder.layer.*.attention.self.*": (2, 16),
        "encoder.layer.*.intermediate.dense": (32, 8, 2), "encoder.layer.1.output.dense": (32, 1, 6),
    },
]  # fmt: skip
GPT2_PLANS = [
    "kngpt2",
    {"wte": (8, 16, 2), "h.*.attn.c_attn": (4, 4, 3), "h.*.mlp.c_proj": (16, 96, 1), "h.*.mlp.c_fc": (96, 1, 5)},
]
MODELS = [(kt.KroneckerBertModel, plan) for plan in BERT_PLANS]
MODELS += [(kt.KroneckerBertForMaskedLM, plan) for plan in BERT_PLANS[1:]]
MODELS += [(kt.KroneckerBertForSequenceClassification, BERT_PLANS[0])]
MODELS += [(kt.KroneckerGPT2LMHeadModel, plan) for plan in GPT2_PLANS]
SHAPES = [(3, 11), (1, 5), (2, 7), (1, 1), (3, 4)]


class Positional(nn.Module):
    """Token ids and mask in, the first output out, as tools that trace want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        cache = {"use_cache": False} if "GPT2" in type(self.model).__name__ else {}
        return self.model(input_ids=ids, attention_mask=mask, return_dict=False, **cache)[0]


def wrapped(model_class, plan):
    model = student(model_class, plan=plan)
    # transformers itself cannot be traced for ONNX with SDPA by every torch
    model.set_attn_implementation("eager")
    ids, mask = inputs(model).values()
    return Positional(model).eval(), [(ids[:batch, :length], mask[:batch, :length]) for batch, length in SHAPES]


ALL = pytest.mark.parametrize(("model_class", "plan"), MODELS, ids=lambda value: getattr(value, "__name__", None))
GRADIENTS = pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])


@ALL
@GRADIENTS
def test_traced(model_class, plan, gradients):
    model, batches = wrapped(model_class, plan)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, batches[0])  # which checks its own graph, without gradients
        for batch in batches:
            torch.testing.assert_close(traced(*batch), model(*batch), rtol=1e-5, atol=1e-6)
    for batch in batches:
        traced(*batch).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in batches:
        model(*batch).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@ALL
@GRADIENTS
def test_exported_by_the_exporter_that_traces(model_class, plan, gradients):
    model, batches = wrapped(model_class, plan)
    file = io.BytesIO()
    axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}
    with torch.set_grad_enabled(gradients):
        torch.onnx.export(model, batches[0], file, dynamo=False, input_names=["ids", "mask"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for ids, mask in batches:
        (found,) = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(ids, mask).detach(), rtol=1e-4, atol=1e-5)
