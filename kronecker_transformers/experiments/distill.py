"""The main job in one go: a dense teacher and plain text in, a small student with its card out.

The plan is searched and calibrated on the text, then the student is distilled on it: on the teacher's hidden states, on
its outputs where it has a head, and on the text itself where it is a language model. A part of the text is held out; on
it teacher and student are compared in the terms of what the teacher is used for.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    default_data_collator,
)

from ..checkpoint.files import check_new_folder, new_folder, to_json, write_text
from ..checkpoint.load import source_name, write_checkpoint
from ..checkpoint.sentence_modules import encoder_settings
from ..checkpoint.teachers import check_teacher
from ..compression.compress import compress
from ..compression.plan_file import write_plan
from ..compression.search import PlanSearch
from ..display import has_pictures, plan_picture, training_picture
from ..distillation import DistillationArguments, DistillationTrainer, Objective
from ..evaluation.cost import Report
from ..evaluation.timing import environment, in_turn
from ..hub.card import model_card
from ..models.factor_plan import FactorPlan
from ..models.kronecker_family import Head, family_of, heads_of, longest_sequence
from ..tasks.agreement import Judge, judge_for
from ..tasks.language_modeling import (
    Example,
    TextSource,
    TextStream,
    block_examples,
    masked_examples,
    sentence_examples,
)
from .run import check_special_tokens

HELD_OUT_SHARE, HELD_OUT, WATCHED = 0.1, 2000, 500
"""Share of the documents that is held out; examples of it for the end, and to watch meanwhile."""
CALIBRATION = 512
"""Sentences on which the plan is searched and the factors are fitted."""
LOOKS = 12
"""Points of the curves."""
TRIED = 8
"""Batches on which the pace of this machine is measured."""
TIMED, ROUNDS = 256, 5
"""Examples that are timed at the end, and how often."""
FIDELITY = (
    "; fidelity is the Spearman correlation between the cosine similarities that teacher and student give to 20,000 "
    "random pairs"
)
RATE, HIDDEN = 1e-3, 384
"""Learning rate of a model of this hidden size; it falls with the square of the size, as found at 384 and 768."""


@dataclass(frozen=True)
class Distilled:
    """A finished student.

    Attributes:
        model, tokenizer: the student.
        report: its sizes, beside the teacher's.
        rows: what was measured, by name, for each of `models`.
        training: steps, samples, tokens, seconds, objective.
        folder: where it is saved, with plan, records, pictures and card.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: Report
    rows: Mapping[str, list[float]]
    training: Mapping[str, Any]
    folder: Path
    models: tuple[str, ...] = ("teacher", "not distilled", "student")


@dataclass(frozen=True)
class _Task:
    """How text becomes examples for a teacher, and what its student learns from them."""

    batch: int
    length: int
    objective: str
    weights: Mapping[str, Any]
    examples: Callable[[TextSource, int], Iterable[Example]]
    collate: Callable[[list[Example]], Any]
    warmup: float = 0.1
    needs: tuple[str, ...] = field(default=("pad",))


