"""The command line: distill, compress, search, inspect, export, benchmark, push."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from . import __version__, commands, display
from .compression.latency import ENGINES, Runtime
from .evaluation.timing import DTYPES
from .models.kronecker_family import FAMILIES


def _parser() -> argparse.ArgumentParser:
    families = {config.dense_config_class.model_type: config.family for config in FAMILIES.values()}
    ratios = ", ".join(f"{family.default_ratio} for {name}" for name, family in families.items())
    presets = "; ".join(f"{name}: {', '.join(family.presets)}" for name, family in families.items() if family.presets)
    parser = argparse.ArgumentParser(
        prog="kronecker-transformers",
        description="Make BERT, GPT-2 and their kin smaller and faster: layers become sums of Kronecker products.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = subparsers.add_parser(
        "distill",
        help="compress a model and distil it on unlabelled text (start here)",
        description="Search for a plan, compress the model with it and distil the student, all on unlabelled text.",
    )
    command.add_argument("teacher", metavar="TEACHER", help="dense model: name on the Hub, or local folder")
    lesson = command.add_mutually_exclusive_group(required=True)
    lesson.add_argument(
        "--text",
        metavar="FILE",
        help="a file with one sentence or document per line, a table (.csv, .tsv, .json, .jsonl, .parquet), or a "
        "dataset of the Hub; a tenth of it is held out",
    )
    command.add_argument(
        "--text-column", default="text", metavar="NAME", help="text column of a table or dataset (default: %(default)s)"
    )
    lesson.add_argument("--task", metavar="NAME", help="a GLUE task, for a classifier that was fine-tuned on it")
    command.add_argument("--data", metavar="DIR", help="folder of the official GLUE files (default: the Hub)")
    command.add_argument("--output", required=True, metavar="DIR", help="new folder for the student")
    command.add_argument(
        "--ratio",
        type=float,
        metavar="X",
        help=f"how many times fewer parameters the base model gets (default: {ratios})",
    )
    command.add_argument(
        "--plan", help="low-rank, to search plans of low rank only; or a preset or plan file, instead of a search"
    )
    length = command.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=float,
        metavar="X",
        help="minutes of training at most, without search and calibration (default: 30)",
    )
    length.add_argument("--steps", type=int, metavar="N", help="training steps, instead of --minutes")
    command.add_argument(
        "--learning-rate",
        type=float,
        metavar="X",
        help="peak learning rate (default: 1e-3, lower for hidden sizes above 384)",
    )
    command.add_argument(
        "--layers",
        type=_layers,
        metavar="N",
        help="how many of the teacher's layers the student keeps, evenly spaced, or which, as 0,2,5 (of one: 2,)",
    )
    command.add_argument(
        "--no-frequent-words",
        action="store_false",
        dest="frequent_words",
        help="sentence encoders: give frequent words no extra parameters in the embedding; for texts of many kinds",
    )
    command.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    command.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="train in bfloat16 (default: on a CPU that multiplies in it, with AMX or AVX512-BF16)",
    )
    _add_only(command)
    command.set_defaults(run=commands.run_distill)

    command = subparsers.add_parser(
        "compress",
        help="factor a dense model and save the result",
        description="Factor the layers of a dense model and save the result.",
    )
    command.add_argument("teacher", metavar="TEACHER", help="dense model: name on the Hub, or local folder")
    command.add_argument(
        "--plan",
        help=f"a preset ({presets}), a YAML or JSON file, or low-rank, to search plans of low rank only (default: the "
        f"first preset; with calibration text, a plan is searched, for a ratio of {ratios})",
    )
    command.add_argument(
        "--ratio", type=float, metavar="X", help="search for the best plan with this ratio; needs --calibration"
    )
    _add_calibration(command, required=False)
    _add_only(command)
    command.add_argument("--output", required=True, metavar="DIR", help="new folder for the factored model")
    command.set_defaults(run=commands.run_compress)

    command = subparsers.add_parser(
        "search",
        help="find the best plan for a budget",
        description="Find the best plan for a budget, or for two, and write it as a file for compress.",
    )
    command.add_argument("teacher", metavar="TEACHER", help="dense model: name on the Hub, or local folder")
    command.add_argument("--ratio", type=float, metavar="X", help="how many times fewer parameters the base model gets")
    command.add_argument("--parameters", type=int, metavar="N", help="parameters of the base model, at most")
    command.add_argument("--size-bytes", type=int, metavar="N", help="bytes of its parameters, at most")
    command.add_argument(
        "--flops", type=float, metavar="N", help="FLOPs of its linear layers for 128 tokens, at most (1e9 is one GFLOP)"
    )
    command.add_argument(
        "--milliseconds", type=float, metavar="X", help="milliseconds of a forward pass on this machine, at most"
    )
    command.add_argument(
        "--batch", type=int, metavar="N", help=f"batch size for --milliseconds (default: {Runtime.batch})"
    )
    command.add_argument(
        "--length", type=int, metavar="N", help=f"tokens of a sequence for --milliseconds (default: {Runtime.length})"
    )
    command.add_argument(
        "--runtime", choices=ENGINES, dest="engine", help="runtime in which --milliseconds is measured (default: torch)"
    )
    command.add_argument(
        "--int8", action="store_true", default=None, help="measure models in int8; needs --runtime onnxruntime"
    )
    command.add_argument("--low-rank", action="store_true", help="search plans of low rank only")
    _add_calibration(command, required=True)
    _add_only(command)
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="plan file, .yaml or .json")
    command.add_argument("--picture", metavar="FILE", help="PNG of predicted error against size")
    command.set_defaults(run=commands.run_search)

    command = subparsers.add_parser(
        "inspect",
        help="show the layers and totals of a factored model",
        description="Show the layers and totals of a factored model.",
    )
    command.add_argument("model", metavar="DIR", help="folder of the factored model")
    command.set_defaults(run=commands.run_inspect)

    for name in ("export", "expand"):
        command = subparsers.add_parser(
            name,
            help="write a model for ONNX Runtime, or as a stock dense model"
            if name == "export"
            else "deprecated alias of export",
            description="Write another form of a model. onnx: graphs for ONNX Runtime, on a CPU or in a browser. "
            "openvino: graphs for OpenVINO. dense: the factors multiplied out, a stock model with the same outputs.",
        )
        command.add_argument("model", metavar="DIR", help="folder of the model; for dense, of a factored one")
        command.add_argument(
            "--format", choices=("dense", "onnx", "openvino"), default="dense", help="(default: %(default)s)"
        )
        for form, help_text in (
            ("int8", "onnx or openvino: also write a graph with 8-bit weights"),
            ("int4", "onnx: also write a graph with 4-bit weights"),
            ("fp16", "onnx: also write a graph in half precision"),
        ):
            command.add_argument(f"--{form}", action="store_true", help=f"for {help_text}")
        command.add_argument(
            "--text",
            metavar="FILE",
            help="for onnx and openvino: compare the graphs with PyTorch on the first 32 sentences or "
            "documents of this file (default: on a few English sentences)",
        )
        command.add_argument("--text-column", metavar="NAME", help="text column of a table or dataset (default: text)")
        command.add_argument("--output", required=True, metavar="DIR", help="new folder for the result")
        command.set_defaults(run=commands.run_export)

    command = subparsers.add_parser(
        "benchmark",
        help="compare size, speed and memory of two models on this machine",
        description="Compare two models on this machine, in turn: size, FLOPs, time, memory, limits.",
    )
    command.add_argument("model", metavar="MODEL", help="name on the Hub, or folder, of a factored or dense model")
    command.add_argument("--against", required=True, metavar="MODEL", help="the model to compare with")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: %(default)s)")
    command.add_argument(
        "--length", type=int, default=128, metavar="N", help="tokens of a sequence (default: %(default)s)"
    )
    command.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(default: %(default)s)")
    command.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    command.add_argument(
        "--runtime",
        choices=("torch", "torch-compile", "onnxruntime", "openvino"),
        default="torch",
        help="(default: %(default)s)",
    )
    command.add_argument("--int8", action="store_true", help="onnxruntime and openvino: both models in int8")
    command.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="timed forward passes of each model (default: %(default)s)"
    )
    command.add_argument("--json", metavar="FILE", help="write the results as JSON")
    command.add_argument("--picture", metavar="FILE", help="PNG of time against size")
    command.set_defaults(run=commands.run_benchmark)

    command = subparsers.add_parser(
        "push",
        help="publish a saved model on the Hub",
        description="Publish a saved model on the Hub, in one commit: weights, tokenizer, and the code that loads it.",
    )
    command.add_argument("folder", metavar="DIR", help="folder of the model")
    command.add_argument("repository", metavar="ORG/NAME", help="target repository; created if it does not exist")
    command.add_argument(
        "--with-dense-twin", action="store_true", help="also publish the equivalent dense model, as ORG/NAME-dense"
    )
    command.add_argument(
        "--base-model", metavar="ORG/TEACHER", help="teacher named in the model card (default: as recorded)"
    )
    command.add_argument("--license", metavar="NAME", help="for the model card (default: that of the teacher's card)")
    command.add_argument("--language", metavar="CODE", help="for the model card (default: that of the teacher's card)")
    command.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    command.add_argument("--revision", metavar="BRANCH", help="(default: main)")
    command.add_argument("--create-pr", action="store_true", help="as a pull request")
    command.add_argument("--dry-run", action="store_true", help="list the files, send nothing")
    command.set_defaults(run=commands.run_push)

    command = subparsers.add_parser(
        "push-space",
        help="publish a Space that shows a published model beside its teacher",
        description="Publish a Space (a Gradio app) that shows a published model beside its teacher.",
    )
    command.add_argument("repository", metavar="ORG/SPACE", help="target repository; created if it does not exist")
    command.add_argument("--model", required=True, metavar="ORG/NAME", help="the factored model on the Hub")
    command.add_argument("--teacher", required=True, metavar="ORG/NAME", help="its teacher on the Hub")
    command.add_argument(
        "--folder",
        default="examples/space",
        metavar="DIR",
        help="folder of the app, in a clone of the repository (default: %(default)s)",
    )
    command.add_argument("--private", action="store_true", default=None, help="create the Space as a private one")
    command.set_defaults(run=commands.run_push_space)
    return parser


def _layers(text: str) -> int | list[int]:
    """A number of layers, or a list of them."""
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of layers nor a list such as 0,2,5 (of one layer: 2,); correct it"
        ) from None
    return numbers if "," in text else numbers[0]


def _add_only(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--only",
        type=lambda text: [part for part in text.split(",") if part],
        metavar="PATTERN",
        help="factor these modules only, and keep all others dense: embedding, or patterns of their names, separated "
        "by commas (default: all)",
    )


def _add_calibration(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument(
        "--calibration",
        required=required,
        metavar="FILE",
        help="text for which the factors are fitted: a file with one sentence or document per line, "
        "a table (.csv, .tsv, .json, .jsonl, .parquet), or a dataset of the Hub",
    )
    command.add_argument(
        "--calibration-column", metavar="NAME", help="text column of a table or dataset (default: text)"
    )
    command.add_argument(
        "--calibration-texts",
        type=int,
        metavar="N",
        help="number of texts used, from the start (default: enough for this teacher, from all over)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        # into a file or a pipe, lines are as long as the longest module names need
        arguments.run(arguments, display.console(None if sys.stdout.isatty() else 110))
    except (OSError, ValueError, TypeError, ImportError, FloatingPointError, torch.OutOfMemoryError) as error:
        message = " ".join(str(error).split())
        print(f"kronecker-transformers {arguments.command}: error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
