"""All checks and timings on a GPU, in under ten minutes: layers and whole models.

    python benchmarks/gpu.py | tee benchmarks/logs/gpu.txt

Errors are relative to the largest entry of the dense product in float64. Layers are those of benchmarks/layers.py, in
bf16: microseconds of the dense layer (the better of eager and compiled), of an einsum over all factors, and of the
factored layer, each the median of three turns; and the part of the limit that the factored layer reaches, where the
limit is the larger of FLOPs at the rate of a large GEMM and bytes at that of a large copy. Models have the sizes of
BERT-base and GPT-2 small and weights as drawn for training from scratch, seed 0: one forward pass of 64 x 128 tokens,
and greedy generation of 64 tokens after 8 x 32, in bf16, every way to run it in turn. `--device cpu` tries the script
on tiny sizes where there is no GPU. `--only models | tee benchmarks/logs/gpu_models.txt` leaves the rest out; low rank,
CUDA graphs and a compiled pass without the presets were measured by it later than gpu.txt.

The log gpu.txt has a column more, of Triton kernels that mixed the small factor in registers. They were removed because
whole models gained 9 per cent from them at 7.7x, lost 24 at 21x, and needed minutes to compile.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from common import low_rank_plan
from layers import LAYERS
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from kronecker_transformers import compress
from kronecker_transformers.evaluation.timing import (
    environment,
    forward_pass,
    in_turn,
    machine_rates,
    median_and_spread,
)
from kronecker_transformers.models.kronecker_contraction import multiplications
from kronecker_transformers.models.kronecker_layers import kronecker_linear

SMALL = {"attention": (32, 32, 2, 2, 1), "FFN up": (8, 2, 32, 32, 1), "FFN down": (2, 8, 32, 32, 1)}
ROUNDS = 15
PRESETS = ("7.7x", "21x")


def factors(shape: tuple[int, ...], tokens: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """x, A, B and bias of a layer."""
    m1, n1, m2, n2, terms = shape
    sizes = ((tokens, n1 * n2), (m1, terms, n1), (m2, terms, n2), (m1 * m2,))
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]


def einsum(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
    """All factors at once, as PyTorch orders them."""
    X = x.unflatten(-1, (A.shape[2], B.shape[2]))
    return torch.einsum("tjl,irj,krl->tik", X, A, B).flatten(1) + bias


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((found.double() - wanted).detach().abs().max() / wanted.detach().abs().max())


def check(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[float]:
    """Largest errors of the output and of any gradient, over three numbers of tokens."""
    torch.manual_seed(0)
    errors = []
    for tokens in (1, 127, 4096) if device != "cpu" else (1, 7):
        inputs = factors(shape, tokens, device, dtype)
        exact = [value.detach().double().requires_grad_() for value in inputs]
        x, A, B, bias = exact
        W = torch.einsum("irj,krl->ikjl", A, B).reshape(len(bias), x.shape[1])
        wanted, y = x @ W.t() + bias, kronecker_linear(*inputs)
        g = torch.randn_like(y)
        gradients = zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, exact, g.double()), strict=True)
        errors.append((relative(y, wanted), max(relative(*pair) for pair in gradients)))
    return [max(column) for column in zip(*errors, strict=True)]


def check_layers(layers: Mapping[str, tuple[int, ...]], device: str) -> None:
    """Print one row for each layer and dtype."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device != "cpu" else (torch.float32, torch.bfloat16)
    print(f"{'largest relative error':22s} {'dtype':>9s} {'output':>9s} {'gradients':>9s}")
    for name, shape in layers.items():
        for dtype in dtypes:
            errors = (f"{error:9.1e}" for error in check(shape, device, dtype))
            print(f"{name:22s} {str(dtype).removeprefix('torch.'):>9s}", *errors, flush=True)


