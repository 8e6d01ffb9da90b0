import copy
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kronecker_sum
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from kronecker_transformers import KroneckerEmbedding, KroneckerLinear
from kronecker_transformers.models import kronecker_contraction
from kronecker_transformers.models.kronecker_contraction import multiplications
from kronecker_transformers.models.kronecker_layers import kronecker_embedding, kronecker_linear

# (m1, n1, m2, n2, terms): every contraction order and form, pairwise distinct sizes
SHAPES = {
    "B first, large A": (7, 5, 2, 3, 1),
    "B first, large A, terms": (9, 8, 2, 3, 4),
    "B first, large B": (3, 2, 11, 13, 1),
    "B first, large B, terms": (3, 2, 11, 13, 5),
    "A first, large B": (2, 3, 13, 11, 1),
    "A first, large B, terms": (2, 3, 13, 11, 5),
    "A first, large A": (9, 8, 5, 2, 1),
    "A first, large A, terms": (9, 8, 5, 2, 3),
    "low rank": (12, 1, 1, 10, 4),
    "low rank, transposed": (1, 10, 12, 1, 4),
    "B a column": (6, 10, 2, 1, 1),
    "B a column, terms": (6, 10, 2, 1, 2),
    "B a row": (14, 3, 1, 4, 1),
    "B a row, terms": (14, 3, 1, 4, 3),
    "A a column": (5, 1, 2, 7, 2),
    "wide shared matrix": (2, 3, 40, 30, 2),
    "scalar factors": (1, 1, 4, 6, 1),
}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def linear(shape, bias=True, dtype=torch.float64):
    m1, n1, m2, n2, terms = shape
    layer = KroneckerLinear(n1 * n2, m1 * m2, m1, n1, terms, bias=bias, dtype=dtype)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def embedding(shape, padding_idx=None, dtype=torch.float64):
    m1, n1, m2, n2, terms = shape
    return KroneckerEmbedding(m1 * m2, n1 * n2, m1, n1, terms, padding_idx, dtype=dtype)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


