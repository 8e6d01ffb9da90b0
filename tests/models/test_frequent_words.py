"""Embeddings whose frequent words have a product of low rank of their own, and the heads that are tied to them."""

import pytest
import torch
from oracles import kronecker_sum
from safetensors.torch import load_file, save_file
from students import student
from torch import nn

import kronecker_transformers as kt
from kronecker_transformers import KroneckerEmbedding
from kronecker_transformers.models.factor_plan import FactorEntry, FactorPlan
from kronecker_transformers.models.kronecker_internals import WeightsError

WORDS = torch.tensor([1, 4, 5, 9, 22, 23])


def embedding(m1=24, n1=2, terms=3, padding_idx=None):
    torch.manual_seed(0)
    own = {"frequent": 6, "frequent_terms": 4}
    layer = KroneckerEmbedding(24, 10, m1, n1, terms, padding_idx, dtype=torch.float64, **own)
    layer.frequent.words.copy_(WORDS)
    return layer


def oracle(layer):
    """The weight, entry by entry."""
    W, own = kronecker_sum(layer.A, layer.B), kronecker_sum(layer.frequent.A, layer.frequent.B)
    for row, word in zip(own, layer.frequent.words.tolist(), strict=True):
        W[word] += row
    return W


@pytest.mark.parametrize("m1", [24, 8], ids=["a row of A for each word", "words in groups"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_those_of_the_weight(m1, dtype):
    layer = embedding(m1)
    W = oracle(layer)
    indices = torch.randint(24, (5, 7)).to(dtype)
    torch.testing.assert_close(layer(indices), W[indices.long()], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(indices.t()), W[indices.long().t()], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.to_dense(), W, rtol=1e-12, atol=1e-12)
    assert layer(torch.empty(0, 3, dtype=dtype)).shape == (0, 3, 10)


def test_gradients_are_those_of_the_weight():
    layer, indices, along = embedding(), torch.randint(24, (30,)), torch.randn(30, 10, dtype=torch.float64)
    factors = [layer.A, layer.B, layer.frequent.A, layer.frequent.B]
    found = torch.autograd.grad((layer(indices) * along).sum(), factors)
    product = torch.einsum("irj,krl->ikjl", *factors[:2]).reshape(24, 10)
    W = product.index_add(0, WORDS, torch.einsum("irj,krl->ikjl", *factors[2:]).reshape(6, 10))
    expected = torch.autograd.grad((W[indices] * along).sum(), factors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_padding_word_gives_no_gradient_and_starts_at_zero():
    layer = embedding(padding_idx=4)
    layer(torch.tensor([4, 4])).sum().backward()
    assert not layer.frequent.A.grad.any()
    fresh = KroneckerEmbedding(24, 10, 24, 1, 3, 2, frequent=6, frequent_terms=4)  # for the first six words
    assert not fresh(torch.tensor([2])).any()
    assert fresh(torch.tensor([3])).any()


def test_nearest_factors_spend_them_on_the_words_that_need_them():
    torch.manual_seed(0)
    W = torch.randn(24, 2) @ torch.randn(2, 10)
    W[WORDS] += 3 * torch.randn(6, 4) @ torch.randn(4, 10)
    dense = nn.Embedding.from_pretrained(W)
    layer = KroneckerEmbedding.from_embedding(dense, 24, 1, 2, 6, 6)
    assert layer.entry == (24, 1, 2, 6, 6)
    plain = KroneckerEmbedding.from_embedding(dense, 24, 1, 2)
    assert (layer.to_dense() - W).norm() < 0.75 * (plain.to_dense() - W).norm()
    assert not layer.A.requires_grad
    assert not layer.frequent.A.requires_grad
    lost = (plain.to_dense() - W).norm(dim=1)
    assert set(layer.frequent.words.tolist()) == set(lost.topk(6).indices.tolist())


@pytest.mark.parametrize("model_class", [kt.KroneckerBertForMaskedLM, kt.KroneckerGPT2LMHeadModel])
def test_a_tied_head_has_the_weight_of_the_embedding(model_class):
    model = student(model_class, dtype=torch.float64)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    h = torch.randn(2, 3, 32, dtype=torch.float64)
    expected = h @ oracle(table).t() + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(head(h), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.to_dense(), oracle(table), rtol=1e-12, atol=1e-12)
    keys = [name for name, _ in model.named_parameters() if ".frequent." in name]
    assert len(keys) == 2  # they are the embedding's alone


@pytest.mark.parametrize("model_class", [kt.KroneckerBertForMaskedLM, kt.KroneckerGPT2LMHeadModel])
def test_the_twin_is_tied_and_as_large_as_described(model_class):
    model = student(model_class)
    twin = kt.to_dense(model)
    assert twin.config.tie_word_embeddings
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert twin.num_parameters() == kt.describe(model).dense.parameters


def test_a_head_follows_another_embedding():
    model, other = student(kt.KroneckerGPT2LMHeadModel), student(kt.KroneckerGPT2LMHeadModel)
    table = other.get_input_embeddings()
    with torch.no_grad():
        table.frequent.A.mul_(3)
    model.set_input_embeddings(table)
    model.tie_weights()
    torch.testing.assert_close(model.get_output_embeddings().to_dense(), table.to_dense())
    assert FactorPlan(model.config.factor_plan)["wte"] == FactorEntry(*table.entry)


def test_words_are_saved_with_their_factors(tmp_path):
    model = student(kt.KroneckerBertModel)
    model.save_pretrained(tmp_path)
    again = kt.KroneckerBertModel.from_pretrained(tmp_path)
    words = again.get_input_embeddings().frequent.words
    assert words.dtype == torch.int32
    assert torch.equal(words, model.get_input_embeddings().frequent.words)
    assert not torch.equal(words, torch.arange(10, dtype=torch.int32))
    batch = {"input_ids": torch.arange(40).reshape(2, 20)}
    assert torch.equal(again(**batch).last_hidden_state, model(**batch).last_hidden_state)
    entry = model.config.to_dict()["factor_plan"]["embeddings.word_embeddings"]
    assert entry == {"m1": 64, "n1": 8, "terms": 2, "frequent": 10, "frequent_terms": 3}
    assert model.config.to_dict()["factor_plan"]["pooler.dense"] == {"m1": 16, "n1": 16, "terms": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words.flip(0), "not ascending indices of 64 words"),
        (lambda words: words + 60, "not ascending indices of 64 words"),
        (lambda words: words - 60, "not ascending indices of 64 words"),
        (lambda words: words[:-1].clone(), "has shape"),
        (lambda words: None, "is missing"),
    ],
    ids=["descending", "too large", "below 0", "too few", "missing"],
)
def test_words_that_cannot_be_are_refused(change, message, tmp_path):
    student(kt.KroneckerBertModel).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "embeddings.word_embeddings.frequent.words"
    if (changed := change(tensors.pop(key))) is not None:
        tensors[key] = changed
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=message):
        kt.KroneckerBertModel.from_pretrained(tmp_path)


