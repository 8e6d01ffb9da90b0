"""The main job in one go: a dense teacher and plain text in, a small student with its card out.

The plan is searched and calibrated on the text, then the student is distilled on it. A student with fewer layers than
its teacher is dense at first: it is distilled, then factored, then distilled once more. A part of the text is held out;
on it teacher and student are compared in the terms of what the teacher is used for.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.files import check_new_folder, new_folder, to_json, write_text
from ..checkpoint.load import source_name, write_checkpoint
from ..checkpoint.sentence_modules import encoder_settings
from ..checkpoint.teachers import check_teacher
from ..compression.activations import calibration_batches, modules_named
from ..compression.calibration import check_text
from ..compression.compress import compress, is_searched, planned
from ..compression.plan_file import write_plan
from ..compression.search import PlanSearch
from ..display import has_pictures, plan_picture, training_picture
from ..distillation import keep_layers
from ..distillation.agreement import Judge, judge_for
from ..evaluation.cost import Report, describe
from ..evaluation.timing import environment, in_turn
from ..hub.card import folder_metadata, model_card
from ..models.factor_plan import FactorPlan
from ..models.kronecker_family import family_of, heads_of
from ..models.kronecker_matching import selected_modules
from ..tasks.text import TextSource
from .lessons import Lesson, task_lesson, text_lesson
from .run import check_special_tokens
from .training import Schedule, kept_layers, shallow, train
from .watch import Watch, multiplies_bfloat16

logger = logging.getLogger(__name__)

MINUTES = 30.0
"""Of training, where nothing else is asked for."""
FEWEST_WATCHED = 20
"""Sentences, on which similarities say something."""
TIMED, ROUNDS = 64, 5
"""Examples that are timed at the end, and how often."""
FIDELITY = "; fidelity is the Spearman correlation between the {} that teacher and student give to 20,000 random pairs"


@dataclass(frozen=True)
class Distilled:
    """A finished student.

    Attributes:
        model, tokenizer: the student.
        report: its sizes, beside the teacher's.
        rows: what was measured, by name, for each of `models`.
        training: steps, samples, tokens, seconds, objective, and the curve of its quality on held-out examples; of a
            student with fewer layers, since it is factored.
        folder: where it is saved, with plan, records, pictures and card.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: Report
    rows: Mapping[str, list[float]]
    training: Mapping[str, Any]
    folder: Path
    models: tuple[str, ...] = ("teacher", "not distilled", "student")