class TestLinear:
    @ALL_SHAPES
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_plain_loop(self, shape, bias):
        layer = linear(shape, bias)
        W = kronecker_sum(layer.A, layer.B)
        x = torch.randn(6, layer.in_features, dtype=torch.float64)
        expected = x @ W.T + (layer.bias if bias else 0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.to_dense(), W, rtol=1e-12, atol=1e-12)

    @ALL_SHAPES
    @pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
    def test_leading_dimensions(self, shape, leading):
        layer = linear(shape)
        x = torch.randn(*leading, layer.in_features, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.to_dense(), layer.bias), rtol=1e-12, atol=1e-12)
        assert y.is_contiguous()
        y.sum().backward()
        assert x.grad.shape == x.shape

    @ALL_SHAPES
    def test_non_contiguous_input(self, shape):
        layer = linear(shape)
        n, W = layer.in_features, layer.to_dense()
        for x in (
            torch.randn(n, 3, dtype=torch.float64).t(),
            torch.randn(3, 2 * n, dtype=torch.float64)[:, ::2],
            torch.randn(4, 3, n, dtype=torch.float64).transpose(0, 1),
            torch.randn(1, n, dtype=torch.float64).expand(5, n),
        ):
            torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), rtol=1e-12, atol=1e-12)

    @ALL_SHAPES
    def test_gradients(self, shape):
        layer = linear(shape)
        x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
        parameters = [p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.bias)]
        assert torch.autograd.gradcheck(kronecker_linear, (x, *parameters))

    @pytest.mark.parametrize(
        "shape", [SHAPES["B first, large A"], SHAPES["A first, large A, terms"], SHAPES["low rank"]], ids=str
    )
    def test_gradients_of_all_kinds(self, shape):
        layer = linear(shape)
        x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
        inputs = (x, *(p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.bias)))
        assert torch.autograd.gradgradcheck(kronecker_linear, inputs)
        assert torch.autograd.gradcheck(kronecker_linear, inputs, check_forward_ad=True, check_batched_grad=True)

    @ALL_SHAPES
    def test_in_blocks_of_tokens(self, shape, monkeypatch):
        layer = linear(shape)
        x = torch.randn(7, layer.in_features, dtype=torch.float64, requires_grad=True)
        inputs = (x, layer.A, layer.B, layer.bias)
        whole = layer(x)
        direction = torch.randn_like(whole)
        expected = torch.autograd.grad(whole, inputs, direction)
        monkeypatch.setattr(kronecker_contraction, "TOKENS_AT_A_TIME", 3)
        torch.testing.assert_close(layer(x), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(layer(x), inputs, direction), expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), whole, rtol=1e-12, atol=1e-12)

    @ALL_SHAPES
    def test_frozen_parts_get_no_gradient(self, shape):
        layer = linear(shape)
        x = torch.randn(4, layer.in_features, dtype=torch.float64, requires_grad=True)
        parts = {"x": x, "A": layer.A, "B": layer.B, "bias": layer.bias}
        expected = dict(zip(parts, torch.autograd.grad(layer(x).square().sum(), parts.values()), strict=True))
        for name, part in parts.items():
            for other in parts.values():
                other.requires_grad_(other is part)
            layer(x).square().sum().backward()
            torch.testing.assert_close(part.grad, expected[name], rtol=1e-12, atol=1e-12)
            assert [key for key, other in parts.items() if other.grad is not None] == [name]
            part.grad = None

    @ALL_SHAPES
    def test_keeps_only_its_inputs_for_the_gradients(self, shape):
        layer = linear(shape)
        x = torch.randn(4, layer.in_features, dtype=torch.float64, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            layer(x)
        inputs = {x.data_ptr(), layer.A.data_ptr(), layer.B.data_ptr()}
        between = [t for t in kept if t.data_ptr() not in inputs]
        assert {t.data_ptr() for t in kept} >= inputs
        if 1 in (layer.m1, layer.n1) and 1 in (layer.m2, layer.n2):  # of low rank: as many entries as it has terms
            assert [t.numel() for t in between] == [len(x) * layer.terms]
        else:
            assert not between

    @ALL_SHAPES
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
    )
    def test_precision(self, shape, dtype, tolerance):
        layer = linear(shape, dtype=dtype)
        x = torch.randn(5, layer.in_features, dtype=dtype)
        expected = x.double() @ kronecker_sum(layer.A, layer.B).T + layer.bias.double()
        y = layer(x)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= tolerance * expected.norm()
        y.float().sum().backward()
        assert layer.A.grad.dtype == dtype

    @ALL_SHAPES
    def test_autocast(self, shape):
        layer = linear(shape, dtype=torch.float32)
        x = torch.randn(5, layer.in_features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        expected = layer(x)
        assert (y - expected).norm() <= 3e-2 * expected.norm()
        y.float().sum().backward()
        assert layer.A.grad.dtype == layer.B.grad.dtype == torch.float32

    def test_preset_orders(self):
        # BERT-base, 7.7x: attention, FFN up and down; each needs the order that leaves the small factor the large side
        assert multiplications(384, 384, 2, 2, 1) == (296_448, 296_448)
        assert multiplications(8, 2, 384, 384, 1)[0] == 301_056
        assert multiplications(2, 8, 384, 384, 1)[1] == 301_056
        assert multiplications(8, 2, 384, 384, 1)[0] < multiplications(8, 2, 384, 384, 1)[1]

    @ALL_SHAPES
    def test_takes_the_cheaper_order(self, shape):
        m1, n1, m2, n2, terms = shape
        layer = linear(shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(6, n1 * n2, dtype=torch.float64))
        b_first = n1 * n2 * m2 + m2 * n1 * m1
        a_first = n2 * n1 * m1 + m1 * n2 * m2
        assert counter.get_total_flops() == 2 * 6 * terms * min(b_first, a_first)

    @pytest.mark.parametrize(("shape", "batched"), [((24, 20, 2, 2, 1), True), ((60, 2, 10, 10, 1), False)], ids=str)
    def test_only_a_small_factor_has_a_gradient_for_each_token(self, shape, batched):
        layer = linear(shape, dtype=torch.float32)
        shapes = set()

        class Shapes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                shapes.update(tuple(t.shape) for t in [result] if isinstance(t, torch.Tensor))
                return result

        with Shapes():
            layer(torch.randn(50, layer.in_features)).sum().backward()
        m2, n2 = shape[2:4]
        assert ((50, m2, n2) in shapes) == batched

    @pytest.mark.parametrize(
        "shape", [(24, 20, 8, 12, 2), (4, 3, 48, 80, 1), (3, 4, 80, 48, 1), (40, 36, 6, 2, 1)], ids=str
    )
    def test_never_forms_the_product(self, shape):
        layer = linear(shape, dtype=torch.float32)
        x = torch.randn(2, layer.in_features, requires_grad=True)
        with LargestTensor() as largest:
            layer(x).sum().backward()
        assert layer.A.grad is not None
        assert largest.entries < layer.in_features * layer.out_features / 4

    @pytest.mark.parametrize(
        "shape", [SHAPES["B first, large A, terms"], SHAPES["low rank"], SHAPES["B a row, terms"]], ids=str
    )
    def test_large_factors_are_used_where_they_lie(self, shape):
        layer = linear(shape)
        addresses = {layer.A.data_ptr(), layer.B.data_ptr()}
        used = set()

        class Addresses(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
                    used.update(arg.data_ptr() for arg in args)
                return func(*args, **(kwargs or {}))

        with Addresses(), torch.no_grad():
            layer(torch.randn(3, layer.in_features, dtype=torch.float64))
        assert addresses <= used

    def test_initialisation_has_the_asked_variance(self):
        for m1, n1, terms in ((48, 30, 1), (48, 30, 40), (240, 180, 1), (8, 3, 2), (480, 1, 25)):
            layer = KroneckerLinear(360, 480, m1, n1, terms)
            layer.init_factors(0.02)
            assert layer.to_dense().std().item() == pytest.approx(0.02, rel=0.08)
            assert layer.to_dense().mean().item() == pytest.approx(0, abs=0.002)
            assert not layer.bias.any()

    @ALL_SHAPES
    def test_from_linear_with_enough_terms_is_exact(self, shape):
        m1, n1, m2, n2, _ = shape
        dense = nn.Linear(n1 * n2, m1 * m2, dtype=torch.float64)
        layer = KroneckerLinear.from_linear(dense, m1, n1, min(m1 * n1, m2 * n2))
        x = torch.randn(4, n1 * n2, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)

    def test_from_conv1d_counts_outputs_first(self):
        conv = Conv1D(12, 10).double()
        nn.init.normal_(conv.bias)
        layer = KroneckerLinear.from_conv1d(conv, 6, 10, 2)
        assert (layer.in_features, layer.out_features) == (10, 12)
        x = torch.randn(2, 3, 10, dtype=torch.float64)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-12, atol=1e-12)

    def test_from_linear_without_bias_keeps_dtype_and_grad(self):
        dense = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
        layer = KroneckerLinear.from_linear(dense, 2, 3)
        assert layer.bias is None
        assert layer.A.dtype == layer.B.dtype == torch.bfloat16
        assert layer.A.requires_grad

    @torch.no_grad()
    def test_from_conv1d_without_gradients_can_be_trained(self):
        layer = KroneckerLinear.from_conv1d(Conv1D(12, 10), 6, 10)
        assert all(parameter.requires_grad for parameter in layer.parameters())

    def test_from_frozen_layer_in_evaluation_mode(self):
        layer = KroneckerLinear.from_linear(nn.Linear(6, 4).requires_grad_(False).eval(), 2, 3)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not layer.training

    def test_repr(self):
        layer = KroneckerLinear(15, 14, 7, 5, 2, bias=False)
        assert repr(layer) == (
            "KroneckerLinear(in_features=15, out_features=14, A=(7, 5), B=(2, 3), terms=2, bias=False)"
        )


class TestEmbedding:
    @ALL_SHAPES
    @pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0,), (2, 0)], ids=str)
    def test_equals_plain_loop(self, shape, leading):
        layer = embedding(shape)
        W = kronecker_sum(layer.A, layer.B)
        indices = torch.randint(layer.num_embeddings, leading)
        torch.testing.assert_close(layer(indices), W[indices], rtol=1e-12, atol=1e-12)

    @ALL_SHAPES
    def test_gradients(self, shape):
        layer = embedding(shape)
        indices = torch.randint(layer.num_embeddings, (7,))
        parameters = [p.detach().clone().requires_grad_() for p in (layer.A, layer.B)]
        assert torch.autograd.gradcheck(lambda A, B: kronecker_embedding(indices, A, B), parameters)

    @pytest.mark.parametrize("shape", [(12, 3, 1, 4, 1), (12, 3, 1, 4, 2), (6, 3, 2, 4, 2)], ids=str)
    def test_padding_gives_no_gradient(self, shape):
        layer = embedding(shape, padding_idx=3)
        indices = torch.tensor([[3, 5, 3], [1, 3, 11]])
        weights = torch.randn(2, 3, layer.embedding_dim, dtype=torch.float64)
        (layer(indices) * weights).sum().backward()
        padded = [layer.A.grad.clone(), layer.B.grad.clone()]

        twin = embedding(shape)
        twin.load_state_dict(layer.state_dict())
        (twin(indices) * weights * (indices != 3).unsqueeze(-1)).sum().backward()
        torch.testing.assert_close(padded, [twin.A.grad, twin.B.grad])
        torch.testing.assert_close(layer(indices), twin(indices))

    @pytest.mark.parametrize("terms", [1, 3])
    def test_autocast_keeps_the_dtype_of_the_table(self, terms):
        layer = embedding((12, 3, 1, 4, terms), dtype=torch.float32)
        indices = torch.arange(12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = layer(indices)
        assert torch.equal(rows, layer(indices))

    def test_padding_row_starts_at_zero(self):
        layer = embedding((12, 3, 1, 4, 2), padding_idx=-1)
        assert layer.padding_idx == 11
        assert not layer(torch.tensor(11)).any()
        assert layer(torch.tensor(10)).any()

    def test_index_out_of_range(self):
        for shape in ((12, 3, 1, 4, 1), (6, 3, 2, 4, 1)):
            for index in (12, -1):
                with pytest.raises(IndexError):
                    embedding(shape)(torch.tensor([index]))

    def test_from_embedding_with_enough_terms_is_exact(self):
        dense = nn.Embedding(12, 10, padding_idx=2, dtype=torch.float64)
        nn.init.normal_(dense.weight)
        layer = KroneckerEmbedding.from_embedding(dense, 12, 2, 5)
        indices = torch.arange(12)
        torch.testing.assert_close(layer(indices), dense(indices), rtol=1e-12, atol=1e-12)
        assert layer.padding_idx == 2

    @pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
    def test_from_embedding_refuses_what_it_cannot_keep(self, option):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not supported"):
            KroneckerEmbedding.from_embedding(nn.Embedding(12, 10, **option), 12, 2)

    def test_one_contiguous_row_per_word(self):
        layer = embedding((12, 3, 1, 4, 2))
        assert layer.A[5].is_contiguous()
        assert layer.A.stride(0) == layer.A[5].numel()

    def test_never_forms_the_product(self):
        layer = embedding((300, 6, 1, 8, 1))
        with LargestTensor() as largest:
            layer(torch.tensor([1, 7])).sum().backward()
        assert largest.entries <= layer.A.numel() < 300 * 48 / 4

    def test_repr(self):
        assert repr(embedding((12, 3, 1, 4, 2), padding_idx=1)) == (
            "KroneckerEmbedding(num_embeddings=12, embedding_dim=12, A=(12, 3), B=(1, 4), terms=2, padding_idx=1)"
        )


class TestTiedHead:
    @pytest.mark.parametrize("shape", [(12, 3, 1, 4, 1), (12, 3, 1, 4, 2), (12, 1, 1, 8, 5), (6, 3, 2, 4, 2)], ids=str)
    def test_logits_come_from_the_embedding(self, shape):
        table = embedding(shape)
        head = KroneckerLinear.tied_to(table)
        assert head.A is table.A
        assert head.B is table.B
        h = torch.randn(2, 3, table.embedding_dim, dtype=torch.float64)
        torch.testing.assert_close(head(h), h @ kronecker_sum(table.A, table.B).T, rtol=1e-12, atol=1e-12)

    def test_both_uses_add_up_in_the_gradient(self):
        table = embedding((12, 3, 1, 4, 2))
        head = KroneckerLinear.tied_to(table)
        indices = torch.tensor([1, 5, 5])
        head(table(indices)).square().sum().backward()

        A, B = (p.detach().clone().requires_grad_() for p in (table.A, table.B))
        W = torch.einsum("irj,krl->ikjl", A, B).reshape(12, 12)
        (W[indices] @ W.T).square().sum().backward()
        torch.testing.assert_close([table.A.grad, table.B.grad], [A.grad, B.grad])

    def test_never_forms_the_product(self):
        head = KroneckerLinear.tied_to(embedding((300, 6, 1, 8, 1)))
        with LargestTensor() as largest:
            head(torch.randn(2, 48, dtype=torch.float64)).sum().backward()
        assert largest.entries <= head.A.numel() < 300 * 48 / 4


LAYERS = {
    "linear": lambda: (linear((9, 8, 2, 3, 4), dtype=torch.float32), torch.randn(5, 24)),
    "embedding": lambda: (embedding((12, 3, 1, 4, 2), 3, torch.float32), torch.randint(12, (5,))),
    "head": lambda: (KroneckerLinear.tied_to(embedding((12, 3, 1, 4, 2), dtype=torch.float32)), torch.randn(5, 12)),
}
ALL_LAYERS = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


class TestTools:
    @ALL_LAYERS
    @pytest.mark.parametrize(
        "backend",
        ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))],
    )
    def test_compiles_without_graph_breaks(self, make, backend):
        layer, x = make()
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
        for rows in (5, 3):
            torch.testing.assert_close(compiled(x[:rows]), layer(x[:rows]), rtol=1e-5, atol=1e-6)

    @ALL_LAYERS
    def test_exports_with_a_dynamic_batch(self, make):
        layer, x = make()
        program = torch.export.export(
            layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
        )
        more = torch.cat([x, x[:2]])
        torch.testing.assert_close(program.module()(more), layer(more))

    @ALL_LAYERS
    def test_deepcopy_and_pickle(self, make):
        layer, x = make()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.A is not layer.A
            assert torch.equal(twin(x), layer(x))

    @ALL_LAYERS
    def test_meta_device(self, make):
        layer, x = make()
        twin = copy.deepcopy(layer).to("meta")
        y = twin(x.to("meta"))
        assert y.shape == layer(x).shape
        assert y.device.type == "meta"

    def test_built_on_meta_without_memory(self):
        with torch.device("meta"):
            layer = KroneckerLinear(1 << 20, 1 << 20, 1 << 15, 1 << 15)
        assert layer.A.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KroneckerLinear(15, 14, 4, 5), r"m1=4 .* positive divisor of 14; choose one"),
        (lambda: KroneckerLinear(15, 14, 7, 4), r"n1=4 .* positive divisor of 15"),
        (lambda: KroneckerLinear(15, 14, 0, 5), r"m1=0 .* positive divisor"),
        (lambda: KroneckerLinear(15, 14, 7, -5), r"n1=-5 .* positive divisor"),
        (lambda: KroneckerLinear(15, 14, 7, 5, 0), r"terms=0 must be >= 1"),
        (lambda: KroneckerLinear(0, 14, 7, 5), r"n1=5 .* positive divisor of 0"),
        (lambda: linear((7, 5, 2, 3, 1))(torch.zeros(4, 10)), r"input has 10 features, not n1 n2 = 5 \* 3 = 15"),
        (lambda: KroneckerLinear(15, 14, 7, 5, -2), r"terms=-2 must be >= 1"),
        (lambda: KroneckerEmbedding(12, 10, 5, 2), r"m1=5 .* positive divisor of 12"),
        (lambda: KroneckerEmbedding(12, 10, 12, 2, padding_idx=12), r"padding_idx=12 must be an index into 12"),
    ],
)
def test_bad_shapes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KroneckerLinear(12, 12, 2.0, 2), r"m1=2\.0 in KroneckerLinear must be an integer"),
        (lambda: KroneckerLinear(12, 12, 2, "2"), "n1='2' in KroneckerLinear must be an integer"),
        (lambda: KroneckerEmbedding(12, 12, 2, 2, True), "terms=True in KroneckerEmbedding must be an integer"),
        (lambda: KroneckerLinear.from_linear(Conv1D(12, 6), 2, 3), "type Conv1D must be an nn.Linear"),
        (lambda: KroneckerLinear.from_conv1d(nn.Linear(12, 6), 2, 3), "type Linear must be a Conv1D"),
    ],
)
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def laid_out(x, layout):
    """The same values, elsewhere in memory, or for the last one the first row for all."""
    tokens, n = x.shape
    return {
        "contiguous": lambda: x,
        "strided": lambda: torch.stack([x, x], -1)[..., 0],
        "transposed": lambda: x.t().contiguous().t(),
        "three dimensions": lambda: x.reshape(tokens, 1, n).expand(tokens, 2, n),
        "expanded": lambda: x[:1].expand(tokens, n),
    }[layout]()