def microseconds(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median of three turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            timer = Timer("work()", globals={"work": work})
            times[name].append(1e6 * timer.blocked_autorange(min_run_time=0.03).median)
    return {name: statistics.median(values) for name, values in times.items()}


def with_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of all inputs."""
    g = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, g)


def time_layers(layers: Mapping[str, tuple[int, ...]], tokens: tuple[int, ...], device: str) -> None:
    """Print one row for each layer, number of tokens and direction."""
    gemm_rate, copy_rate = machine_rates(torch.bfloat16, device)
    print(f"\nGEMM {gemm_rate / 1e12:.3g} TFLOP/s, copy {copy_rate / 1e9:.4g} GB/s, bf16")
    names = ("dense", "einsum", "factored")
    print(f"{'layer':20s} {'tokens':>6s} {'':9s}", *(f"{name:>9s}" for name in names), f"{'ratio':>6s} {'limit':>6s}")
    compiled = torch.compile(linear, dynamic=True) if device != "cpu" else linear
    for name, shape in layers.items():
        m1, n1, m2, n2, terms = shape
        for count in tokens:
            inputs = factors(shape, count, device, torch.bfloat16 if device != "cpu" else torch.float32)
            W = torch.randn(m1 * m2, n1 * n2, device=device).to(inputs[0]).requires_grad_()
            dense = [inputs[0], W, inputs[3]]
            for direction in ("forward", "and back"):
                ways: dict[str, tuple[Any, list[Tensor]]] = {
                    "eager": (linear, dense), "compiled": (compiled, dense), "einsum": (einsum, inputs),
                    "factored": (kronecker_linear, inputs),
                }  # fmt: skip
                if direction == "forward":
                    with torch.no_grad():
                        found = microseconds({key: partial(run, *values) for key, (run, values) in ways.items()})
                else:
                    found = microseconds({key: with_backward(*way) for key, way in ways.items()})
                found["dense"] = min(found.pop("eager"), found.pop("compiled"))
                x, *weights = (value.nbytes for value in inputs)
                flops, size = 2 * count * min(multiplications(m1, n1, m2, n2, terms)), inputs[0].element_size()
                y, weight = count * m1 * m2 * size, sum(weights)
                limit = 1e6 * max(flops / gemm_rate, (x + weight + y) / copy_rate)
                if direction == "and back":  # reads the gradient of y, x and weights; writes their gradients
                    limit += 1e6 * max(2 * flops / gemm_rate, (y + 2 * x + 2 * weight) / copy_rate)
                print(
                    f"{name:20s} {count:6d} {direction:9s}", *(f"{found[key]:9.1f}" for key in names),
                    f"{found['dense'] / found['factored']:5.2f}x {limit / found['factored']:6.0%}", flush=True,
                )  # fmt: skip


def print_in_turn(title: str, ways: Mapping[str, Callable[[], object]], rounds: int, device: str) -> None:
    """Print one row for each way to do the same; ratios are to the first of them."""
    with torch.inference_mode():
        seconds = in_turn(ways, rounds, warmup=2, device=device)
    medians = {label: median_and_spread(times) for label, times in seconds.items()}
    first = next(iter(medians.values()))[0]
    print(f"\n{title:28s} {'ms':>8s} {'spread':>7s} {'ratio':>6s}")
    for label, (middle, spread) in medians.items():
        print(f"{label:28s} {middle:8.2f} {spread:7.0%} {first / middle:5.2f}x", flush=True)


def replayed(run: Callable[[], Any]) -> Callable[[], object]:
    """The same as a CUDA graph: all its kernels are launched at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay


def time_models(device: str, config: BertConfig, batch: int, length: int) -> None:
    """Print one row for each way to run each model, without torch.compile and with it, launched singly and at once."""
    torch.manual_seed(0)
    dense: Any = BertModel(config)
    dense = dense.to(device, torch.bfloat16).eval()
    models = {"dense": dense, **{plan: compress(dense, plan).model for plan in PRESETS}}
    for size in PRESETS:
        plan = low_rank_plan(dense, models[size].num_parameters())
        models[f"low rank, {size}"] = compress(dense, plan).model
    for name, model in models.items():
        print(f"{name}: {model.num_parameters():,} parameters")
    for compiled in (False, True) if device != "cpu" else (False,):
        if compiled:  # which makes the presets slower, and takes minutes
            models = {name: model for name, model in models.items() if name not in PRESETS}
        ways = {name: forward_pass(model, batch, length, compiled) for name, model in models.items()}
        title = f"{batch} x {length}, bf16{', compiled' if compiled else ''}"
        print_in_turn(title, ways, ROUNDS, device)
        if device != "cpu":
            print_in_turn(f"{title}, graph", {name: replayed(run) for name, run in ways.items()}, ROUNDS, device)


def time_generation(device: str, config: GPT2Config, batch: int, length: int, new: int) -> None:
    """Print one row for each model."""
    torch.manual_seed(0)
    dense: Any = GPT2LMHeadModel(config)
    dense = dense.to(device, torch.bfloat16).eval()
    prompt = torch.randint(config.vocab_size, (batch, length), device=device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    ways: dict[str, Callable[[], object]] = {}
    for name, model in {"GPT-2": dense, "kngpt2": compress(dense, "kngpt2").model}.items():
        ways[name] = partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), **options)
    print_in_turn(f"{batch} x {length}, {new} new, bf16", ways, 3, device)


def main() -> None:
    """Print errors, then layers, then models."""
    parser = argparse.ArgumentParser(description="Checks and timings on a GPU.")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--only", choices=["models"], help="only whole models, one forward pass")
    options = parser.parse_args()
    device = options.device
    gpu = device != "cpu"
    print(environment(), "" if gpu else "; a trial without a GPU", sep="")
    layers: Mapping[str, tuple[int, ...]] = LAYERS if gpu else SMALL
    if not options.only:
        check_layers(layers, device)
    time_models(device, BertConfig() if gpu else BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=256, vocab_size=100), *((64, 128) if gpu else (1, 8)))  # fmt: skip
    if options.only:
        return
    time_generation(device, GPT2Config() if gpu else GPT2Config(n_embd=64, n_layer=1, n_head=2),
                    *((8, 32, 64) if gpu else (1, 3, 2)))  # fmt: skip
    time_layers(layers, (128, 1024, 8192, 65536) if gpu else (8,), device)


if __name__ == "__main__":
    main()