def distill(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    text: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] = "student",
    *,
    task: str | None = None,
    data_dir: str | None = None,
    ratio: float | None = None,
    plan: str | Mapping[str, Any] | None = None,
    only: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    column: str = "text",
    base_model: str | None = None,
    learning_rate: float | None = None,
    bf16: bool | None = None,
    frequent_words: bool = True,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    show: Callable[[str], object] | None = None,
) -> Distilled:
    """Compress a teacher and distil its student on plain text, or a classifier on the texts of a GLUE task.

    A classifier is distilled from its hidden states, attention and logits, a language model from its text too, and a
    model without a head as a sentence encoder.

    Args:
        teacher: a name on the Hub, a folder, or a loaded model, with any head that is supported.
        text: a file with one sentence or document per line, a table (.csv, .tsv, .json, .jsonl, .parquet), or a dataset
            of the Hub, of which the split train is read; a tenth of it is held out. Sentence encoders and classifiers
            of sequences see half of the sentences augmented in each epoch but the first (`tasks.augmentation`).
        output: new folder for the student.
        task: a GLUE task, in place of text: the texts of its training set, half of them augmented in each epoch
            (`tasks.augmentation`), and without their labels; its validation set to compare on. The teacher is a folder
            or name then, of a classifier that was fine-tuned on it.
        data_dir: folder of the official GLUE files; default: the Hub.
        ratio: how many times smaller the base model becomes; default: that of the family's first preset.
        plan: as for `compress`; default: "search".
        only: as for `compress`.
        layers: how many of the teacher's layers the student has, evenly spaced, or which, from 0; default: all. With
            fewer, it is distilled as a dense model for 40 per cent of the time, and factored then; a ratio still is
            that to the teacher.
        minutes: of training, at most; default: 30, without `steps`.
        steps: of training, instead.
        column: of a table or dataset.
        base_model: name of the teacher on the Hub, for the card; default: that under which it was loaded.
        learning_rate: of the factored student; default: 1e-3 for a hidden size up to 384, less for a larger one.
        bf16: compute in bfloat16 (autocast); weights stay in float32. Default: on a CPU with instructions for it, such
            as AMX and AVX512-BF16, where it is much faster.
        frequent_words: of a sentence encoder: let the search give the frequent words of the text a product of their
            own. Nearer to the teacher on text like this, farther on text of other kinds.
        seed: of order, masks and dropout.
        tokenizer: of a teacher that is a loaded model.
        progress: show progress bars on standard error.
        show: called with a line now and then.

    Returns:
        The student, in float32 on the CPU, and what was measured; all of it is saved in `output`, or nothing.

    Raises:
        FloatingPointError: the loss is no longer finite.
        TypeError, ValueError, OSError: as `compress`; both or none of text and task, both minutes and steps, too little
            text, or a teacher that is no classifier for the task.
    """
    say = show or (lambda line: None)
    target = check_new_folder(output)
    if (text is None) == (task is None):
        raise ValueError(f"text={text!r} and task={task!r} were given; give one of both")
    if minutes is not None and steps is not None:
        raise ValueError(f"minutes={minutes} and steps={steps} were given; give one of both")
    for name, value in (("minutes", minutes), ("steps", steps), ("learning_rate", learning_rate)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number above 0; give another")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to 2**32 - 1; give another")
    if task is None and data_dir is not None:
        raise ValueError(f"data_dir={os.fspath(data_dir)!r} is of a task, and text was given; leave it out")
    if text is None and column != "text":
        raise ValueError(f"column={column!r} is of a text, and a task was given; leave it out")
    if torch.cuda.device_count() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "distill uses one process and one GPU; set CUDA_VISIBLE_DEVICES=0, or use a script of examples/"
        )
    plan = "search" if plan is None else plan
    if text is not None:
        source = TextSource((os.fspath(text),), column=column)
        dense, tokenizer = _own(*check_teacher(teacher, tokenizer), isinstance(teacher, PreTrainedModel))
        lesson = text_lesson(dense, tokenizer, source, seed)
    else:
        if isinstance(teacher, PreTrainedModel):
            raise ValueError(f"task={task!r} needs a teacher in a folder or on the Hub; save this one first")
        dense, tokenizer, lesson = task_lesson(os.fspath(teacher), str(task), data_dir)
    dense = dense.float().eval()  # whatever precision it was saved in: a student is trained in float32

    searched = is_searched(plan)
    asked = family_of(dense).default_ratio if ratio is None else ratio
    allowed = MINUTES if minutes is None and steps is None else minutes
    half = multiplies_bfloat16() if bf16 is None else bf16
    schedule, kept = Schedule(allowed, steps, learning_rate, half, seed), kept_layers(dense, layers)
    factor_ratio = ratio if kept is None else _ratio_of_rest(dense, kept, plan, ratio, only)

    if kept is not None:  # what the second half would refuse is refused before the first
        modules = modules_named(dense.base_model, selected_modules(dense.base_model, only))
        check_text(dense, calibration_batches(lesson.calibration, tokenizer, dense), modules)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of masks
        held_out, size = lesson.held_out, lesson.batch
        starts = range(0, len(held_out), size)
        batches = [dict(lesson.collate([dict(e) for e in held_out[i : i + size]])) for i in starts]
    few, cut = len(lesson.sentences) // 5, max(1, len(batches) // 5)
    few = few if few >= FEWEST_WATCHED else 0  # of little text all is watched
    watched = judge_for(dense, tokenizer, lesson.sentences[:few] or lesson.sentences, batches[:cut], lesson.length)
    final = batches[cut:] or batches
    judge = judge_for(dense, tokenizer, lesson.sentences[few:], final, lesson.length)
    models: dict[str, PreTrainedModel] = {"teacher": dense}
    unfactored: PreTrainedModel = dense
    earlier: dict[str, Any] = {}
    if kept is not None:
        first, schedule = schedule.divided()
        unfactored, earlier = shallow(dense, kept, lesson, first, Watch(watched, say), say)
        models[f"{len(kept)} layers, dense"] = unfactored
    how = f"plan searched for a ratio of {asked:g}" if searched else "plan as given"
    say(f"Compression: {how}, factors calibrated on {len(lesson.calibration):,} texts")
    result = compress(
        unfactored, plan, ratio=factor_ratio, only=only, calibration=lesson.calibration,
        counted=(frequent_words and lesson.counted) or None, tokenizer=tokenizer, progress=progress,
    )  # fmt: skip
    student = result.model.requires_grad_(True)
    models["not distilled" if kept is None else "factored"] = copy.deepcopy(student).eval()
    watch = Watch(watched, say)
    training = train(student, dense, lesson, schedule, watch, say, kept)
    models["student"] = student.eval()
    device: Any = student.device
    models = {name: model.to(device) for name, model in models.items()}

    options: dict[str, Any] = {
        "teacher": base_model or source_name(dense.config.name_or_path or "") or None,
        "command": _command(
            base_model or teacher,
            text=text, text_column=None if column == "text" else column, task=task, data=data_dir, ratio=ratio,
            plan=None if plan == "search" else plan if isinstance(plan, str) else "plan.yaml",
            only=only if only is None or isinstance(only, str) else ",".join(only),
            layers=layers if layers is None or isinstance(layers, int) else _listed(layers),
            minutes=minutes, steps=steps,
            learning_rate=learning_rate, bf16=bf16, no_bf16=bf16 is False,
            no_frequent_words=not frequent_words, seed=seed or None,
        ),
    }  # fmt: skip
    options |= {"task_name": task} if text is None else {"train_text": [source_name(os.fspath(text))]}
    number = len(lesson.sentences) - few if lesson.sentences and not heads_of(dense) else sum(map(_rows_of, final))
    record: dict[str, Any] = {
        "options": options,
        "training": training,
        **({"dense_training": earlier} if earlier else {}),
        "protocol": _protocol(dense, tokenizer, lesson, number),
        "factors_sha256": describe(student).factors_sha256,
        "environment": environment(),
    }
    say("Comparison on held-out text")
    stopped: BaseException | None = None
    with new_folder(target) as draft:
        write_checkpoint(draft, student, tokenizer)
        write_plan(draft / "plan.yaml", FactorPlan(student.config.factor_plan))
        rows: dict[str, list[float]] = {}
        try:  # what was trained is not lost because it cannot be judged or drawn, or nobody waits for that
            rows |= _compared(models, judge, lesson, batches, record)
            _draw(draft, result.search, watch, next(iter(watched(dense).values())))
        except BaseException as error:
            logger.warning("the student is saved, but could not be judged or drawn: %r", error)
            record["evaluation_failed"] = f"{type(error).__name__}: {error}"
            stopped = None if isinstance(error, Exception) else error
        write_text(draft / "results.json", to_json(record))
        try:
            own = folder_metadata(dense.config.name_or_path)  # of a teacher in a folder, whatever its name on the Hub
            card = model_card(draft, f"your-name/{target.name}", base_model=base_model, look_up=lambda _: own)
            write_text(draft / "README.md", str(card))
        except Exception as error:
            logger.warning("the student is saved, but without a card: %r", error)
    if stopped is not None:
        raise stopped
    return Distilled(student.cpu(), tokenizer, result.report, rows, training, target, tuple(models))


