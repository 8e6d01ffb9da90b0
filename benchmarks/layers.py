"""Single factored layers beside the dense layers they replace, and beside other ways of computing the same product.

    pip install linear_operator opt_einsum pyfastkron
    python benchmarks/layers.py | tee benchmarks/logs/layers.txt

Forward, fp32. The other ways: the weight made anew by `torch.kron` in each pass (LoKr, Krony-PT); one einsum in the
order that opt_einsum finds (TQCompressedGPT2); the shuffle algorithm of linear_operator; FastKron's kernels for a CPU.
The last two take one product at a time, so they are left out where a layer has many terms. What is not installed is
left out too, and so is, with more tokens, what took ten times as long as the dense layer. Every way is first held
against the dense layer in float64.

All take turns in one process; milliseconds, median of the rounds. The first ratio is that of the dense layer's time to
ours, the second that of the best other way; above 1, ours is faster.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial, reduce
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread
from kronecker_transformers.models.kronecker_layers import kronecker_linear

# name: (m1, n1, m2, n2, terms); sizes of BERT-base and GPT-2 small
LAYERS = {
    "7.7x attention": (384, 384, 2, 2, 1),
    "7.7x FFN up": (8, 2, 384, 384, 1),
    "7.7x FFN down": (2, 8, 384, 384, 1),
    "21x attention": (384, 48, 2, 16, 1),
    "21x FFN up": (16, 2, 192, 384, 1),
    "21x FFN down": (2, 16, 384, 192, 1),
    "kngpt2 c_attn": (1152, 768, 2, 1, 1),
    "kngpt2 attn.c_proj": (384, 768, 2, 1, 1),
    "kngpt2 c_fc": (1536, 768, 2, 1, 1),
    "kngpt2 mlp.c_proj": (384, 3072, 2, 1, 1),
    "attention, 2 terms": (192, 192, 4, 4, 2),
    "attention, rank 96": (768, 1, 1, 768, 96),
}
TOKENS = (1, 16, 128, 1024, 4096, 8192)
ROUNDS = 11
WAYS = ("ours", "torch.kron", "einsum", "shuffle", "FastKron")


def sum_of(products: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors, one after the other."""
    return reduce(torch.add, products)


def ways(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ours and the others, by name."""
    m1, terms, n1 = A.shape
    m2, _, n2 = B.shape
    pairs = [(A[:, r].contiguous(), B[:, r].contiguous()) for r in range(terms)]
    X = x.view(-1, n1, n2)
    found: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: kronecker_linear(x, A, B, bias),
        "einsum": lambda: torch.einsum("tjl,irj,krl->tik", X, A, B).reshape(len(x), -1) + bias,
    }
    if terms <= 4:
        found["torch.kron"] = lambda: linear(x, sum_of(torch.kron(*pair) for pair in pairs), bias)
    else:  # the sum in one product, as a low-rank layer that is merged in each pass
        found["torch.kron"] = lambda: linear(x, torch.einsum("irj,krl->ikjl", A, B).reshape(m1 * m2, n1 * n2), bias)
    if terms <= 4 and find_spec("linear_operator"):
        operators = importlib.import_module("linear_operator.operators")
        products = [operators.KroneckerProductLinearOperator(*pair) for pair in pairs]
        found["shuffle"] = lambda: sum_of(product @ x.t() for product in products).t() + bias
    if terms <= 4 and find_spec("pyfastkron"):
        fastkron = importlib.import_module("pyfastkron.fastkrontorch")
        factors = [[factor.t().contiguous() for factor in pair] for pair in pairs]
        found["FastKron"] = lambda: sum_of(fastkron.gemkm(x, pair) for pair in factors) + bias
    return found


@torch.inference_mode()
def main() -> None:
    """Print one row for each layer and number of tokens."""
    print(environment())
    torch.manual_seed(0)
    columns = "".join(f"{way:>11s}" for way in WAYS)
    print(f"{'layer':19s} {'tokens':>6s} {'dense':>9s}{columns} {'spread':>7s} {'dense/ours':>11s} {'best/ours':>10s}")
    for name, (m1, n1, m2, n2, terms) in LAYERS.items():
        A, B, bias = torch.randn(m1, terms, n1), torch.randn(m2, terms, n2), torch.randn(m1 * m2)
        W = torch.einsum("irj,krl->ikjl", A.double(), B.double()).reshape(m1 * m2, n1 * n2)
        dense = W.float()
        hopeless: set[str] = set()
        for tokens in TOKENS:
            x = torch.randn(tokens, n1 * n2)
            works = {way: work for way, work in ways(x, A, B, bias).items() if way not in hopeless}
            expected = linear(x[:128].double(), W, bias.double())
            for way, work in works.items():
                error = (work()[:128].double() - expected).norm() / expected.norm()
                if error > 1e-5:
                    raise AssertionError(f"{way} differs from the dense layer by {error:.1e} in {name}")
            seconds = in_turn({"dense": partial(linear, x, dense, bias), **works}, ROUNDS)
            found = {way: median_and_spread(times) for way, times in seconds.items()}
            hopeless |= {way for way, (time, _) in found.items() if time > 10 * found["dense"][0]}
            middle, spread = found["ours"]
            others = "".join(f"{found[way][0]:11.3f}" if way in found else f"{'-':>11s}" for way in WAYS)
            best = min(found[way][0] for way in works if way != "ours")
            print(
                f"{name:19s} {tokens:6d} {found['dense'][0]:9.3f}{others} {spread:7.0%} "
                f"{found['dense'][0] / middle:10.2f}x {best / middle:9.2f}x", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
