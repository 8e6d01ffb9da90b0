"""Triton's kernels against the dense product in float64: on a GPU where there is one, else interpreted."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton is for Linux")

from kronecker_transformers import KroneckerLinear, compress, kernels  # noqa: E402
from kronecker_transformers.kernels import triton_linear  # noqa: E402
from kronecker_transformers.models import kronecker_layers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# largest difference from float64 relative to the largest entry: a few units of rounding
TOLERANCES = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Triton's interpreter multiplies the bits of bfloat16, as if they were integers
DTYPES = [dtype for dtype in TOLERANCES if DEVICE == "cuda" or dtype != torch.bfloat16]
HALF = DTYPES[-1]
# (m1, n1, m2, n2, terms): A or B large, fewer small indices in the input or in the output, terms, odd sizes
SHAPES = {
    "attention": (24, 24, 2, 2, 1),
    "FFN up": (8, 2, 24, 24, 1),
    "FFN down": (2, 8, 24, 24, 1),
    "A large, odd": (19, 17, 2, 3, 1),
    "A large, wide small factor": (40, 16, 1, 9, 1),
    "A large, terms": (20, 17, 3, 2, 3),
    "B large, odd": (3, 5, 33, 70, 1),
    "B large, terms": (5, 3, 24, 18, 2),
    "no small indices": (1, 1, 20, 16, 1),
    "terms without small indices": (20, 16, 1, 1, 5),
}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def factors(shape, tokens, dtype=torch.float32):
    """x, A, B, bias."""
    m1, n1, m2, n2, terms = shape
    sizes = ((tokens, n1 * n2), (m1, terms, n1), (m2, terms, n2), (m1 * m2,))
    return [torch.randn(size, device=DEVICE).to(dtype).requires_grad_() for size in sizes]


def dense(x, A, B, bias):
    """The same in float64, with W written down."""
    x, A, B, bias = (value.detach().double().cpu().requires_grad_() for value in (x, A, B, bias))
    W = sum(torch.kron(A[:, r], B[:, r]) for r in range(A.shape[1]))
    return x @ W.T + bias, (x, A, B, bias)


def assert_close(found, wanted, dtype):
    assert found.shape == wanted.shape
    difference = (found.detach().double().cpu() - wanted.detach()).abs().max()
    assert difference <= TOLERANCES[dtype] * wanted.detach().abs().max()


def check(shape, tokens, dtype):
    inputs = factors(shape, tokens, dtype)
    y, (expected, leaves) = triton_linear.linear(*inputs), dense(*inputs)
    assert y.dtype == dtype
    assert_close(y, expected, dtype)
    g = torch.randn_like(y)
    found, wanted = torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, leaves, g.double().cpu())
    for gradient, reference, leaf in zip(found, wanted, inputs, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, reference, dtype)


@ALL_SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_are_those_of_the_dense_product(shape, dtype):
    check(shape, 37, dtype)


@settings(max_examples=12)
@given(
    st.tuples(st.integers(16, 40), st.integers(16, 40)), st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 3), st.booleans(), st.sampled_from([1, 7, 13, 97]), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(large, small, terms, a_is_large, tokens, dtype):
    if min(small) * terms > triton_linear.FEWEST:
        terms = 1
    (m1, n1), (m2, n2) = (large, small) if a_is_large else (small, large)
    if terms > min(m1 * n1, m2 * n2):
        terms = 1
    check((m1, n1, m2, n2, terms), tokens, dtype)


def test_tokens_beyond_one_share_and_more_than_one_block():
    check((17, 16, 2, 2, 1), 300, torch.float32)
    check((3, 2, 40, 35, 1), 150, torch.float32)


@ALL_SHAPES
def test_any_strides_and_leading_dimensions(shape):
    x, A, B, bias = factors(shape, 6)
    plain = triton_linear.linear(x, A, B, bias)
    wide = torch.randn(2, 3, 2 * x.shape[1], device=DEVICE)
    wide[..., ::2] = x.detach().reshape(2, 3, -1)
    # not bit by bit: what multiplies the tiles may round their rows differently
    found = triton_linear.linear(wide[..., ::2], A, B, bias)
    assert_close(found, plain.reshape(2, 3, -1).double().cpu(), torch.float32)
    row = x.detach()[0]
    assert_close(triton_linear.linear(row, A, B, bias), plain[0].double().cpu(), torch.float32)
    found = triton_linear.linear(row.expand(4, -1), A, B, bias)
    assert_close(found, plain[:1].expand(4, -1).double().cpu(), torch.float32)
    narrow = bias.detach().repeat_interleave(2)[::2]
    assert not narrow.is_contiguous()
    assert torch.equal(triton_linear.linear(x, A, B, narrow), plain)
    one = torch.ones(1, device=DEVICE).expand(len(bias))
    assert torch.equal(triton_linear.linear(x, A, B, one), triton_linear.linear(x, A, B, one.clone()))
    transposed = A.detach().transpose(0, 2).contiguous().transpose(0, 2)
    y = triton_linear.linear(x, transposed.requires_grad_(), B, None)
    assert torch.equal(y, triton_linear.linear(x, A, B, None))
    g = torch.randn_like(y).t().contiguous().t()
    assert torch.equal(*(torch.autograd.grad((triton_linear.linear(x, a, B, None) * g).sum(), a)[0]
                         for a in (transposed, A)))  # fmt: skip


@ALL_SHAPES
def test_results_do_not_change_from_run_to_run(shape):
    inputs = factors(shape, 50)
    first, second = (torch.autograd.grad(triton_linear.linear(*inputs).square().sum(), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_an_operator_as_pytorch_wants_it(bias):
    x, A, B, b = factors((24, 24, 2, 2, 1), 5)
    torch.library.opcheck(triton_linear.linear, (x, A, B, b if bias else None))


def test_backward_keeps_nothing_but_the_inputs():
    x, A, B, bias = factors((8, 2, 24, 24, 1), 11)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        triton_linear.linear(x, A, B, bias)
    assert sorted(kept) == sorted(t.data_ptr() for t in (x, A, B))


def test_what_it_is_not_made_for_is_left_to_pytorch():
    for shape in ((40, 1, 1, 30, 4), (16, 16, 17, 17, 2), (7, 5, 2, 3, 1), (24, 24, 33, 2, 1)):
        assert triton_linear.kronecker_linear(*factors(shape, 3)) is None, shape
    good = (24, 24, 2, 2, 1)
    assert triton_linear.kronecker_linear(*factors(good, 3)) is not None
    assert triton_linear.kronecker_linear(*factors(good, 0)) is None
    assert triton_linear.kronecker_linear(*factors(good, 3, torch.float64)) is None
    x, A, B, bias = factors(good, 3)
    assert triton_linear.kronecker_linear(x.half(), A, B, bias) is None


class Counted:
    """The kernel, and how often it was of use."""

    def __init__(self):
        self.uses = 0

    def __call__(self, *args):
        y = triton_linear.kronecker_linear(*args)
        self.uses += y is not None
        return y


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, registered for the device of these tests."""
    monkeypatch.setattr(kronecker_layers, "_kernels", {})
    counted = Counted()
    kronecker_layers.register_kernel(DEVICE, counted)
    return counted


