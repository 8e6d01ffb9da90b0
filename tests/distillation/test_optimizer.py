"""The rule for the learning rates of factors."""

import pytest
import torch
from distilling import make_trainer, pair
from torch import nn
from transformers import BertForMaskedLM, GPT2LMHeadModel

from kronecker_transformers import KroneckerLinear
from kronecker_transformers.distillation import DistillationArguments
from kronecker_transformers.distillation.optimizer import (
    MuonAdamW,
    learning_rate_scales,
    orthogonalized,
    product_rms,
    scale_learning_rates,
)
from kronecker_transformers.models.kronecker_layers import KroneckerEmbedding

SHAPES = [(12, 10, 6, 5, 1), (12, 10, 2, 5, 3), (12, 10, 12, 1, 4), (8, 30, 4, 1, 2)]


def layer(m, n, m1, n1, terms):
    result = KroneckerLinear(n, m, m1, n1, terms, bias=False)
    with torch.no_grad():
        result.A.copy_(0.03 * torch.randn_like(result.A))
        result.B.copy_(7.0 * torch.randn_like(result.B) + 1)
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_of_the_product(shape):
    found = layer(*shape)
    assert product_rms(found.A, found.B) == pytest.approx(
        float(found.to_dense().detach().square().mean().sqrt()), rel=1e-5
    )