def check_random_layer(m1, n1, m2, n2, terms, tokens, dtype, layout, seed):
    torch.manual_seed(seed)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    layer = linear((m1, n1, m2, n2, terms), dtype=dtype)
    x = laid_out(torch.randn(tokens, n1 * n2).to(dtype), layout).requires_grad_()
    dy = torch.randn(*x.shape[:-1], m1 * m2).to(dtype)
    inputs = (x, layer.A, layer.B, layer.bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def dense(x, A, B, bias):
        return x @ torch.einsum("irj,krl->ikjl", A, B).reshape(m1 * m2, n1 * n2).T + bias

    # relative to what the sums add up in size, so that cancellation does not fail a correct layer
    sizes = [tensor.detach().abs().requires_grad_() for tensor in exact]
    y, expected, scale = layer(x), dense(*exact), dense(*sizes)
    gradients = torch.autograd.grad(y, inputs, dy)
    exact_gradients = torch.autograd.grad(expected, exact, dy.double())
    scales = torch.autograd.grad(scale, sizes, dy.double().abs())
    for found, wanted, size in zip((y, *gradients), (expected, *exact_gradients), (scale, *scales), strict=True):
        assert (found.double() - wanted).norm() <= tolerance * size.norm() + 1e-30
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)

    table = embedding((m1, n1, m2, n2, terms), dtype=dtype)
    indices = torch.randint(m1 * m2, (tokens,))
    rows = kronecker_sum(table.A, table.B)[indices]
    scale = kronecker_sum(table.A.abs(), table.B.abs())[indices].norm() + 1e-30
    assert ((table(indices).double() - rows).norm() / scale).item() < tolerance


SIZES = st.integers(1, 5)
TOKENS = st.sampled_from([0, 1, 2, 7, 13])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "strided", "transposed", "three dimensions", "expanded"])


@settings(max_examples=150)
@given(
    SIZES,
    SIZES,
    SIZES,
    SIZES,
    st.integers(1, 4),
    TOKENS,
    DTYPES,
    LAYOUTS,
    st.integers(0, 99),
)
def test_random_shapes(m1, n1, m2, n2, terms, tokens, dtype, layout, seed):
    check_random_layer(m1, n1, m2, n2, terms, tokens, dtype, layout, seed)


WIDE = st.integers(1, 13)


@pytest.mark.slow
@settings(max_examples=1500)
@given(
    WIDE, WIDE, WIDE, WIDE, st.integers(1, 9), st.sampled_from([0, 1, 7, 31, 1025, 1531]), DTYPES, LAYOUTS,
    st.integers(0, 9999),
)  # fmt: skip
def test_random_shapes_wide(m1, n1, m2, n2, terms, tokens, dtype, layout, seed):
    check_random_layer(m1, n1, m2, n2, terms, tokens, dtype, layout, seed)
