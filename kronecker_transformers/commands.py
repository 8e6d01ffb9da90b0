"""What the commands of the command line do: each calls the package, and shows what it found."""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import display
from .checkpoint.files import check_file, check_new_folder, to_json, write_text
from .checkpoint.load import load_model, load_student, save_folder
from .checkpoint.teachers import check_teacher
from .compression.activations import Text
from .compression.compress import compress
from .compression.latency import Runtime
from .compression.plan_file import check_plan_path, read_plan
from .compression.search import search_plan
from .evaluation.cost import Report, describe, recorded_errors
from .evaluation.timing import Comparison, benchmark
from .export.dense import to_dense
from .hub.card import has_own_card, model_card
from .hub.push import Pushed, card_metadata, check_branch, files_to_push, full_name, push, push_space
from .tasks.text import TextSource


def run_distill(arguments: argparse.Namespace, console: Console) -> None:
    """Search, compress and distil, all in one."""
    from .experiments.distill import distill

    found = distill(
        arguments.teacher,
        arguments.text,
        arguments.output,
        task=arguments.task,
        data_dir=arguments.data,
        ratio=arguments.ratio,
        plan=None if arguments.plan is None else read_plan(arguments.plan),
        only=arguments.only,
        layers=arguments.layers,
        minutes=arguments.minutes,
        steps=arguments.steps,
        column=arguments.text_column,
        learning_rate=arguments.learning_rate,
        bf16=arguments.bf16,
        frequent_words=arguments.frequent_words,
        seed=arguments.seed,
        progress=True,
        show=lambda line: console.print(line, highlight=False),
    )
    console.print(display.distillation_table(found.training["steps"], found.models, found.rows))
    console.print(f"Saved in {arguments.output}, with its model card, plan, plots and record.")


def run_compress(arguments: argparse.Namespace, console: Console) -> None:
    """Factor a dense model."""
    check_new_folder(arguments.output)
    for option in ("calibration_column", "calibration_texts"):
        if getattr(arguments, option) is not None and not arguments.calibration:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is of a calibration text; give --calibration, or leave --{name} out")
    plan = None if arguments.plan is None else read_plan(arguments.plan)
    teacher, tokenizer, texts = arguments.teacher, None, None
    if arguments.calibration:
        teacher, tokenizer, texts = _calibration(arguments)
    result = compress(
        teacher, plan, ratio=arguments.ratio, only=arguments.only, calibration=texts, tokenizer=tokenizer, progress=True
    )
    result.save_pretrained(arguments.output)
    _show(result.report, console)
    if result.tokenizer is None:
        console.print("The teacher came without a tokenizer, so the student has none.")
    console.print(f"Saved in {arguments.output}. Compression alone loses much of the quality: distil it before use.")


def _calibration(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, list[Text]]:
    """The teacher, its tokenizer, and as much text as was asked for, or as is enough for this teacher."""
    from .experiments.lessons import calibration_lines

    number = arguments.calibration_texts
    if number is not None and number < 1:
        raise ValueError(f"calibration-texts={number} must be at least 1; leave it out to have enough of them")
    source = TextSource((arguments.calibration,), column=arguments.calibration_column or "text")
    teacher, tokenizer = check_teacher(arguments.teacher)
    if tokenizer is None:
        raise ValueError(f"teacher {arguments.teacher!r} comes without a tokenizer; save its tokenizer in its folder")
    return teacher, tokenizer, calibration_lines(source, teacher, tokenizer, number=number)


def run_search(arguments: argparse.Namespace, console: Console) -> None:
    """Find the best plan for a budget."""
    check_plan_path(arguments.output)
    if arguments.picture:
        display.check_picture(arguments.picture)
    names = ("batch", "length", "engine", "int8")
    timed = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    runtime = Runtime(**timed) if timed else None
    teacher, tokenizer, texts = _calibration(arguments)
    found = search_plan(
        teacher,
        texts,
        tokenizer=tokenizer,
        ratio=arguments.ratio,
        parameters=arguments.parameters,
        size_bytes=arguments.size_bytes,
        flops=arguments.flops,
        milliseconds=arguments.milliseconds,
        runtime=runtime,
        only=arguments.only,
        low_rank=arguments.low_rank,
        progress=True,
    )
    found.save(arguments.output)
    console.print(display.plan_table(found))
    console.print(display.plan_totals(found))
    if found.latency:
        console.print(str(found.latency), highlight=False)
    if arguments.picture:
        display.plan_picture(found, arguments.picture)
    console.print(f"Saved in {arguments.output}; edit it as you like, then compress --plan {arguments.output}.")


def run_inspect(arguments: argparse.Namespace, console: Console) -> None:
    """Show a factored model."""
    model, _ = load_student(arguments.model)
    report = describe(model)
    errors = recorded_errors(arguments.model, report.factors_sha256)
    _show(report.with_errors(errors), console)
    if not errors:
        console.print(
            "No approximation errors to show: the weights were trained after compression, or have no record of it."
        )


