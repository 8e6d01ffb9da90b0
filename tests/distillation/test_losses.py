"""Every term against a plain loop over sequences, heads and positions in Python floats."""

import math

import pytest
import torch
from scipy.spatial.distance import cosine

from kronecker_transformers.distillation import losses
from kronecker_transformers.distillation.by_rows import ENTRIES, by_rows

LENGTHS = (7, 4, 1)
SEQUENCES, LENGTH, HEADS, HEAD_SIZE, CLASSES = len(LENGTHS), 7, 3, 5, 6
MASK = torch.tensor([[int(i < n) for i in range(LENGTH)] for n in LENGTHS])


def pair(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def softmax(row):
    top = max(row)
    exponentials = [math.exp(x - top) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def kl(student, teacher, temperature=1.0):
    p = softmax([x / temperature for x in teacher])
    q = softmax([x / temperature for x in student])
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def visible(n, causal):
    return [(i, j) for i in range(n) for j in range(i + 1 if causal else n)]


def assert_per_sequence(found, expected):
    torch.testing.assert_close(found, torch.tensor(list(expected), dtype=torch.float64))


def test_hidden_state_mse():
    s, t = pair(SEQUENCES, LENGTH, 4)
    expected = [
        mean((float(s[b, i, k]) - float(t[b, i, k])) ** 2 for i in range(n) for k in range(4))
        for b, n in enumerate(LENGTHS)
    ]
    assert_per_sequence(losses.hidden_state_mse(s, t, MASK), expected)


def test_attention_scores():
    q, k = pair(SEQUENCES, LENGTH, HEADS * HEAD_SIZE)
    found = losses.attention_scores(q, k, HEADS, 0.3)
    assert found.shape == (SEQUENCES, HEADS, LENGTH, LENGTH)
    for b, h, i, j in [(0, 0, 0, 6), (1, 2, 3, 1), (2, 1, 6, 0)]:
        units = range(h * HEAD_SIZE, (h + 1) * HEAD_SIZE)
        assert float(found[b, h, i, j]) == pytest.approx(0.3 * sum(float(q[b, i, d] * k[b, j, d]) for d in units))


def test_relation_scores():
    three = [pair(SEQUENCES, LENGTH, HEADS * HEAD_SIZE, seed=seed)[0] for seed in range(3)]
    found = losses.relation_scores(*three, HEADS)
    assert found.shape == (SEQUENCES, 3 * HEADS, LENGTH, LENGTH)
    for kind, b, h, i, j in [(0, 0, 0, 0, 6), (1, 1, 2, 3, 1), (2, 2, 1, 6, 0)]:
        x, units = three[kind], range(h * HEAD_SIZE, (h + 1) * HEAD_SIZE)
        expected = sum(float(x[b, i, d] * x[b, j, d]) for d in units) / HEAD_SIZE**0.5
        assert float(found[b, kind * HEADS + h, i, j]) == pytest.approx(expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_mse(causal):
    s, t = pair(SEQUENCES, HEADS, LENGTH, LENGTH)
    expected = [
        mean((float(s[b, h, i, j]) - float(t[b, h, i, j])) ** 2 for h in range(HEADS) for i, j in visible(n, causal))
        for b, n in enumerate(LENGTHS)
    ]
    assert_per_sequence(losses.attention_mse(s, t, MASK, causal), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_kl(causal):
    s, t = pair(SEQUENCES, HEADS, LENGTH, LENGTH)
    expected = [
        mean(
            kl(s[b, h, i, : i + 1 if causal else n].tolist(), t[b, h, i, : i + 1 if causal else n].tolist())
            for h in range(HEADS)
            for i in range(n)
        )
        for b, n in enumerate(LENGTHS)
    ]
    assert_per_sequence(losses.attention_kl(s, t, MASK, causal), expected)


def test_pooled_distance():
    s, t = pair(SEQUENCES, 4)
    expected = []
    for u, v in zip(s.tolist(), t.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(u, v, strict=True))
        expected.append(1 - dot / math.sqrt(sum(a * a for a in u) * sum(a * a for a in v)))
    assert_per_sequence(losses.pooled_distance(s, t), expected)


def test_similarity_kl():
    s, t = pair(SEQUENCES, 4)
    mine, theirs = s.numpy(), t.numpy()
    expected = [
        kl(*([1 - cosine(x[b], theirs[c]) for c in range(SEQUENCES)] for x in (mine, theirs)), temperature=0.05)
        for b in range(SEQUENCES)
    ]
    assert_per_sequence(losses.similarity_kl(s, t), expected)
    nothing = torch.zeros(SEQUENCES, dtype=s.dtype)
    torch.testing.assert_close(losses.similarity_kl(3 * t, t), nothing)  # cosines know no lengths
    torch.testing.assert_close(losses.similarity_kl(s[:1], t[:1]), nothing[:1])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_kl(temperature):
    s, t = pair(SEQUENCES, CLASSES)
    expected = [temperature**2 * kl(s[b].tolist(), t[b].tolist(), temperature) for b in range(SEQUENCES)]
    assert_per_sequence(losses.logit_kl(s, t, temperature), expected)


LABELS = torch.tensor([[0, -100, 5, 2], [-100, -100, -100, -100], [3, 1, -100, 0]])
BY_ROWS = {
    "logit_kl": (lambda s, t: losses.logit_kl(s, t, 2.0), (SEQUENCES, LENGTH, CLASSES)),
    "token_logit_kl": (lambda s, t: losses.token_logit_kl(s, t, MASK), (SEQUENCES, LENGTH, CLASSES)),
    "attention_mse": (lambda s, t: losses.attention_mse(s, t, MASK), (SEQUENCES, HEADS, LENGTH, LENGTH)),
    "attention_kl": (lambda s, t: losses.attention_kl(s, t, MASK), (SEQUENCES, HEADS, LENGTH, LENGTH)),
    "causal": (lambda s, t: losses.attention_kl(s, t, MASK, True), (SEQUENCES, HEADS, LENGTH, LENGTH)),
    "supervised_classes": (lambda s, t: losses.supervised_classes(s, LABELS, 0.1), (3, 4, CLASSES)),
}


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("name", BY_ROWS)
def test_gradients_that_are_found_by_rows(name, rows, monkeypatch):
    """Against finite differences, with all rows in a block or in several."""
    loss, shape = BY_ROWS[name]
    row = math.prod(shape[1:] if name in ("attention_mse", "attention_kl", "causal") else shape[-1:])
    monkeypatch.setitem(ENTRIES, "cpu", rows * row)
    s, t = pair(*shape)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.requires_grad_())
    (found,) = torch.autograd.grad(loss(s, t).sum(), s)
    (half,) = torch.autograd.grad(loss(lower := s.detach().bfloat16().requires_grad_(), t).sum(), lower)
    torch.testing.assert_close(half.double(), found, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_small_gradients_are_kept_by_the_scale_of_the_loss(dtype):
    """In float16, 1e-9 is 0."""
    x = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    loss = by_rows(lambda rows: (1e-9 * losses.wide(rows).sum(-1), torch.full_like(losses.wide(rows), 1e-9)), x)
    (found,) = torch.autograd.grad(2.0**20 * loss.sum(), x)
    torch.testing.assert_close(found, torch.full((4, 3), 2.0**20 * 1e-9, dtype=dtype))


def test_logit_binary_kl():
    s, t = pair(SEQUENCES, CLASSES)
    expected = [
        4 * mean(kl([float(s[b, c]), 0.0], [float(t[b, c]), 0.0], 2.0) for c in range(CLASSES))
        for b in range(SEQUENCES)
    ]
    assert_per_sequence(losses.logit_binary_kl(s, t, 2.0), expected)


def test_logit_mse():
    s, t = pair(SEQUENCES, 2)
    expected = [mean((float(s[b, c]) - float(t[b, c])) ** 2 for c in range(2)) for b in range(SEQUENCES)]
    assert_per_sequence(losses.logit_mse(s, t), expected)


def test_token_logit_kl():
    s, t = pair(SEQUENCES, LENGTH, CLASSES)
    expected = [9 * mean(kl(s[b, i].tolist(), t[b, i].tolist(), 3.0) for i in range(n)) for b, n in enumerate(LENGTHS)]
    assert_per_sequence(losses.token_logit_kl(s, t, MASK, 3.0), expected)


def test_span_logit_kl():
    s, t = pair(SEQUENCES, LENGTH)
    expected = [4 * kl(s[b, :n].tolist(), t[b, :n].tolist(), 2.0) for b, n in enumerate(LENGTHS)]
    assert_per_sequence(losses.span_logit_kl(s, t, MASK, 2.0), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_supervised_classes(smoothing):
    logits, _ = pair(2, 4, CLASSES)
    labels = torch.tensor([[0, -100, 5, 2], [-100, -100, 3, -100]])
    expected = 0.0
    for b, i in (labels != -100).nonzero().tolist():
        log_p = [math.log(p) for p in softmax(logits[b, i].tolist())]
        expected -= (1 - smoothing) * log_p[labels[b, i]] + smoothing * mean(log_p)
    assert float(losses.supervised_classes(logits, labels, smoothing)) == pytest.approx(expected)


def test_supervised_binary():
    logits, _ = pair(2, CLASSES)
    labels = torch.randint(2, (2, CLASSES), generator=torch.Generator().manual_seed(0)).float()
    chances = [
        1 / (1 + math.exp(-x if y else x))
        for x, y in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True)
    ]
    assert float(losses.supervised_binary(logits, labels)) == pytest.approx(-sum(map(math.log, chances)))


def test_supervised_values():
    outputs, targets = pair(4, 1)
    expected = sum((float(a) - float(b)) ** 2 for a, b in zip(outputs, targets, strict=True))
    assert float(losses.supervised_values(outputs, targets[:, 0])) == pytest.approx(expected)


INPUTS = {
    "hidden_state_mse": (LENGTH, 4),
    "token_logit_kl": (LENGTH, CLASSES),
    "span_logit_kl": (LENGTH,),
    "attention_mse": (HEADS, LENGTH, LENGTH),
    "attention_kl": (HEADS, LENGTH, LENGTH),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rubbish", [1e4, float("inf"), float("nan")])
def test_padding_does_not_count_whatever_it_holds(name, rubbish):
    term = getattr(losses, name)
    s, t = pair(SEQUENCES, *INPUTS[name], dtype=torch.float32)
    expected = term(s, t, MASK)
    for b, n in enumerate(LENGTHS):
        for x in (s, t):
            if name.startswith("attention"):
                x[b, :, n:] = x[b, :, :, n:] = rubbish
            else:
                x[b, n:] = rubbish
    s.requires_grad_()
    found = term(s, t, MASK)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    real = MASK.bool()
    padded = ~(real[:, None, :, None] & real[:, None, None, :]) if name.startswith("attention") else ~real
    padded = padded.reshape(*padded.shape, *[1] * (s.ndim - padded.ndim)).expand_as(s)
    assert s.grad.isfinite().all()
    assert (s.grad[padded] == 0).all()


@pytest.mark.parametrize("name", [*INPUTS, "logit_kl", "logit_binary_kl", "logit_mse"])
def test_equal_inputs_give_0_and_half_precision_is_widened(name):
    shape = INPUTS.get(name, (CLASSES,))
    mask = (MASK,) if name in INPUTS else ()
    term = getattr(losses, name)
    s, t = pair(SEQUENCES, *shape, dtype=torch.bfloat16)
    torch.testing.assert_close(term(s, s.clone(), *mask), torch.zeros(SEQUENCES), atol=1e-6, rtol=0)
    found = term(s, t, *mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, term(s.float(), t.float(), *mask))
    assert (found[:2] > 0).all()  # the last sequence has one position, where a softmax has no choice


def test_a_class_that_cannot_be_chosen_adds_nothing():
    s, t = pair(SEQUENCES, CLASSES)
    expected = losses.logit_kl(s, t)
    blocked = torch.full((SEQUENCES, 1), -torch.inf, dtype=torch.float64)
    s, t = (torch.cat((x, blocked), 1).requires_grad_() for x in (s, t))
    found = losses.logit_kl(s, t)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert s.grad.isfinite().all()
