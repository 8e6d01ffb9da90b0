"""Where the time of a forward pass goes, in the dense model and in factored ones.

    python benchmarks/parts.py | tee benchmarks/logs/parts.txt

BERT-base, weights drawn as for training from scratch, seed 0; factored by the presets, and with all layers of low rank
and as many parameters. All models take turns in one process: eager, under `torch.compile` (dynamic shapes), and with
their encoder alone compiled, where a factored model goes on to compute large batches in blocks; milliseconds are the
median of the rounds, with the spread (half the distance between the quartiles) of the eager ones; the ratio is that of
the best ways of both sides. Their parts are shares of the operators' own time in a profile of a further pass, eager. If
linear layers took no time at all, the ratio of both eager models would be the limit; what attention, activation, norm
and residual take is the same in all models.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from common import low_rank_plan
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

from kronecker_transformers import compress
from kronecker_transformers.display import results_table
from kronecker_transformers.evaluation.timing import environment, in_turn, median_and_spread

PLANS = ("7.7x", "21x")
WAYS = ("compiled", "encoder compiled")
BATCHES, LENGTH, ROUNDS = (8, 32), 128, 9
PARTS = {
    "large products": ("addmm", "mm", "linear", "mkldnn_linear"),
    "small factors": ("bmm", "baddbmm", "mul", "add_", "copy_"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "GELU": ("gelu",),
    "norm, residual": ("native_layer_norm", "add"),
}
"""Operators of each; `add_` adds the bias of a factored layer, `copy_` turns it, or the heads of attention."""


def models(trial: bool) -> dict[str, Any]:
    """The dense model and its factored ones."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2} if trial else {}
    dense = BertModel(BertConfig(**sizes)).eval()
    found = {"dense": dense}
    for plan in PLANS:
        found[plan] = compress(dense, plan).model
        found[f"low rank, as {plan}"] = compress(dense, low_rank_plan(dense, found[plan].num_parameters())).model
    return found


def with_compiled_encoder(model: BertModel) -> BertModel:
    """The same model, with the same weights."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.encoder = torch.compile(model.encoder, dynamic=True)  # type: ignore[assignment]
    return other


@torch.no_grad()
def parts_of(run: partial[Any]) -> list[float]:
    """Shares of the parts in a pass, and of the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in seen.key_averages()}
    shares = [sum(times.get(name, 0.0) for name in names) / sum(times.values()) for names in PARTS.values()]
    return [*shares, 1 - sum(shares)]


@torch.no_grad()
def main() -> None:
    """A table for each dtype and batch."""
    parser = argparse.ArgumentParser(description="Where the time of a forward pass goes.")
    parser.add_argument("--trial", action="store_true", help="two layers, one batch")
    options = parser.parse_args()
    console = Console(width=170)
    console.print(environment(), highlight=False)
    dense_and_factored = models(options.trial)
    headings = ["ms", "spread", *WAYS, "ratio", "limit", *PARTS, "rest"]
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for dtype in (torch.bfloat16, torch.float32):
        torch.compiler.reset()  # all models share code objects, of which only so many versions are compiled
        sides = {name: model.to(dtype) for name, model in dense_and_factored.items()}
        compiled: dict[str, list[Any]] = {
            name: [torch.compile(model, dynamic=True), with_compiled_encoder(model)] for name, model in sides.items()
        }
        for batch in BATCHES[:1] if options.trial else BATCHES:
            ids = torch.randint(1000, 30_000, (batch, LENGTH))
            runs = {name: partial(model, ids) for name, model in sides.items()}
            ways = {
                f"{name}, {way}": partial(model, ids)
                for name, both in compiled.items() for way, model in zip(WAYS, both, strict=True)
            }  # fmt: skip
            found = {name: median_and_spread(seconds) for name, seconds in in_turn(runs | ways, ROUNDS).items()}
            best = {name: min(found[name], *(found[f"{name}, {way}"] for way in WAYS))[0] for name in runs}
            rows = {}
            for name, run in runs.items():
                whole, spread = found[name]
                parts = [whole * share for share in parts_of(run)]
                rows[name] = [
                    f"{whole:.0f}", f"{spread:.0%}", *(f"{found[f'{name}, {way}'][0]:.0f}" for way in WAYS),
                    f"{best['dense'] / best[name]:.2f}", f"{found['dense'][0] / (whole - sum(parts[:2])):.2f}",
                    *(f"{part:.0f}" for part in parts),
                ]  # fmt: skip
            title = f"{batch} x {LENGTH} tokens, {str(dtype).removeprefix('torch.')}"
            console.print(results_table(title, headings, rows))


if __name__ == "__main__":
    main()
