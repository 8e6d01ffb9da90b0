"""The best plan for a budget: which layers of a teacher become which sums of Kronecker products.

    minimise  sum over layers l of  w_l n(e_l(c_l))   subject to   sum over layers of cost(c_l) <= budget

c_l is a candidate of layer l: one of all shapes of A and numbers of terms, low rank among them, or the dense layer. e_l
is the relative error of the layer's outputs on calibration text, n(e) = e^2 / (1 - e^2) their noise over signal: a
calibrated layer keeps the share 1 - e^2 of the variance. w_l is the influence of the layer: the noise over signal of
the outputs that count, for each unit of its own. Noise of several layers is taken to add up. What is known of each
layer is measured (`candidates`); the choice is a multiple-choice knapsack.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.convert import model_like
from ..checkpoint.teachers import check_teacher
from ..models import FACTORED_CLASSES
from ..models.factor_plan import FactorEntry, FactorPlan
from ..models.kronecker_family import longest_sequence
from ..models.kronecker_matching import matched_plan, selected_modules
from ..modes import evaluating
from .activations import CalibrationBatch, Text, calibration_batches, modules_named, weight_of, word_counts
from .calibration import check_text, warn_of_little_text
from .candidates import Candidate, influences, least_parameters, measured_layers, noise_to_signal
from .estimates import UNITS, best_choice, factor_shapes
from .latency import LatencyTable, Runtime, latency_table
from .plan_file import write_plan

BUDGETS = ("ratio", "parameters", "size_bytes", "flops", "milliseconds")
"""What can be limited; the arguments of `search_plan`."""


@dataclass(frozen=True)
class LayerChoice:
    """A layer, what it may become, smallest first, and what it becomes."""

    name: str
    weight: tuple[int, int]
    influence: float
    """Noise over signal of the outputs that count, for each unit of that of the layer's own."""
    candidates: tuple[Candidate, ...]
    chosen: Candidate


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass of the base model on this machine, in milliseconds."""

    runtime: Runtime
    predicted: float
    """With the plan: measured layers, and all else as measured in the dense model."""
    measured: float
    """With the plan, whole."""
    dense: float

    def __str__(self) -> str:
        return (
            f"{self.runtime}: {self.predicted:.1f} ms predicted, {self.measured:.1f} ms measured; "
            f"dense {self.dense:.1f} ms ({self.dense / self.measured:.2f}x)"
        )


@dataclass(frozen=True)
class PlanSearch:
    """The best plan that was found, and how it came about."""

    plan: FactorPlan
    layers: tuple[LayerChoice, ...]
    parameters: int
    """Of the base model with this plan."""
    dense_parameters: int
    flops: int
    """Of the linear layers of the base model with this plan, for a sequence of `REPORT_LENGTH` tokens."""
    error: float
    """Predicted relative error of the outputs that count."""
    frontier: tuple[tuple[float, float], ...]
    """Parameters of the base model, and the smallest error that is predicted for that number."""
    presets: Mapping[str, tuple[int, float]]
    """The same for the plans of the papers that fit the model."""
    latency: Latency | None = None
    """If milliseconds were budgeted."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as a YAML or JSON file.

        Raises:
            OSError, ValueError: as `plan_file.write_plan`.
        """
        return write_plan(path, self.plan)


def search_plan(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    calibration: Iterable[Text],
    *,
    ratio: float | None = None,
    parameters: int | None = None,
    size_bytes: int | None = None,
    flops: float | None = None,
    milliseconds: float | None = None,
    runtime: Runtime | None = None,
    only: str | Sequence[str] | None = None,
    low_rank: bool = False,
    counted: Iterable[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
) -> PlanSearch:
    """Search the best plan for a budget, of one or two kinds. Deterministic, but for milliseconds.

    Args:
        teacher: a name on the Hub, a folder, or a loaded model, with any head that `compress` takes. What counts are
            the probabilities of a language model, without a head the last hidden states and their means over each
            sequence, so the pooler then counts for nothing, and for a classifier, question answering and multiple
            choice the last hidden states, and the head's outputs for the pooler.
        calibration: texts, as for `compress`.
        ratio: parameters of the base model, its pooler included and tied ones once, teacher over student.
        parameters: of the base model.
        size_bytes: of these parameters in the teacher's dtype.
        flops: of the linear layers of the base model, for a sequence of `REPORT_LENGTH` tokens.
        milliseconds: of a forward pass of the base model on this machine, by the times of layers that are measured.
        runtime: what these are of; default: one sequence of 128 tokens, in PyTorch. Only with `milliseconds`.
        only: patterns (fnmatch) of the modules that may be factored, relative to the base model; "embedding" is the
            word embedding. Budgets are of the whole base model all the same. Default: all modules.
        low_rank: search sums of low rank alone, W ~ A B: they are the fastest in 8 bits and to train, and the search
            itself takes less time.
        counted: as for `compress`.
        tokenizer: of a teacher that is a loaded model.
        progress: show progress bars on standard error.

    Returns:
        A plan that uses at least 99 per cent of a budget, unless less is as good.

    Raises:
        TypeError, ValueError, OSError: as `compress`; no budget, more than two, or one that cannot be met; or a pattern
            that matches nothing.
        ImportError: times of ONNX Runtime are asked for, and what it needs is missing.
    """
    model, tokenizer = check_teacher(teacher, tokenizer)
    budgets = zip(BUDGETS, (ratio, parameters, size_bytes, flops, milliseconds), strict=True)
    given = {name: value for name, value in budgets if value is not None}
    check_budgets(given)
    if runtime is not None and milliseconds is None:
        raise ValueError(f"{runtime} were given without milliseconds to budget; give both or neither")
    runtime = runtime or Runtime()
    if milliseconds is not None and runtime.length > (most := longest_sequence(model)):
        raise ValueError(f"length={runtime.length} is more than the {most} tokens of the teacher; give a smaller one")
    if tokenizer is None:
        raise ValueError("calibration needs the teacher's tokenizer; pass it as tokenizer=")
    names = selected_modules(model.base_model, only)
    batches = calibration_batches(calibration, tokenizer, model)
    counts = None if counted is None else word_counts(counted, tokenizer, model)
    warn_of_little_text(batches, modules_named(model.base_model, names))
    return search_batches(model, batches, given, runtime, names, progress, low_rank, counts)


def check_budgets(given: Mapping[str, float]) -> None:
    """Refuse budgets, by their names, before long work begins.

    Raises:
        TypeError: one is no number.
        ValueError: none, more than two, or one out of range.
    """
    if not 1 <= len(given) <= 2:
        raise ValueError(f"budgets given: {', '.join(given) or 'none'}; give one or two of {', '.join(BUDGETS)}")
    for name, value in given.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be a number; give one")
        if not (math.isfinite(value) and value > (1 if name == "ratio" else 0)):
            raise ValueError(f"{name}={value} must be above {1 if name == 'ratio' else 0}; give a larger number")


def check_reach(base: Any, names: AbstractSet[str], budgets: Mapping[str, float]) -> None:
    """Refuse budgets of parameters that no plan for these modules of a base model can meet, by their shapes alone.

    Raises:
        ValueError: with how many parameters are needed at least; the search itself may need more.
    """
    dense, least = sum(p.numel() for p in base.parameters()), 0
    left = dense
    for module in modules_named(base, names):
        W = weight_of(module)
        left -= W.numel()
        shapes = [s for s in factor_shapes(*W.shape) if s[0] == len(W) or not isinstance(module, nn.Embedding)]
        least += min((least_parameters(W, *shape) for shape in shapes), default=W.numel())
    wanted = {"ratio": lambda v: dense / v, "parameters": float, "size_bytes": lambda v: v / base.dtype.itemsize}
    for name, value in budgets.items():
        if name in wanted and wanted[name](value) < left + least:
            raise ValueError(
                f"{name}={value:,} cannot be met: {left:,} of {dense:,} parameters are in modules that stay dense, and "
                f"the others need at least {least:,}; give another budget, or factor more modules"
            )


@torch.no_grad()
def search_batches(
    teacher: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    budgets: Mapping[str, float],
    runtime: Runtime | None = None,
    names: AbstractSet[str] | None = None,
    progress: bool = False,
    low_rank: bool = False,
    counts: Tensor | None = None,
) -> PlanSearch:
    """As `search_plan`, for a teacher that is checked and text that is encoded; budgets by their names there.

    `names` are those of the modules that may be factored; default: all.
    """
    names = selected_modules(teacher.base_model, None) if names is None else names
    check_reach(teacher.base_model, names, budgets)
    check_text(teacher, batches, modules_named(teacher.base_model, names))
    with evaluating(teacher):
        return _search(teacher, batches, budgets, runtime or Runtime(), names, progress, low_rank, counts)


def _search(
    teacher: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    budgets: Mapping[str, float],
    runtime: Runtime,
    names: AbstractSet[str],
    progress: bool,
    low_rank: bool,
    counts: Tensor | None,
) -> PlanSearch:
    base: Any = teacher.base_model
    known_plans = {} if low_rank else _presets(teacher)
    presets = {key: {n: e for n, e in plan.items() if n in names} for key, plan in known_plans.items()}
    measured = measured_layers(base, batches, presets, names, progress, low_rank, counts)
    times = latency_table(teacher, runtime) if "milliseconds" in budgets else None
    layers = list(tqdm(measured, desc="candidates", unit="layer", disable=not progress))
    weights = influences(teacher, layers, batches, progress)
    candidates, rest = [layer.candidates for layer in layers], 0.0
    if times is not None:
        candidates, rest = times.timed(layers, progress), times.rest(base)
    options = [_useful(found) for found in candidates]
    values = [[w * noise_to_signal(c.error) for c in found] for w, found in zip(weights, options, strict=True)]

    dense = sum(p.numel() for p in base.parameters())
    fixed = dense - sum(layer.weight.numel() for layer in layers)
    limits: list[tuple[str, list[list[float]], float]] = []
    for name, value in budgets.items():
        kind, limit = {
            "ratio": ("parameters", dense / value - fixed),
            "parameters": ("parameters", value - fixed),
            "size_bytes": ("parameters", value / base.dtype.itemsize - fixed),
            "flops": ("flops", value),
            "milliseconds": ("milliseconds", value - rest),
        }[name]
        limits.append((name, [[getattr(c, kind) for c in found] for found in options], limit))
    for name, costs, limit in limits:
        if (least := sum(map(min, costs))) > limit:
            smallest = {"ratio": f"at most {dense / (least + fixed):.2f}", "flops": f"at least {least:,}",
                        "parameters": f"at least {least + fixed:,}",
                        "size_bytes": f"at least {(least + fixed) * base.dtype.itemsize:,}",
                        "milliseconds": f"at least {least + rest:.2f}"}[name]  # fmt: skip
            raise ValueError(f"{name}={budgets[name]:,} cannot be met: {smallest} is possible; give another budget")
    picked = _choose(values, [(costs, limit) for _, costs, limit in limits])
    chosen = [found[index] for found, index in zip(options, picked, strict=True)]

    sizes = [[c.parameters for c in found] for found in options]
    _, frontier = best_choice(sizes, values, dense - fixed)
    points = [(fixed + (dense - fixed) * k / UNITS, _error(v)) for k, v in enumerate(frontier) if np.isfinite(v)]
    known = {}
    for name, entries in presets.items():
        if entries != known_plans[name]:
            continue
        taken = [next(c for c in layer.candidates if c.entry == entries.get(layer.name)) for layer in layers]
        noise = sum(w * noise_to_signal(c.error) for w, c in zip(weights, taken, strict=True))
        known[name] = fixed + sum(c.parameters for c in taken), _error(noise)
    plan = {layer.name: c.entry for layer, c in zip(layers, chosen, strict=True) if c.entry is not None}
    latency = None
    if times is not None:
        latency = _latency(base, plan, times, rest + sum(c.milliseconds for c in chosen))
    return PlanSearch(
        FactorPlan(plan),
        tuple(
            LayerChoice(layer.name, (layer.weight.shape[0], layer.weight.shape[1]), w, tuple(found), c)
            for layer, w, found, c in zip(layers, weights, options, chosen, strict=True)
        ),
        fixed + sum(c.parameters for c in chosen),
        dense,
        sum(c.flops for c in chosen),
        _error(sum(w * noise_to_signal(c.error) for w, c in zip(weights, chosen, strict=True))),
        tuple(points[:: UNITS // 200]),
        known,
        latency,
    )


def _latency(base: PreTrainedModel, plan: Mapping[str, FactorEntry], times: LatencyTable, predicted: float) -> Latency:
    """The plan, measured in a student with random weights."""
    student_class: Any = FACTORED_CLASSES[type(base)]
    with torch.random.fork_rng(devices=[]):
        student: Any = model_like(base, student_class, student_class.config_class.from_dense(base.config, plan))
    student = student.to(base.device, base.dtype).eval()
    return Latency(times.runtime, predicted, *times.whole(student, base))


def _error(noise: float) -> float:
    """The relative error with so much noise over signal."""
    return math.sqrt(noise / (1 + noise))


def _choose(values: list[list[float]], limits: list[tuple[list[list[float]], float]]) -> list[int]:
    """The best candidates within one limit, or within two by a Lagrange multiplier on the second."""
    costs, limit = limits[0]
    picked, _ = best_choice(costs, values, limit)
    if len(limits) == 1:
        return picked
    second, second_limit = limits[1]

    def spent(picked: list[int]) -> float:
        return sum(layer[index] for layer, index in zip(second, picked, strict=True))

    if spent(picked) <= second_limit:
        return picked
    low, high = -60.0, 60.0  # of the logarithm of the multiplier, in units of value for the whole of the second limit
    best = None
    for _ in range(40):
        middle = (low + high) / 2
        price = math.exp(middle) / second_limit
        priced = [[v + price * c for v, c in zip(*pair, strict=True)] for pair in zip(values, second, strict=True)]
        picked, _ = best_choice(costs, priced, limit)
        if spent(picked) <= second_limit:
            best, high = picked, middle
        else:
            low = middle
    if best is None:
        raise ValueError("both budgets cannot be met together; raise one of them")
    return best


def _useful(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Without those that another one beats in parameters, FLOPs, time and error; smallest first."""
    kept: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.parameters, c.flops, c.milliseconds, c.error)):
        if not any(k.flops <= c.flops and k.milliseconds <= c.milliseconds and k.error <= c.error for k in kept):
            kept.append(c)
    return kept


def _presets(teacher: PreTrainedModel) -> dict[str, dict[str, FactorEntry]]:
    """The entry of each module in the plans of the papers, where they fit this model."""
    config_class: Any = FACTORED_CLASSES[type(teacher)].config_class
    found = {}
    for name in config_class.family.presets:
        try:
            plan = config_class.from_dense(teacher.config, name).factor_plan
            found[name] = matched_plan(teacher.base_model, plan)
        except ValueError:  # sizes that they do not divide
            continue
    return found