def adam(model, rate, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **{"weight_decay": 0.0, **options})
    scale_learning_rates(optimizer, model)
    return optimizer


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] == 1])
def test_a_step_of_one_factor_moves_the_product_as_far_as_a_dense_step(shape, factor):
    """The first step of Adam moves every entry by the learning rate."""
    rate = 1e-3
    dense = nn.Linear(10, 12, bias=False)
    before = dense.weight.detach().clone()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=rate, weight_decay=0.0)
    dense.weight.grad = torch.randn_like(dense.weight)
    optimizer.step()
    step = float((dense.weight.detach() - before).square().mean().sqrt())
    assert step == pytest.approx(rate, rel=1e-3)

    factored = layer(*shape)
    before = factored.to_dense().detach()
    optimizer = adam(factored, rate)
    getattr(factored, factor).grad = torch.randn_like(getattr(factored, factor))
    optimizer.step()
    assert float((factored.to_dense().detach() - before).square().mean().sqrt()) == pytest.approx(step, rel=1e-3)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_step_with_several_terms_is_shorter_by_the_spread_of_their_singular_values(factor):
    """W has the given singular values in its rearranged form, so its terms are orthogonal."""
    values = torch.tensor([4.0, 2.0, 1.0])
    left, right = torch.linalg.qr(torch.randn(6 * 5, 3)).Q, torch.linalg.qr(torch.randn(2 * 2, 3)).Q
    factored = layer(12, 10, 6, 5, 3)  # A (6, 3, 5), B (2, 3, 2)
    with torch.no_grad():
        factored.A.copy_((left * values.sqrt()).reshape(6, 5, 3).transpose(1, 2))
        factored.B.copy_((right * values.sqrt()).reshape(2, 2, 3).transpose(1, 2))
    before = factored.to_dense().detach()
    assert float(before.square().sum()) == pytest.approx(float(values.square().sum()), rel=1e-5)
    optimizer = adam(factored, 1e-4)
    getattr(factored, factor).grad = torch.randn_like(getattr(factored, factor))
    optimizer.step()
    step = float((factored.to_dense().detach() - before).square().mean().sqrt())
    assert step == pytest.approx(1e-4 * 7 / (3 * 21) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_split_of_scale_between_the_factors_does_not_matter(shape):
    x, target = torch.randn(64, shape[1]), torch.randn(64, shape[0])
    products = []
    for share in (1.0, 64.0, 1 / 64):
        torch.manual_seed(1)
        model = layer(*shape)
        with torch.no_grad():
            model.A.mul_(share)
            model.B.div_(share)
        optimizer = adam(model, 1e-2, weight_decay=0.1, eps=1e-30)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        products.append(model.to_dense().detach())
    assert (products[0] - layer(*shape).to_dense()).abs().max() > 0.05
    for other in products[1:]:
        torch.testing.assert_close(other, products[0], rtol=1e-3, atol=1e-4)


def muon(model, rate, **options):
    return MuonAdamW(adam(model, rate, **options).param_groups, model)


@pytest.mark.parametrize("make", [adam, muon])
def test_the_product_decays_as_a_dense_weight(make):
    model = layer(*SHAPES[0])
    before = model.to_dense().detach()
    optimizer = make(model, 1e-2, weight_decay=0.5)
    for factor in (model.A, model.B):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    torch.testing.assert_close(model.to_dense(), before * (1 - 1e-2 * 0.5), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense_class", [BertForMaskedLM, GPT2LMHeadModel])
def test_groups_of_the_trainer(dense_class, tmp_path):
    teacher, student = pair(dense_class)
    trainer = make_trainer(student, teacher, tmp_path, learning_rate=1e-2, weight_decay=0.1, max_steps=4)
    scales = learning_rate_scales(student)
    optimizer = trainer.create_optimizer()
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(student.parameters())
    assert {name.rpartition(".")[2] for name, p in student.named_parameters() if p in scales} == {"A", "B"}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale = scales.get(parameter, 1.0)
            assert group["lr"] == pytest.approx(1e-2 * scale)
            if parameter in scales:
                assert group["weight_decay"] == pytest.approx(0.1 / (2 * scale))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_it_can_be_switched_off(tmp_path):
    teacher, student = pair(BertForMaskedLM)
    trainer = make_trainer(student, teacher, tmp_path, factor_learning_rates=False)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-3}
    own = torch.optim.AdamW(student.parameters(), lr=0.5)
    make_trainer(student, teacher, tmp_path, trainer={"optimizers": (own, None)}).train()
    assert len(own.param_groups) == 1


@pytest.mark.parametrize(("optim", "scaled"), [("adamw_torch_fused", True), ("sgd", False), ("adafactor", False)])
def test_optimizers_whose_steps_depend_on_the_gradient_keep_one_rate(optim, scaled, tmp_path, caplog):
    teacher, student = pair(BertForMaskedLM)
    trainer = make_trainer(student, teacher, tmp_path, optim=optim)
    trainer.train()
    assert (len({group["initial_lr"] for group in trainer.optimizer.param_groups}) > 2) == scaled
    assert ("all learn at one rate" in caplog.text) != scaled


SIZES = [(20, 8), (8, 20), (6, 6), (5, 1), (1, 1), (16, 30), (40, 17), (90, 33), (20, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_vectors_stay_and_singular_values_become_about_one(dtype):
    matrices = [torch.randn(sizes).to(dtype) for sizes in SIZES]
    for X, found in zip(matrices, orthogonalized(matrices), strict=True):
        U, _, Vt = torch.linalg.svd(X.double(), full_matrices=False)
        values = U.mT @ found.double() @ Vt.mT
        torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=2e-3)
        assert 0.6 < float(values.diagonal().min()) <= float(values.diagonal().max()) < 1.25


def test_rare_directions_grow_as_in_the_plain_steps_of_newton_and_schulz():
    def plain(X):
        X = X / X.norm()
        for _ in range(5):
            X = 3.4445 * X - 4.7750 * X @ X.mT @ X + 2.0315 * X @ X.mT @ X @ X.mT @ X
        return X

    def decaying(rows, columns):
        U, S, Vt = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
        return U * 10.0 ** -torch.linspace(0, 3, len(S)) @ Vt

    matrices = [size * decaying(*sizes) for sizes, size in zip(SIZES, [1e-6, 1, 1e4] * 3, strict=True)]
    for X, found in zip(matrices, orthogonalized(matrices), strict=True):
        torch.testing.assert_close(found.double(), plain(X.double()), rtol=0, atol=1e-3)


def test_nothing_has_no_direction():
    zero, other = orthogonalized([torch.zeros(4, 3), torch.ones(4, 3)])
    assert not zero.any()
    assert other.isfinite().all()
    assert other.any()
    assert orthogonalized([]) == []


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_muon_is_as_long_as_one_of_adam_whatever_the_gradient(shape, size):
    model = layer(*shape)
    scales, before = learning_rate_scales(model), {X: X.detach().clone() for X in model.parameters()}
    optimizer = muon(model, 1e-2)
    torch.manual_seed(5)
    for X in model.parameters():
        X.grad = size * torch.randn_like(X)
    optimizer.step()
    for X, old in before.items():
        step = (X.detach() - old) / (1e-2 * scales[X])
        assert float((step * X.grad).sum()) < 0
        assert 0.1 < float(step.square().mean().sqrt()) < 0.25
        # all directions move alike: for a factor of low rank, those of its one matrix
        if 1 in (X.shape[0], X.shape[2]) and X.shape[1] > 1:
            values = torch.linalg.svdvals(step.flatten(1) if X.shape[2] == 1 else step[0])
            assert float(values.max() / values.min()) < 2


def test_steps_of_muon_are_those_of_a_plain_loop_with_momentum():
    torch.manual_seed(0)
    model = nn.Sequential(layer(24, 24, 24, 1, 5))  # of low rank, so A is the matrix (24, 5) and B (5, 24)
    optimizer, rate = muon(model, 1e-2), 1e-2
    wanted = {X: X.detach().double().reshape(X.shape[0], -1) for X in (model[0].A, model[0].B)}
    rates = {X: rate * scale for X, scale in learning_rate_scales(model).items()}
    momenta = {X: torch.zeros_like(value) for X, value in wanted.items()}
    for step in range(4):
        for X in wanted:
            X.grad = torch.randn_like(X) * 3**step
        gradients = {X: X.grad.double().reshape(X.shape[0], -1) for X in wanted}
        optimizer.step()
        for X, gradient in gradients.items():
            momenta[X] = 0.95 * momenta[X] + 0.05 * gradient
            U, _, V = torch.linalg.svd(0.05 * gradient + 0.95 * momenta[X], full_matrices=False)
            wanted[X] = wanted[X] - 0.2 * max(gradient.shape) ** 0.5 * rates[X] * U @ V
    for X, value in wanted.items():
        start = value - X.detach().double().reshape(value.shape)
        moved = 4 * 0.2 * rates[X]  # of an entry, about
        assert float(start.square().mean().sqrt()) < 0.2 * moved  # five steps of Newton and Schulz are not exact


def test_muon_leaves_all_but_linear_factors_to_adam():
    """One step from the same gradients."""

    def stepped(make):
        torch.manual_seed(0)
        linear, embedding = layer(8, 10, 8, 1, 2), KroneckerEmbedding(12, 10, 12, 1, 3)
        head = KroneckerLinear.tied_to(embedding)
        model = nn.Sequential(embedding, linear, nn.Linear(8, 10), nn.LayerNorm(10), head)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = make(model, 1e-2, weight_decay=0.1)
        (model(torch.arange(12)) ** 3).sum().backward()
        linear.A.grad = None
        optimizer.step()
        return before, model.state_dict()

    (before, ours), (_, stock) = stepped(muon), stepped(adam)
    assert torch.equal(ours["1.A"], before["1.A"])  # it had no gradient
    assert not torch.equal(ours["1.B"], before["1.B"])
    assert not torch.allclose(ours["1.B"], stock["1.B"], rtol=0, atol=1e-4)
    for name in ours.keys() - {"1.A", "1.B"}:
        assert not torch.equal(ours[name], before[name]), name
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-6, atol=1e-7)


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path):
    options = {"muon": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.01}
    models = []
    for resume in (False, tmp_path / "checkpoint-3"):
        teacher, student = pair(BertForMaskedLM)
        trainer = make_trainer(student, teacher, tmp_path, **options)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        models.append(trainer.model.state_dict())
    assert sum("momentum" in state for state in trainer.optimizer.state.values()) > 10
    torch.testing.assert_close(models[1], models[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "sgd"}, "muon=True goes with optim='adamw_torch', not 'sgd'"),
        ({"factor_learning_rates": False}, "muon=True needs factor_learning_rates=True"),
    ],
)
def test_muon_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(str(tmp_path), muon=True, **options)