def _listed(layers: Sequence[int]) -> str:
    """As the command line takes them: a list of one has a comma, without which it would be a number of layers."""
    return ",".join(map(str, layers)) + "," * (len(layers) == 1)


def _ratio_of_rest(
    teacher: PreTrainedModel, kept: list[int], plan: Any, ratio: float | None, only: str | Sequence[str] | None
) -> float | None:
    """The ratio of a search on the student with these layers that makes it as small as asked for; None for a plan.

    Raises:
        TypeError, ValueError: what `compress` would refuse, before anything is trained; or the layers alone do it.
    """
    small = keep_layers(teacher, kept)
    found = ratio
    if is_searched(plan):
        if ratio is None and only is not None:
            raise ValueError(f"only={only!r} needs a ratio: the default is for a plan of all modules; give one")
        asked = family_of(teacher).default_ratio if ratio is None else ratio
        left, whole = (sum(p.numel() for p in model.base_model.parameters()) for model in (small, teacher))
        share = left / whole
        found = asked * share
        if found <= 1:
            raise ValueError(
                f"layers={kept} alone makes the model {1 / share:.2f} times smaller, and ratio={asked:g} is no more; "
                "give more layers or a larger ratio"
            )
    try:
        planned(small, plan, found, only, has_text=True)
    except ValueError as error:
        if found == ratio:
            raise
        raise ValueError(f"with layers={kept} a ratio of {found:.4g} is left to the factors: {error}") from error
    return found