def distill(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    text: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    ratio: float | None = None,
    plan: str | Mapping[str, Any] = "search",
    minutes: float | None = None,
    steps: int | None = None,
    column: str = "text",
    base_model: str | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    show: Callable[[str], object] | None = None,
) -> Distilled:
    """Compress a teacher and distil its student on plain text, without labels.

    A classifier is distilled on its own logits and hidden states, a language model on its text too, and a model without
    a head as a sentence encoder.

    Args:
        teacher: a name on the Hub, a folder, or a loaded model, with any head that is supported.
        text: a file with one sentence or document per line, a table (.csv, .tsv, .json, .jsonl, .parquet), or a dataset
            of the Hub; a tenth of it is held out.
        output: new folder for the student.
        ratio: how many times smaller the base model becomes; default: that of the family's first preset.
        plan: as for `compress`.
        minutes: of distillation, at most; default: 30, without `steps`.
        steps: of distillation, instead.
        column: of a table or dataset.
        base_model: name of the teacher on the Hub, for the card; default: that under which it was loaded.
        learning_rate: of the factors; default: 1e-3 for a hidden size up to 384, less for a larger one.
        seed: of order, masks and dropout.
        tokenizer: of a teacher that is a loaded model.
        progress: show progress bars on standard error.
        show: called with a line now and then.

    Returns:
        The student and what was measured; all of it is saved in `output`, or nothing.

    Raises:
        TypeError, ValueError, OSError: as `compress`; both minutes and steps, or too little text.
    """
    say = show or (lambda line: None)
    target = check_new_folder(output)
    if minutes is not None and steps is not None:
        raise ValueError(f"minutes={minutes} were given beside steps={steps}; give one of both")
    for name, value in (("minutes", minutes), ("steps", steps), ("learning_rate", learning_rate)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number above 0; give another")
    source = TextSource((os.fspath(text),), column=column)
    dense, tokenizer = check_teacher(teacher, tokenizer)
    if tokenizer is None:
        raise ValueError("the teacher comes without a tokenizer; save its tokenizer in the same folder")
    dense = dense.eval()
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    task = _task_for(dense, tokenizer)
    check_special_tokens(tokenizer, *task.needs)
    held_out, train = source.part(0, HELD_OUT_SHARE), source.part(HELD_OUT_SHARE, 1)
    sentences = held_out.lines(HELD_OUT + WATCHED)
    kept = list(islice(task.examples(held_out, seed), HELD_OUT + WATCHED))
    if len(sentences) < 10 or len(kept) < 2:
        raise ValueError(
            f"text {os.fspath(text)!r} gives {len(sentences)} held-out lines and {len(kept)} examples; at least some "
            "hundred lines are needed in all, and some thousand do well"
        )
    lines = train.lines(20 * CALIBRATION)
    calibration = lines[:: max(1, len(lines) // CALIBRATION)][:CALIBRATION]  # from all over the beginning

    searched = plan == "search" if isinstance(plan, str) else False
    asked = family_of(dense).default_ratio if ratio is None else ratio
    say(f"Compression: {f'plan searched for a ratio of {asked:g}' if searched else 'plan as given'}, factors "
        f"calibrated on {len(calibration):,} lines")  # fmt: skip
    result = compress(dense, plan, ratio=ratio, calibration=calibration, tokenizer=tokenizer, progress=progress)
    student = result.model.requires_grad_(True)
    undistilled = copy.deepcopy(student).eval()

    few = len(sentences) // 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of masks
        batches = [_batch(task, kept[i : i + task.batch]) for i in range(0, len(kept), task.batch)]
    cut = max(1, len(batches) // 5)
    watched = judge_for(dense, tokenizer, sentences[:few], batches[:cut], task.length)
    watch = _Watch(watched, say)
    judge = judge_for(dense, tokenizer, sentences[few:], batches[cut:] or batches, task.length)
    stream = TextStream(partial(task.examples, train), seed, group=task.batch)
    training = _train(student, dense, task, stream, minutes, steps, learning_rate, seed, watch, say)

    models = {"teacher": dense, "not distilled": undistilled, "student": student.eval()}
    found = [judge(model) for model in models.values()]
    rows: dict[str, list[float]] = {"parameters": [model.num_parameters() for model in models.values()]}
    rows["megabytes"] = [sum(p.nbytes for p in model.parameters()) / 1e6 for model in models.values()]
    rows["examples per second"] = _speeds(models, batches)
    rows |= {key: [values[key] for values in found] for key in found[0]}
    record = {
        "options": {
            "teacher": source_name(dense.config.name_or_path or "") or None,
            "data": source_name(os.fspath(text)),
            "command": _command(teacher, text, ratio, plan, minutes, steps, seed),
        },
        "models": list(models),
        "rows": rows,
        "protocol": f"{len(sentences) - few:,} held-out lines{'' if heads_of(dense) else FIDELITY}",
        "training": training,
        "environment": environment(),
    }
    reached = next(iter(watched(dense).values()))
    _save(target, student, tokenizer, record, base_model, result.search, watch, reached)
    return Distilled(student, tokenizer, result.report, rows, training, target)


def _command(
    teacher: Any, text: Any, ratio: float | None, plan: Any, minutes: float | None, steps: int | None, seed: int
) -> list[str]:
    """A command line that does the same, for the record."""
    named = isinstance(teacher, (str, os.PathLike))
    known = {"--ratio": ratio, "--minutes": minutes, "--steps": steps, "--seed": seed or None}
    given = [str(part) for name, value in known.items() if value is not None for part in (name, value)]
    given += [] if plan == "search" else ["--plan", plan if isinstance(plan, str) else "plan.yaml"]
    return [
        "kronecker-transformers",
        "distill",
        os.fspath(teacher) if named else "TEACHER",
        "--text",
        os.fspath(text),
        *given,
    ]


def _task_for(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> _Task:
    heads, longest = heads_of(teacher), longest_sequence(teacher)
    kind = heads[0].kind if heads else None
    pad = DataCollatorWithPadding(tokenizer)
    if kind is None:
        settings = encoder_settings(teacher, tokenizer)
        length = min(longest, settings.max_length or 128, 128)
        make = partial(_sentences, tokenizer, length, settings.prompt)
        return _Task(64, length, "sentence_encoder", {}, make, pad, warmup=0.5)
    if kind == "next_token":
        length = min(longest, 256)
        make = partial(_blocks, tokenizer, length)
        return _Task(16, length, "kngpt2", {}, make, default_data_collator, needs=("eos",))
    length = min(longest, 128)
    # chosen on the dev sets of STS-B and MRPC (benchmarks/glue.py)
    weights = {"attention_mse_weight": 0.05, "logits_weight": 0.05, "supervised_weight": 0.0}
    if kind == "words":
        collate = partial(_masked, DataCollatorForLanguageModeling(tokenizer), heads)
        weights["supervised_weight"] = 0.05
        make = partial(_masked_text, tokenizer, length)
        return _Task(32, length, "kronecker_bert", weights, make, collate, needs=("pad", "mask", "cls", "sep"))
    if kind == "choices":
        choices = DataCollatorForMultipleChoice(tokenizer)
        return _Task(16, length, "kronecker_bert", weights, partial(_choices, tokenizer, length), choices)
    return _Task(32, length, "kronecker_bert", weights, partial(_sentences, tokenizer, length, ""), pad)


def _sentences(tokenizer: Any, length: int, prompt: str, source: TextSource, seed: int) -> Iterator[Example]:
    return sentence_examples(source, tokenizer, length, prompt)


def _blocks(tokenizer: Any, length: int, source: TextSource, seed: int) -> Iterator[Example]:
    return block_examples(source, tokenizer, length)


def _masked_text(tokenizer: Any, length: int, source: TextSource, seed: int) -> Iterator[Example]:
    return masked_examples(source, tokenizer, length, next_sentence=False, seed=seed)


def _choices(tokenizer: Any, length: int, source: TextSource, seed: int) -> Iterator[Example]:
    """Each line beside the one that follows it, as two choices."""
    for pair in pairwise(sentence_examples(source, tokenizer, length)):
        yield {**{name: [example[name] for example in pair] for name in pair[0]}, "labels": 0}  # nobody looks at it


def _masked(mask: Any, heads: tuple[Head, ...], examples: list[Example]) -> Any:
    """A batch with masks; what follows what is not known."""
    batch = mask(examples)
    for head in heads[1:]:
        batch[head.labels] = torch.full((len(examples),), -100)
    return batch


def _batch(task: _Task, examples: list[Example]) -> dict[str, Tensor]:
    return dict(task.collate([dict(example) for example in examples]))


class _Watch(TrainerCallback):
    """Looks at the student now and then: the losses, and its quality on held-out text."""

    def __init__(self, judge: Judge, say: Callable[[str], object]) -> None:
        self.steps: list[int] = []
        self.quality: list[float] = []
        self.logged: list[int] = []
        self.losses: dict[str, list[float]] = {}
        self.name = ""
        self._judge, self._say = judge, say

    def look(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Add a point to the curve."""
        training = model.training
        values = self._judge(model.eval())
        model.train(training)
        self.name, value = next(iter(values.items()))
        self.steps.append(step)
        self.quality.append(value)
        self._say(f"  step {step:5,d} of {steps:,}: {self.name} {value:.4g}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """At each log of the trainer."""
        if "loss" in logs:
            self.logged.append(state.global_step)
            for term in args.weights():
                self.losses.setdefault(term, []).append(logs[term])
            self.look(model, state.global_step, state.max_steps)


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: _Task,
    stream: TextStream,
    minutes: float | None,
    steps: int | None,
    learning_rate: float | None,
    seed: int,
    watch: _Watch,
    say: Callable[[str], object],
) -> dict[str, Any]:
    limit = (30.0 if minutes is None else minutes) if steps is None else None
    rate = RATE * min(1.0, (HIDDEN / student.config.hidden_size) ** 2) if learning_rate is None else learning_rate
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch, objective=task.objective, **task.weights, max_steps=steps or 1, max_minutes=limit,
            per_device_train_batch_size=task.batch, learning_rate=rate, warmup_steps=task.warmup, dropout=0.0,
            seed=seed, save_strategy="no", include_num_input_tokens_seen="non_padding", report_to=[],
            disable_tqdm=True, remove_unused_columns=False, accelerator_config={"dispatch_batches": False},
        )  # fmt: skip
        if steps is None:
            batches = [_batch(task, list(islice(examples, task.batch))) for examples in [iter(stream)] * TRIED]
            arguments.max_steps = affordable_steps(student, teacher, arguments, batches, limit or 0)
        arguments.logging_steps = max(1, arguments.max_steps // LOOKS)
        planned = f"{arguments.max_steps:,} steps" + (f" in at most {limit:g} minutes" if limit else "")
        say(f"Distillation: {planned}, {task.batch} examples each")
        trainer = DistillationTrainer(
            student, teacher, arguments, train_dataset=stream, data_collator=task.collate, callbacks=[watch]
        )
        trainer.remove_callback(PrinterCallback)
        watch.look(student, 0, arguments.max_steps)
        trainer.train()
        if trainer.state.global_step > watch.steps[-1]:  # its time was over
            watch.look(student, trainer.state.global_step, arguments.max_steps)
        return trainer.training_summary()


def affordable_steps(
    student: PreTrainedModel, teacher: PreTrainedModel, arguments: Any, batches: list[Any], minutes: float
) -> int:
    """How many steps of distillation this machine makes in so many minutes, from a try with a copy of the student.

    It is only a plan: the training ends by time if the machine has become slower.
    """
    copied = copy.deepcopy(student).to(arguments.device).train()
    objective = Objective(copied, teacher.to(arguments.device), arguments.weights())
    objective.attach(copied)
    optimizer = torch.optim.AdamW(copied.parameters())
    seconds = []
    for batch in [*batches, *batches]:  # the first time to warm up
        batch = {name: value.to(arguments.device) for name, value in batch.items() if isinstance(value, Tensor)}
        start = time.perf_counter()
        losses = objective.values(copied, batch, objective.count(batch))
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    objective.detach()
    return max(LOOKS, int(60 * minutes / statistics.mean(seconds[len(batches) :])))


def _speeds(models: Mapping[str, PreTrainedModel], batches: list[dict[str, Tensor]]) -> list[float]:
    """Examples per second of each, all in turn."""
    some = list(islice(batches, max(1, TIMED // len(next(iter(batches[0].values()))))))
    number = sum(len(batch["input_ids"]) for batch in some)

    def run(model: PreTrainedModel) -> None:
        causal = {"use_cache": False} if family_of(model).causal else {}
        for batch in some:
            model(**{name: value.to(model.device) for name, value in batch.items() if "label" not in name}, **causal)

    with torch.inference_mode():
        seconds = in_turn({name: partial(run, model) for name, model in models.items()}, ROUNDS, warmup=1)
    return [number / statistics.median(times) for times in seconds.values()]


def _save(
    target: Path,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    base_model: str | None,
    search: PlanSearch | None,
    watch: _Watch,
    reached: float,
) -> None:
    """All of it, or nothing."""
    with new_folder(target) as draft:
        write_checkpoint(draft, student, tokenizer)
        write_plan(draft / "plan.yaml", FactorPlan(student.config.factor_plan))
        write_text(draft / "results.json", to_json(record))
        curve = watch.steps, watch.name, watch.quality
        if has_pictures():
            training_picture(draft / "training.png", watch.logged, watch.losses, *curve, teacher=reached)
            if search is not None:
                plan_picture(search, draft / "plan.png")
        write_text(draft / "README.md", str(model_card(draft, f"your-name/{target.name}", base_model=base_model)))