def test_words_that_are_cut_off_are_dropped():
    model = student(kt.KroneckerGPT2LMHeadModel)
    table = model.get_input_embeddings()
    table.frequent.words.copy_(torch.arange(60, 72))
    before = table.to_dense().detach()
    model.resize_token_embeddings(64)
    assert table.frequent.words.tolist() == [60, 61, 62, 63]
    assert table.entry == (64, 16, 2, 4, 4)
    assert FactorPlan(model.config.factor_plan)["wte"] == FactorEntry(*table.entry)
    torch.testing.assert_close(table.to_dense(), before[:64])
    model.resize_token_embeddings(50)
    assert table.frequent is None
    torch.testing.assert_close(table.to_dense(), before[:50])
    assert FactorPlan(model.config.factor_plan)["wte"].frequent == 0


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"m1": 64, "n1": 1, "frequent": 5}, ValueError, "frequent=5 and frequent_terms=0 .* must both be >= 1"),
        ({"m1": 64, "n1": 1, "frequent": -1, "frequent_terms": 2}, ValueError, "frequent=-1 .* must be >= 0"),
        ({"m1": 64, "n1": 1, "frequent": 2.5, "frequent_terms": 2}, TypeError, "frequent=2.5 .* must be an integer"),
        ((64, 1, 1, 65, 2), ValueError, "frequent=65 must be <= 64, the number of rows"),
        ((64, 1, 1, 40, 33), ValueError, r"frequent_terms=33 must be <= 32 = min\(frequent, n\)"),
        ((64, 1, 1, 4), TypeError, r"must be \(m1, n1, terms\), \(m1, n1, terms, frequent, frequent_terms\)"),
    ],
)
def test_bad_entries(entry, error, message):
    with pytest.raises(error, match=message):
        student(kt.KroneckerBertModel, {"embeddings.word_embeddings": entry})


@pytest.mark.parametrize("own", [(25, 2), (-1, 2), (3, 0), (0, 2)])
def test_a_layer_takes_both_numbers_or_none(own):
    with pytest.raises(ValueError, match=f"frequent={own[0]} must be from 0 to 24, .* frequent_terms={own[1]}"):
        KroneckerEmbedding(24, 10, 24, 1, frequent=own[0], frequent_terms=own[1])


def test_only_embeddings_have_words():
    with pytest.raises(ValueError, match=r"frequent=4 is for embeddings, but pooler\.dense is a Linear; leave it out"):
        student(kt.KroneckerBertModel, {"pooler.dense": (16, 16, 1, 4, 2)})


def test_parameters_are_counted():
    entry = FactorEntry(64, 1, 3, 10, 5)
    assert entry.parameters(64, 32) == 3 * (64 + 32) + 5 * (10 + 32)
    model = student(kt.KroneckerBertModel, {"embeddings.word_embeddings": entry})
    assert sum(p.numel() for p in model.get_input_embeddings().parameters()) == entry.parameters(64, 32)
    report = kt.describe(model)
    assert report.dense.parameters - report.factored.parameters == 64 * 32 - entry.parameters(64, 32)
    with_words, without = (model.num_parameters(exclude_embeddings=flag) for flag in (False, True))
    assert with_words - without >= entry.parameters(64, 32)