def _own(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, is_loaded: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A teacher and a tokenizer to change, padded on the right with one token that both know.

    Raises:
        ValueError: no tokenizer, or none of its tokens can be for padding.
    """
    if tokenizer is None:
        raise ValueError("the teacher comes without a tokenizer; save its tokenizer in the same folder")
    teacher, tokenizer = copy.deepcopy(teacher) if is_loaded else teacher, copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        known = teacher.config.pad_token_id
        tokenizer.pad_token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
    check_special_tokens(tokenizer, "pad")
    teacher.config.pad_token_id = tokenizer.pad_token_id
    if family_of(teacher).causal:
        tokenizer.padding_side = "right"  # it counts positions from the left, padding included
    return teacher, tokenizer


def _protocol(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, number: int) -> str:
    """On what the models are compared."""
    found = f"{number:,} held-out examples"
    if lesson.scores is not None:
        return f"agreement and speed on {found}, the task's metrics on its whole validation set"
    if heads_of(teacher):
        return found
    cosine = encoder_settings(teacher, tokenizer).normalize
    return found + FIDELITY.format("cosine similarities" if cosine else "dot products")


def _rows_of(batch: Mapping[str, Tensor]) -> int:
    return len(batch["input_ids"])


def _compared(
    models: Mapping[str, PreTrainedModel],
    judge: Judge,
    lesson: Lesson,
    batches: list[dict[str, Tensor]],
    record: dict[str, Any],
) -> dict[str, list[float]]:
    """What was counted and measured of each model, by name; also put into the record."""
    rows: dict[str, list[float]] = {"parameters": [model.num_parameters() for model in models.values()]}
    rows["megabytes"] = [sum(p.nbytes for p in model.parameters()) / 1e6 for model in models.values()]
    rows["examples per second"] = _speeds(models, batches)
    found = [judge(model) for model in models.values()]
    rows |= {name: [values[name] for values in found] for name in found[0]}
    if lesson.scores is not None:
        scores = {name: lesson.scores(model) for name, model in models.items()}
        rows |= {metric: [values[metric] for values in scores.values()] for metric in scores["teacher"]}
        record["metrics"] = scores
    record |= {"models": list(models), "rows": rows}
    return rows


def _draw(draft: Path, search: PlanSearch | None, watch: Watch, reached: float) -> None:
    if has_pictures():
        curve = watch.steps, watch.name, watch.quality
        training_picture(draft / "training.png", watch.logged, watch.losses, *curve, teacher=reached)
        if search is not None:
            plan_picture(search, draft / "plan.png")


def _command(teacher: Any, **options: Any) -> list[str]:
    """A command line that does the same, for the record; options that are None or False are left out."""
    source = os.fspath(teacher) if isinstance(teacher, (str, os.PathLike)) else "TEACHER"
    command = ["kronecker-transformers", "distill", source]
    for name, value in options.items():
        if value is not None and value is not False:
            shown = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [shown])]
    return command


def _speeds(models: Mapping[str, PreTrainedModel], batches: list[dict[str, Tensor]]) -> list[float]:
    """Examples per second of each, all in turn."""
    device = next(iter(models.values())).device
    some = list(islice(batches, max(1, TIMED // len(next(iter(batches[0].values()))))))
    number = sum(len(batch["input_ids"]) for batch in some)

    def run(model: PreTrainedModel) -> None:
        causal = {"use_cache": False} if family_of(model).causal else {}
        for batch in some:
            model(**{name: value.to(model.device) for name, value in batch.items() if "label" not in name}, **causal)

    with torch.inference_mode():
        seconds = in_turn(
            {name: partial(run, model) for name, model in models.items()}, ROUNDS, warmup=1, device=device
        )
    return [number / statistics.median(times) for times in seconds.values()]
