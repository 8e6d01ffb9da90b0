"""The word embedding alone as a product of low rank: sizes of multilingual encoders, and what all-MiniLM loses.

    python benchmarks/embedding.py --data DIR --work WORK > benchmarks/logs/embedding.txt

DIR holds the folders glue (the official files) and text. Sizes are counted on models without weights. all-MiniLM-L6-v2,
without its pooler, is compressed with calibrated factors for its embedding, at three ranks, and by the search with as
many parameters, where frequent words get a product of their own; one is distilled for --minutes on running text and the
sentences of five GLUE tasks, without labels (`kronecker_transformers.distill`, all parameters train, one seed). STS-B:
Spearman correlation on the dev set. SST-2: dev accuracy of a logistic regression on embeddings of 4,000 sentences. (In
the run of the log the objective had hidden states and outputs of the embedding beside the sentence embeddings, weight
1, AdamW alone, and no sentence was augmented.) Finished runs are lines of logs/embedding.jsonl, and are not made again.
--table shows them without a run.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RunLog, prepared_text, probe, runs_parser
from encoders import similarity, teacher
from rich.console import Console
from transformers import BertConfig, XLMRobertaConfig

from kronecker_transformers import KroneckerBertModel, KroneckerXLMRobertaModel, compress, distill
from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.lessons import text_lesson
from kronecker_transformers.tasks.glue import load_glue
from kronecker_transformers.tasks.sentences import encode
from kronecker_transformers.tasks.text import TextSource

LOG = RunLog("embedding")
SPLITS = ["train", "validation"]
RANKS = (128, 64, 32)
SMALL: dict[str, Any] = {"vocab_size": 250_037, "hidden_size": 384, "intermediate_size": 1536}
MODELS: dict[str, tuple[Any, Any]] = {
    "all-MiniLM-L6-v2": (
        KroneckerBertModel, BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    ),
    "multilingual MiniLM-L12, multilingual-e5-small": (KroneckerBertModel, BertConfig(**SMALL)),
    "XLM-R base": (
        KroneckerXLMRobertaModel, XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1)
    ),
}  # fmt: skip


def plan(config: Any, rank: int | None) -> dict[str, tuple[int, int, int]]:
    """The embedding at one rank; none for the dense model."""
    return {} if rank is None else {"embeddings.word_embeddings": (config.vocab_size, 1, rank)}


def sizes() -> dict[str, list[str]]:
    """Parameters of encoders without a pooler, dense and at each rank."""
    rows = {}
    for name, (model_class, config) in MODELS.items():
        counts = []
        for rank in (None, *RANKS):
            with torch.device("meta"):
                model = model_class(
                    model_class.config_class.from_dense(config, plan(config, rank)), add_pooling_layer=False
                )
            counts.append(model.num_parameters())
        dense, *others = counts
        rows[name] = [f"{dense / 1e6:.1f} M, {4 * dense / 1e6:.0f} MB"]
        rows[name] += [f"{n / 1e6:.1f} M, {4 * n / 1e6:.0f} MB, {dense / n:.2f}x" for n in others]
    return rows


def perform(run: dict[str, Any], text: Path, options: Any) -> None:
    """Make and judge one student: of a rank, or with the parameters of one; without a rank, the teacher."""
    model, tokenizer = teacher()
    rank, minutes = run.get("rank"), run["minutes"]
    if not minutes and (rank or "parameters_of_rank" in run):
        lesson = text_lesson(model, tokenizer, TextSource((str(text),)), 0)
        texts = {"calibration": lesson.calibration, "tokenizer": tokenizer}
        if rank:
            student = compress(model, plan(model.config, rank), **texts).model
        else:
            m, n = model.get_input_embeddings().weight.shape
            smaller = model.num_parameters() - m * n + run["parameters_of_rank"] * (m + n)
            ratio = model.num_parameters() / smaller
            student = compress(model, "low-rank", ratio=ratio, only="embedding", counted=lesson.counted, **texts).model
    elif not minutes:
        student = model
    else:
        folder = options.work / f"rank-{rank}"
        shutil.rmtree(folder, ignore_errors=True)
        distill(
            model, text, folder, plan=plan(model.config, rank), minutes=minutes, tokenizer=tokenizer,
            base_model="sentence-transformers/all-MiniLM-L6-v2",
        )  # fmt: skip
        student, _ = load_student(folder)
    scores = {
        "stsb": similarity(student.eval(), tokenizer, options.data),
        "sst2": probe(partial(encode, student, tokenizer), load_glue("sst2", options.data / "glue", SPLITS)),
    }
    LOG.add(
        run, {"parameters": student.num_parameters(), "plan": student.config.to_dict().get("factor_plan"), **scores}
    )


def table(console: Console) -> None:
    """Sizes, and all finished runs."""
    console.print(LOG.environments(), highlight=False)
    console.print(results_table("Encoders", ["dense", *(f"rank {rank}" for rank in RANKS)], sizes()))
    rows = {}
    for line in LOG.lines():
        how = f", {line['minutes']:g} minutes" if line["minutes"] else ", not distilled"
        name = "teacher"
        if line.get("rank"):
            name = f"embedding of rank {line['rank']}{how}"
        elif "parameters_of_rank" in line:
            entry = line["plan"]["embeddings.word_embeddings"]
            own = f"{entry['frequent_terms']} more for {entry['frequent']:,} words"
            name = f"parameters of rank {line['parameters_of_rank']}: rank {entry['terms']}, {own}{how}"
        rows[name] = [f"{line['parameters']:,}", f"{line['stsb']:.2f}", f"{line['sst2']:.2f}"]
    console.print(results_table("all-MiniLM-L6-v2", ["parameters", "STS-B dev", "SST-2 dev"], rows))


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("The word embedding alone.", "text and students")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (default: %(default)s)")
    options = parser.parse_args()
    if not options.table:
        text = prepared_text(options)
        runs: list[dict[str, Any]] = [{"rank": rank, "minutes": 0.0} for rank in (None, *RANKS)]
        runs += [{"rank": 64, "minutes": options.minutes}]
        runs += [{"parameters_of_rank": rank, "minutes": 0.0} for rank in RANKS]
        for run in runs:
            if not LOG.find(run):
                perform(run, text, options)
    table(Console(width=150))


if __name__ == "__main__":
    main()
