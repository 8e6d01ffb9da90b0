"""From a dense teacher to a factored student.

The student is the teacher with the layers of a plan replaced by their nearest sums of Kronecker products
(KroneckerBERT, section 3.4; KnGPT2, section 2), or, with calibration text, by sums that are near on that text;
everything else is copied bit by bit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.convert import copy_rest, is_tied, model_like, set_parameter
from ..checkpoint.load import save_folder
from ..checkpoint.sentence_modules import modules_of, refuse_code, share_modules
from ..checkpoint.teachers import check_teacher
from ..evaluation.cost import Report, describe
from ..models import FACTORED_CLASSES
from ..models.factor_plan import FactorPlan
from ..models.kronecker_family import family_of
from ..models.kronecker_layers import KroneckerEmbedding, KroneckerLinear, farthest_rows
from ..models.kronecker_matching import matched_plan, selected_modules
from ..models.kronecker_nearest import nearest_kronecker
from .activations import CalibrationBatch, Text, calibration_batches, modules_named, weight_of, word_counts
from .calibration import calibrate, check_text, warn_of_little_text
from .moments import kronecker_product
from .plan_file import SEARCHES
from .search import PlanSearch, check_budgets, check_reach, search_batches


@dataclass(frozen=True)
class CompressionResult:
    """A student, its tokenizer (None where the teacher came without one) and what was lost."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    report: Report
    search: PlanSearch | None = None
    """How the plan was found, if it was searched."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write a checkpoint that loads anywhere; `folder` must not exist yet or be empty.

        Raises:
            FileExistsError: the folder holds something.
            OSError: it cannot be written; nothing is left behind.
        """
        return save_folder(folder, self.model, self.tokenizer, self.report.to_dict())

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish the checkpoint with its code and a card, in one commit.

        Args:
            repo_id: name of the repository; made if it does not exist.
            **options: of `hub.push.push`, such as `private`, `revision` and `token`.

        Returns:
            The commit, `hub.push.Pushed`.

        Raises:
            OSError: as `hub.push.push`.
        """
        from ..hub.push import push

        with tempfile.TemporaryDirectory() as scratch:
            return push(self.save_pretrained(Path(scratch) / "model"), repo_id, **options)


def compress(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    plan: str | Mapping[str, Any] | None = None,
    *,
    ratio: float | None = None,
    only: str | Sequence[str] | None = None,
    calibration: Iterable[Text] | None = None,
    counted: Iterable[Text] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
) -> CompressionResult:
    """Factor a dense model.

    Args:
        teacher: a name on the Hub, a folder, or a loaded model, with any head that is supported.
        plan: name of a preset, a `FactorPlan`, a mapping from pattern to ``(m1, n1, terms)``, or "search": the best
            plan of the `ratio` that `search_plan` finds for the calibration text; or "low-rank": the best of those of
            low rank alone. Default: "search" where there is calibration text, else the first preset of the family (7.7x
            for encoders, kngpt2 for GPT-2).
        ratio: of a search, how many times smaller the base model becomes; default: that of the first preset, 7.7 or
            1.48.
        only: patterns (fnmatch) of the modules that are factored, relative to the base model; "embedding" is the word
            embedding. What a plan has for others is left out. Default: all modules.
        calibration: texts on which the factors are fitted to the teacher's layers, like those that the student will
            meet, or pairs (tuples) of them for a classifier of pairs: some thousand sentences, so that there are eight
            tokens for each input of the largest layer (24,576 tokens for BERT-base). A tenth of them is held out and
            decides, layer by layer, whether the nearest factors are kept. Without any, all layers get their nearest
            factors.
        counted: more texts like these, some ten thousand, of which only the words are counted: the word embedding is
            fitted to them, and a search may give frequent words a product of their own. Default: words are counted in
            the calibration texts, and none is set apart.
        tokenizer: of a teacher that is a loaded model; needed with `calibration`, and returned.
        progress: show progress bars on standard error.

    Returns:
        The student in evaluation mode, in the teacher's dtype and on its device; the teacher is not changed.

    Raises:
        TypeError: the teacher is neither a name, a folder nor a model; or a text is neither a string nor a pair of
            strings.
        ValueError: unsupported teacher, a plan that does not fit, or weights that are not finite; with `calibration`,
            too little text, no tokenizer, or activations that are not finite; `counted` without it, or without words;
            with `ratio`, a plan too, no calibration
            text, or a ratio that cannot be met; with `only`, a pattern that matches nothing, or a plan for other
            modules.
        OSError: the teacher cannot be read.
    """
    teacher, tokenizer = check_teacher(teacher, tokenizer)
    modules = modules_of(teacher)
    refuse_code(teacher.config.to_dict(), "config.json")
    student_class: Any = FACTORED_CLASSES[type(teacher)]
    if counted is not None and calibration is None:
        raise ValueError("counted text was given without calibration text, for which factors are fitted; give both")
    student, budget, names = planned(teacher, plan, ratio, only, calibration is not None)
    batches: list[CalibrationBatch] = []
    counts = None
    if calibration is not None:
        if tokenizer is None:
            raise ValueError("calibration needs the teacher's tokenizer; pass it as tokenizer=")
        batches = calibration_batches(calibration, tokenizer, teacher)
        layers = list(modules_named(teacher.base_model, names) if student is None else student.modules())
        check_text(teacher, batches, layers)
        warn_of_little_text(batches, layers)
        counts = None if counted is None else word_counts(counted, tokenizer, teacher)
    found = None
    if student is None:
        low_rank = plan == "low-rank"
        found = search_batches(
            teacher, batches, budget, names=names, progress=progress, low_rank=low_rank, counts=counts
        )
        student = _empty_student(teacher, student_class, found.plan)

    errors: dict[str, dict[str, float]] = {}
    dense_modules = dict(teacher.named_modules())
    factored = [
        (name, m)
        for name, m in student.named_modules()
        if isinstance(m, (KroneckerLinear, KroneckerEmbedding)) and f"{name}.A" not in student.all_tied_weights_keys
    ]
    for name, module in tqdm(factored, desc="factoring", unit="layer", disable=not progress):
        dense: Any = dense_modules[name].weight
        weight = weight_of(dense_modules[name]).detach()  # (m, n)
        m1, terms, n1 = module.A.shape
        result = nearest_kronecker(weight, m1, n1, terms)
        set_parameter(module, "A", result.A, dense)
        set_parameter(module, "B", result.B, dense)
        errors[name] = {"relative_error": result.relative_error}
        if isinstance(module, KroneckerEmbedding) and (own := module.frequent) is not None:
            rest = weight - kronecker_product(result.A, result.B).to(weight.dtype)
            own.words = (words := farthest_rows(rest, own.m1)).int()
            found_own = nearest_kronecker(rest[words], own.m1, own.n1, own.terms)
            set_parameter(own, "A", found_own.A, dense)
            set_parameter(own, "B", found_own.B, dense)
            errors[name] = {"relative_error": _relative_error(module, dense_modules[name])}
    copy_rest(teacher, student)
    share_modules(modules, student)
    if batches:
        for name, fitted in calibrate(teacher, student, batches, progress, counts).items():
            errors[name] = {
                "relative_error": _relative_error(student.get_submodule(name), dense_modules[name]),
                "output_error": fitted.calibrated,
                "nearest_output_error": fitted.nearest,
            }
    return CompressionResult(student, tokenizer, describe(student).with_errors(errors), found)


def is_searched(plan: Any) -> bool:
    """Whether a plan is the name of a search."""
    return isinstance(plan, str) and plan in SEARCHES


def planned(
    teacher: PreTrainedModel,
    plan: str | Mapping[str, Any] | None,
    ratio: float | None,
    only: str | Sequence[str] | None,
    has_text: bool,
) -> tuple[PreTrainedModel | None, dict[str, float], AbstractSet[str]]:
    """What was asked of `compress`: an empty student of the plan, or None for one that is searched.

    Returns:
        Student, on the meta device; budget of a search; names of the modules that may be factored.

    Raises:
        TypeError, ValueError: as `compress`.
    """
    student_class, family = FACTORED_CLASSES[type(teacher)], family_of(teacher)
    if ratio is not None and plan is not None and not is_searched(plan):
        raise ValueError(f"ratio={ratio} was given beside a plan, which has its own; leave one of them out")
    if plan is None:
        plan = next(iter(family.presets)) if ratio is None and not has_text else "search"
    searched = is_searched(plan)
    if searched and not has_text:
        asked = f'plan="{plan}"' if ratio is None else f"ratio={ratio}"
        raise ValueError(f"{asked} needs calibration text, for which the best plan is searched; give some")
    budget = {"ratio": family.default_ratio if ratio is None else ratio}
    check_budgets(budget)
    names = selected_modules(teacher.base_model, only)
    if searched and ratio is None and only is not None:
        raise ValueError(
            f"only={only!r} needs a ratio: the default, {family.default_ratio}, is for a plan of all modules; give one"
        )
    if searched:
        check_reach(teacher.base_model, names, budget)
        return None, budget, names
    if only is not None:
        plan = _restricted(teacher, student_class, plan, names)
    return _empty_student(teacher, student_class, plan), budget, names


def _empty_student(teacher: PreTrainedModel, student_class: Any, plan: Any) -> PreTrainedModel:
    """On the meta device.

    Raises:
        TypeError, ValueError: the plan does not fit.
    """
    config = student_class.config_class.from_dense(teacher.config, plan)
    config.name_or_path = teacher.config.name_or_path
    if not is_tied(teacher):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        return model_like(teacher, student_class, config)


def _restricted(teacher: PreTrainedModel, student_class: Any, plan: Any, names: AbstractSet[str]) -> FactorPlan:
    """What a plan has for some of the modules."""
    config = student_class.config_class.from_dense(teacher.config, plan)
    entries = matched_plan(teacher.base_model, config.factor_plan)
    if not entries.keys() & names:
        raise ValueError(
            f"plan has entries for other modules than those that only= allows, {min(names)!r} first; its first one is "
            f"{next(iter(entries), None)!r}; widen only=, or take another plan"
        )
    return FactorPlan({name: entry for name, entry in entries.items() if name in names})


@torch.no_grad()
def _relative_error(module: Any, dense: nn.Module) -> float:
    product, weight = module.to_dense(), weight_of(dense)
    return float((product - weight).double().norm() / weight.double().norm().clamp_min(1e-300))
