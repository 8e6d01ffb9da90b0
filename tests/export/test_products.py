import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kronecker_sum
from students import ALL_MODELS, student
from tiny import inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kronecker_transformers import KroneckerGPT2LMHeadModel, KroneckerLinear
from kronecker_transformers.export.products import KroneckerProducts, as_products, product_embedding, product_linear
from kronecker_transformers.models.kronecker_layers import KroneckerEmbedding

SHAPES = [
    (m1, n1, m2, n2) for m1, n1 in ((1, 6), (6, 1), (2, 3), (5, 4), (1, 1)) for m2, n2 in ((7, 2), (1, 5), (2, 1))
]


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize(("m1", "n1", "m2", "n2"), [*SHAPES, *((m2, n2, m1, n1) for m1, n1, m2, n2 in SHAPES)])
def test_a_layer_is_its_dense_product(m1, n1, m2, n2, terms):
    torch.manual_seed(0)
    layer = KroneckerLinear(n1 * n2, m1 * m2, m1, n1, terms)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, n1 * n2)
    expected = x.double() @ kronecker_sum(layer.A, layer.B).t() + layer.bias.double()
    with torch.no_grad():
        found = product_linear(layer)(x)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_larger_factor_is_on_the_right_and_the_cheaper_order_is_taken(data):
    m1, n1, m2, n2, terms = (data.draw(st.integers(2, 6)) for _ in range(5))
    A, B = torch.randn(m1, terms, n1), torch.randn(m2, terms, n2)
    found = KroneckerProducts(A, B, None)
    assert found.large.weight.numel() == max(A.numel(), B.numel())
    assert found.small.numel() == min(A.numel(), B.numel())
    with FlopCounterMode(display=False) as counter:
        found(torch.randn(7, n1 * n2))
    a_first, b_first = (terms * (m1 * n1 * n2 + m1 * n2 * m2), terms * (n1 * n2 * m2 + m1 * n1 * m2))
    assert counter.get_total_flops() == 2 * 7 * min(a_first, b_first)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize(("m1", "n1", "m2", "n2"), [(12, 4, 1, 3), (12, 1, 1, 5), (4, 5, 3, 2), (3, 1, 4, 6)])
def test_an_embedding_has_the_rows_of_its_dense_product(m1, n1, m2, n2, terms):
    torch.manual_seed(0)
    layer = KroneckerEmbedding(m1 * m2, n1 * n2, m1, n1, terms)
    rows = kronecker_sum(layer.A, layer.B)
    indices = torch.randperm(m1 * m2).reshape(2, -1)
    with torch.no_grad():
        found = product_embedding(layer)(indices)
    torch.testing.assert_close(found.double(), rows[indices], rtol=1e-5, atol=1e-6)


@ALL_MODELS
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_keeps_its_outputs(model_class, tied):
    model = student(model_class, tie_word_embeddings=tied)
    batch = inputs(model)
    with torch.no_grad():
        before, after = model(**batch), as_products(model)(**batch)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_words_in_groups_and_a_tied_head():
    model = student(KroneckerGPT2LMHeadModel, {"wte": (18, 16, 2)})
    batch = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(as_products(model)(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