def test_a_layer_uses_it_also_under_autocast(kernel):
    layer = KroneckerLinear(48, 48, 24, 24).to(DEVICE)
    x = torch.randn(5, 48, device=DEVICE)
    assert_close(layer(x), x.double().cpu() @ layer.to_dense().double().cpu().T, torch.float32)
    with torch.autocast(DEVICE, HALF):
        y = layer(x)
    assert y.dtype == HALF
    assert_close(y, x.double().cpu() @ layer.to_dense().double().cpu().T, HALF)
    y.float().square().sum().backward()
    assert layer.A.grad.dtype == torch.float32
    assert kernel.uses == 2


def test_a_model_uses_it_and_learns_with_it(kernel):
    import tiny
    from transformers import BertForSequenceClassification

    teacher = tiny.teacher(BertForSequenceClassification, hidden_size=32, intermediate_size=64)
    plan = {"encoder.layer.*.attention.self.*": (16, 16, 1), "encoder.layer.*.intermediate.dense": (4, 2, 1)}
    model = compress(teacher, plan).model.to(DEVICE).train()
    kernel.uses = 0
    batch = {"input_ids": torch.randint(1, 60, (3, 7), device=DEVICE), "labels": torch.tensor([0, 1, 0], device=DEVICE)}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def step():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    assert kernel.uses == 4 * teacher.config.num_hidden_layers
    kronecker_layers.register_kernel(DEVICE, None)
    plain_loss, plain_gradients = step()
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_torch_compile_keeps_it_in_one_graph(kernel):
    layer = KroneckerLinear(48, 48, 24, 24).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 33):
        x = torch.randn(tokens, 48, device=DEVICE, requires_grad=True)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)))


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests above compile")
def test_kernels_compile_for_tensor_cores():
    """Without a GPU Triton can still compile for one (an H100); interpreted kernels may hold what it cannot."""
    script = textwrap.dedent("""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from kronecker_transformers.kernels import triton_kernels

        def build(name, element, absent=(), **sizes):
            constants = {"NS": 2, "NQ": 8, "NR": 1, "S2": 2, "Q2": 8, "R2": 1, "PRECISION": "ieee",
                         "ROWS": 64, "COLUMNS": 64, "DEPTH": 32, **sizes, **dict.fromkeys(absent)}
            pointers = dict.fromkeys(("x", "L", "S", "bias", "y", "other", "u", "v"), f"*{element}")
            kernel = getattr(triton_kernels, name)
            types = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, "partial": "*fp32"}
            types |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names},
                               {name: value for name, value in constants.items() if name in kernel.arg_names})
            return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

        for element in ("bf16", "fp32"):
            for arguments in (("mix_after", element, ("other",)), ("mix_after", element, ("y", "bias")),
                              ("mix_before", element), ("large_gradient", element)):
                assert ("mma" in build(*arguments)) == (element != "fp32"), arguments
        assert "mma" in build("mix_after", "fp32", ("other",), PRECISION="tf32")
    """)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tf32_follows_pytorch_by_its_old_and_its_new_setting(monkeypatch):
    assert not triton_linear._tf32()
    if not hasattr(torch.backends, "fp32_precision"):
        return
    try:
        torch.backends.fp32_precision = "tf32"
        assert triton_linear._tf32()
    finally:
        torch.backends.fp32_precision = "none"
    old = type("Settings", (), {"allow_tf32": True})
    monkeypatch.setattr(torch.backends.cuda, "matmul", old)
    assert triton_linear._tf32()


def test_registering(monkeypatch):
    monkeypatch.setattr(kronecker_layers, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="there is none"):
        kernels.register()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels.register()
    assert kronecker_layers._kernels == {"cuda": triton_linear.kronecker_linear}
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        kernels.register()
