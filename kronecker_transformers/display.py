"""Every table and picture that this package shows; the results themselves hold data only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .checkpoint.files import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .compression.search import PlanSearch
    from .evaluation.cost import Report
    from .evaluation.timing import Comparison
    from .export.parity import ExportedFile
    from .hub.files import PublishedFile


def console(width: int | None = None) -> Console:
    """For a terminal; brackets and colons in names are no markup.

    Args:
        width: of the lines, in characters; default: that of the terminal.
    """
    return Console(width=width, markup=False, emoji=False)


def layers_table(report: Report) -> Table:
    """The layers, for a terminal."""
    table = Table(title="Factored layers", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    errors = {"error": "relative_error"}
    if any(layer.output_error is not None for layer in report.layers):
        errors |= {"on text,\nnearest": "nearest_output_error", "on text,\ncalibrated": "output_error"}
    for heading in ("weight", "A", "B", "terms", "parameters", *errors):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        (m, n), (m1, n1), (m2, n2) = layer.weight, layer.A, layer.B
        parameters = layer.terms * (m1 * n1 + m2 * n2)
        known = layer.errors()
        shown = (f"{known[name]:.4f}" if name in known else "-" for name in errors.values())
        table.add_row(layer.name, f"{m}x{n}", f"{m1}x{n1}", f"{m2}x{n2}", str(layer.terms), f"{parameters:,}", *shown)
    return table


def totals_table(report: Report) -> Table:
    """The totals, for a terminal."""
    table = Table(title="Totals", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("dense", "factored", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, name, unit, form in (
        ("parameters", "parameters", 1, "{:,.0f}"),
        ("megabytes", "bytes", 1e6, "{:,.1f}"),
        (f"GFLOPs at length {report.length}, linear layers", "linear_flops", 1e9, "{:,.2f}"),
        (f"GFLOPs at length {report.length}, with attention products", "total_flops", 1e9, "{:,.2f}"),
    ):
        dense, factored = getattr(report.dense, name), getattr(report.factored, name)
        table.add_row(label, form.format(dense / unit), form.format(factored / unit), f"{dense / factored:.2f}x")
    return table


def _how(comparison: Comparison) -> str:
    """Shape, precision, runtime and device of a comparison."""
    compiled = ", compiled" if comparison.compiled else ""
    where = comparison.device if comparison.runtime == "torch" else f"{comparison.runtime} on {comparison.device}"
    return f"{comparison.batch} x {comparison.length} tokens, {comparison.dtype}, {where}{compiled}"


def comparison_table(comparison: Comparison) -> Table:
    """Both models and their ratios, for a terminal."""
    table = Table(title=_how(comparison), box=SIMPLE_HEAD)
    table.add_column("")
    for heading in (comparison.against.name, comparison.model.name, "ratio"):
        table.add_column(heading, justify="right", overflow="fold")
    sides = (comparison.against, comparison.model)
    rows: list[tuple[str, list[float], str]] = [
        ("parameters", [side.parameters for side in sides], "{:,.0f}"),
        ("megabytes", [side.bytes / 1e6 for side in sides], "{:,.1f}"),
        ("GFLOPs", [side.flops / 1e9 for side in sides], "{:,.2f}"),
        ("milliseconds", [side.milliseconds for side in sides], "{:,.2f}"),
    ]
    if all(side.peak_bytes for side in sides):
        rows.append(("peak megabytes of a process", [(side.peak_bytes or 0) / 1e6 for side in sides], "{:,.0f}"))
    for label, values, form in rows:
        table.add_row(label, *map(form.format, values), f"{values[0] / values[1]:.2f}x")
    rates = [1e3 * comparison.batch / side.milliseconds for side in sides]
    table.add_row("sequences per second", *(f"{rate:,.1f}" for rate in rates), f"{rates[1] / rates[0]:.2f}x")
    limits = [side.limit_milliseconds for side in sides]
    table.add_row("limit in milliseconds", *(f"{limit:,.2f}" for limit in limits), f"{limits[0] / limits[1]:.2f}x")
    table.add_row("of this limit", *(f"{side.limit_milliseconds / side.milliseconds:.0%}" for side in sides), "")
    return table


def exported_table(model: PreTrainedModel, files: Iterable[ExportedFile]) -> Table:
    """Graphs that were written and how near their outputs are to PyTorch's, for a terminal."""
    table = Table(title="Compared with PyTorch", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("megabytes", "largest difference", "relative error"):
        table.add_column(heading, justify="right", no_wrap=True)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    table.add_row("PyTorch", f"{size / 1e6:,.1f}", "", "")
    for file in files:
        table.add_row(file.name, f"{file.size / 1e6:,.1f}", f"{file.difference:.1e}", f"{file.relative_error:.1e}")
    return table


def comparison_picture(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Both models, time against size, and the limits, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = picture_axes()
    for side in (comparison.against, comparison.model):
        megabytes = side.bytes / 1e6
        points = axes.plot(megabytes, side.milliseconds, "o", label=side.name)
        axes.plot(megabytes, side.limit_milliseconds, "_", color=points[0].get_color(), markersize=12)
    axes.set(xlabel="megabytes", ylabel="milliseconds (bar: the limit)", xlim=(0, None), ylim=(0, None))
    axes.set_title(_how(comparison))
    axes.legend()
    figure.savefig(path, dpi=110)


def plan_table(search: PlanSearch) -> Table:
    """The choice of every layer, for a terminal."""
    table = Table(title="Plan", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for heading in ("weight", "influence", "A", "B", "terms", "parameters", "ratio", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in search.layers:
        m, n = layer.weight
        entry, parameters = layer.chosen.entry, layer.chosen.parameters
        shapes: tuple[str, ...] = ("dense", "", "")
        if entry is not None:
            m2, n2 = entry.b_shape(m, n)
            shapes = (f"{entry.m1}x{entry.n1}", f"{m2}x{n2}", str(entry.terms))
            if entry.frequent:
                own = (f"{entry.frequent}x1", f"1x{n}", str(entry.frequent_terms))
                shapes = tuple(map("\n+ ".join, zip(shapes, own, strict=True)))
        table.add_row(
            layer.name, f"{m}x{n}", f"{layer.influence:.4f}", *shapes, f"{parameters:,}",
            f"{m * n / parameters:.1f}x", f"{layer.chosen.error:.3f}",
        )  # fmt: skip
    return table


def plan_totals(search: PlanSearch) -> Table:
    """The plan and those of the papers, for a terminal."""
    table = Table(title="Base model", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("parameters", "ratio", "predicted error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, (parameters, error) in {"this plan": (search.parameters, search.error), **search.presets}.items():
        table.add_row(name, f"{parameters:,}", f"{search.dense_parameters / parameters:.2f}x", f"{error:.3f}")
    return table


def plan_picture(search: PlanSearch, path: str | os.PathLike[str]) -> None:
    """Predicted error against size, the chosen point, and the presets, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = picture_axes()
    axes.plot(*zip(*search.frontier, strict=True), label="best plans")
    axes.plot(search.parameters, search.error, "o", label="chosen")
    for name, point in search.presets.items():
        axes.plot(*point, "x", label=f"preset {name}")
    axes.set(xlabel="parameters of the base model", ylabel="predicted relative error of the outputs", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def files_table(repository: str, files: Iterable[PublishedFile]) -> Table:
    """What a push sends, for a terminal."""
    table = Table(title=repository, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("SHA-256 of code that trust_remote_code runs", no_wrap=True)
    for file in files:
        table.add_row(file.name, f"{file.size:,}", file.sha256() if file.is_code else "")
    return table


def results_table(title: str, columns: Iterable[str], rows: Mapping[str, Iterable[Any]], notes: str = "") -> Table:
    """A table of results: a name and its values in each row; numbers with four digits, None as a dash."""
    table = Table(title=title, box=SIMPLE_HEAD, caption=notes or None, caption_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(_cell(value) for value in values))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def has_pictures() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that could not be drawn, before long work begins.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it cannot write such a file.
        OSError: as `checkpoint.files.check_file`.
    """
    check_file(path)
    if not has_pictures():
        raise ImportError("a picture needs matplotlib; pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if (ending := Path(path).suffix.lower().removeprefix(".")) not in known:
        ending = f"must not end in {ending!r}" if ending else "has no ending that says its format"
        raise ValueError(f"picture {str(path)!r} {ending}; give it one of {', '.join(sorted(known))}")


def picture_axes(columns: int = 1) -> tuple[Any, Any]:
    """A figure of its own, and the axes in it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not has_pictures():
        raise ImportError("a picture needs matplotlib; pip install matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def training_picture(
    path: str | os.PathLike[str],
    logged: Sequence[int],
    losses: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    name: str,
    quality: Sequence[float],
    teacher: float | None = None,
) -> None:
    """The losses of a distillation over its steps, and the quality of the student, as a PNG.

    Args:
        path: to write.
        logged, losses: steps, and the mean of each loss since the step before.
        steps, name, quality: steps, and what was measured on held-out text.
        teacher: the same of the teacher, drawn as a line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (left, right) = picture_axes(columns=2)
    for loss, values in losses.items():
        left.plot(logged, values, marker=".", label=loss)
    left.set(xlabel="step", ylabel="mean since the point before", yscale="log", title="Losses")
    if losses:
        left.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    right.plot(steps, quality, marker=".", color="black", label="student")
    if teacher is not None:
        right.axhline(teacher, color="grey", linestyle="--", label="teacher")
        right.legend(frameon=False)
    right.set(xlabel="step", ylabel=name, title="On held-out text")
    figure.savefig(path, dpi=110)


def distillation_table(steps: int, models: Iterable[str], rows: Mapping[str, Sequence[float]]) -> Table:
    """Teacher and student, before and after the distillation, and ratios of what is counted."""
    table = Table(title=f"{steps:,} steps of distillation", box=SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for heading in (*models, "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    forms = {"parameters": "{:,.0f}", "megabytes": "{:,.1f}", "examples per second": "{:,.0f}"}
    for name, values in rows.items():
        ratio = values[0] / values[-1] if name in ("parameters", "megabytes") else None
        ratio = values[-1] / values[0] if name == "examples per second" else ratio
        form = forms.get(name, "{:.1%}" if name.endswith("as the teacher's") or "common" in name else "{:.4g}")
        table.add_row(name, *map(form.format, values), "" if ratio is None else f"{ratio:.2f}x")
    return table