def run_export(arguments: argparse.Namespace, console: Console) -> None:
    """Write a model as a stock dense one, or as graphs."""
    check_new_folder(arguments.output)
    graphs = "onnx", "openvino"
    formats = {"int8": graphs, "int4": ("onnx",), "fp16": ("onnx",), "text": graphs, "text_column": graphs}
    for option, able in formats.items():
        if getattr(arguments, option) and arguments.format not in able:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for --format {' or '.join(able)}; add that, or leave --{name} out")
    if arguments.text_column is not None and not arguments.text:
        raise ValueError("--text-column is of a text; give --text, or leave --text-column out")
    if arguments.format != "dense":
        _export_graphs(arguments, console)
        return
    model, tokenizer = load_student(arguments.model)
    save_folder(arguments.output, to_dense(model), tokenizer)
    console.print(f"Dense twin saved in {arguments.output}.")


def _export_graphs(arguments: argparse.Namespace, console: Console) -> None:
    from .export.onnx import export_graphs
    from .export.parity import SENTENCES

    if arguments.format == "onnx":
        forms = ["fp32", *(form for form in ("int8", "int4", "fp16") if getattr(arguments, form))]
        runtime = "onnxruntime 1.23 or newer"
    else:
        forms = ["openvino", "openvino_int8"] if arguments.int8 else ["openvino"]
        runtime = "openvino"
    column = arguments.text_column or "text"
    texts = TextSource((arguments.text,), column=column).lines(32) if arguments.text else SENTENCES
    model, tokenizer = load_model(arguments.model)
    console.print("The model is traced and written; this takes up to a minute.")
    found = export_graphs(model, tokenizer, arguments.output, forms, texts=texts)
    console.print(display.exported_table(model, found))
    console.print(f"Saved in {arguments.output}. The graphs run with {runtime}, without this package.")


def run_benchmark(arguments: argparse.Namespace, console: Console) -> None:
    """Compare two models on this machine."""
    if arguments.json:
        check_file(arguments.json)
    if arguments.picture:
        display.check_picture(arguments.picture)
    sizes = {name: getattr(arguments, name) for name in ("batch", "length", "rounds")}
    found: Comparison
    if arguments.runtime in ("onnxruntime", "openvino"):
        if arguments.device != "cpu":
            raise ValueError(f"--device {arguments.device} is for PyTorch; leave it out with {arguments.runtime}")
        from .evaluation.sessions import benchmark_sessions

        how = {"engine": arguments.runtime, "dtype": arguments.dtype, "int8": arguments.int8}
        found = benchmark_sessions(arguments.model, arguments.against, **how, **sizes)
    else:
        if arguments.int8:
            raise ValueError("--int8 is for --runtime onnxruntime or openvino; add that, or leave --int8 out")
        options = {"dtype": arguments.dtype, "device": arguments.device}
        compiled = arguments.runtime == "torch-compile"
        found = benchmark(arguments.model, arguments.against, compiled=compiled, **options, **sizes)
    if arguments.json:
        write_text(arguments.json, to_json(found.to_dict()))
    console.print(found.environment, highlight=False)
    console.print(display.comparison_table(found))
    console.print(found.verdict(), highlight=False)
    if arguments.picture:
        display.comparison_picture(found, arguments.picture)


def run_push(arguments: argparse.Namespace, console: Console) -> None:
    """Publish a model."""
    check_branch(arguments.revision, arguments.create_pr)
    name = full_name(arguments.repository)
    twin_name = full_name(f"{name}-dense") if arguments.with_dense_twin else ""
    known: dict[str, Any] = {key: getattr(arguments, key) for key in ("base_model", "license", "language")}
    own = has_own_card(arguments.folder)
    if own and any(known.values()):
        given = " ".join(f"--{key.replace('_', '-')}" for key, value in known.items() if value)
        raise ValueError(
            f"{given}: README.md in {arguments.folder!r} is your own, and is sent as it is; write it there instead"
        )
    known["look_up"] = cache(card_metadata)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(arguments.folder)}
        cards = {name: None if own else model_card(arguments.folder, name, has_twin=arguments.with_dense_twin, **known)}
        if arguments.with_dense_twin:
            model, tokenizer = load_student(arguments.folder)
            folders[twin_name] = save_folder(Path(scratch) / "twin", to_dense(model), tokenizer)
            cards[twin_name] = model_card(
                folders[twin_name], twin_name, twin_of=name, records=arguments.folder, **known
            )
        for repository, folder in folders.items():
            console.print(display.files_table(repository, files_to_push(folder, repository, card=cards[repository])))
            if not arguments.dry_run:
                done = push(
                    folder,
                    repository,
                    private=arguments.private,
                    revision=arguments.revision,
                    create_pr=arguments.create_pr,
                    card=cards[repository],
                )
                _show_push(done, console)
        if arguments.dry_run:
            console.print("Nothing was sent.")


def run_push_space(arguments: argparse.Namespace, console: Console) -> None:
    """Publish a Space."""
    done = push_space(
        arguments.folder, arguments.repository, arguments.model, arguments.teacher, private=arguments.private
    )
    _show_push(done, console)


def _show_push(done: Pushed, console: Console) -> None:
    console.print(done.url if done.is_new else f"{done.url} holds all of this already.", soft_wrap=True)


def _show(report: Report, console: Console) -> None:
    console.print(display.layers_table(report))
    console.print(display.totals_table(report))
