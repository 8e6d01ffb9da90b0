"""How much of its teacher's score a student keeps after how many minutes: by the papers' two stages, and by `distill`.

    python benchmarks/retention.py > benchmarks/logs/retention.txt

Reads the logs of glue.py (the papers' shapes, nearest factors and two stages, on a CPU) and of distilled_tasks.py (the
command with its defaults), and draws logs/retention.png. Students of all-MiniLM-L6-v2 on five tasks of GLUE; minutes
are of training, of one thread: of both stages, though one stage 1 serves all tasks, or of the dense and the factored
student. Fine-tuning of the teacher, search and calibration are not counted. Means over the seeds; the machines are
those of both logs.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import distilled_tasks
import glue
from common import GLUE_TASKS, ROOT
from matplotlib.figure import Figure
from rich.console import Console

from kronecker_transformers.display import results_table
from kronecker_transformers.tasks.glue import glue_task

RATIOS = ("7.7x", "21x")
PAPERS, DISTILL = "papers' stages", "distill"
STAGES = (0, glue.STAGE_1_STEPS)
"""Steps of stage 1, of which all tasks have students."""


class Point(NamedTuple):
    """A student: how it was made, on which task, with what budget, in how many minutes; what it keeps, in per cent."""

    recipe: str
    task: str
    budget: float
    minutes: float
    kept: float
    environment: str


def by_stages() -> Iterator[Point]:
    """Students of the papers' stages, at the settings of the main table."""
    first = {line["plan"]: line["training"]["seconds"] / 60 for line in glue.STAGE_1.lines()}
    lines = {glue.Run.of(line): line for line in glue.LOG.lines()}
    for run, (student, teacher) in glue.scores().items():
        plain = run.kd and run.steps == glue.STEPS[run.task] and run.learning_rate == glue.LEARNING_RATE
        if plain and run.stage_1_steps in STAGES and not glue.is_apart(run):
            line, share = lines[run], run.stage_1_steps / glue.STAGE_1_STEPS
            minutes, kept = first[run.plan] * share + line["training"]["seconds"] / 60, 100 * student / teacher
            recipe = f"{run.plan}, {PAPERS}"
            yield Point(recipe, run.task, run.stage_1_steps, minutes, kept, line["environment"])


def by_command() -> Iterator[Point]:
    """Those of the command `distill`."""
    for line in distilled_tasks.LOG.lines():
        run = distilled_tasks.run_of(line)
        if run.teacher == distilled_tasks.SMALL:
            scores = line["rows"][glue_task(run.task).headline]
            recipe, kept = f"{run.ratio:g}x, {DISTILL}", 100 * scores[-1] / scores[0]
            yield Point(recipe, run.task, run.minutes, run.minutes, kept, line["environment"])


def curves(all_points: Iterable[Point]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Minutes and what is kept, by recipe and task, ascending; means over the seeds of one budget."""
    found: dict[str, dict[str, dict[float, list[Point]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for point in all_points:
        found[point.recipe][point.task][point.budget].append(point)
    return {
        recipe: {
            task: sorted(
                (statistics.mean(p.minutes for p in points), statistics.mean(p.kept for p in points))
                for points in budgets.values()
            )
            for task, budgets in tasks.items()
        }
        for recipe, tasks in found.items()
    }


def draw(found: Mapping[str, Mapping[str, list[tuple[float, float]]]]) -> None:
    """One panel for each ratio; the papers' stages are dashed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, ratio in zip(figure.subplots(1, len(RATIOS), sharey=True), RATIOS, strict=True):
        for recipe, style in ((PAPERS, "o--"), (DISTILL, "s-")):
            for index, task in enumerate(GLUE_TASKS):
                points = found[f"{ratio}, {recipe}"].get(task, [])
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=f"{task}, {recipe}")
        axes.axhline(99, color="grey", linestyle=":")
        axes.set(title=ratio, xlabel="minutes of one thread", xlim=(0, None))
    axes.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    figure.get_axes()[0].set_ylabel("kept of the teacher's score, per cent")
    figure.savefig(ROOT / "logs" / "retention.png", dpi=110)


def main() -> None:
    """Draw, and print the same as a table."""
    points = [*by_stages(), *by_command()]
    found = curves(points)
    draw(found)
    rows = {
        f"{ratio}, {recipe}": [
            "\n".join(f"{kept:.0f} in {minutes:.0f}" for minutes, kept in found[f"{ratio}, {recipe}"].get(task, []))
            for task in GLUE_TASKS
        ]
        for ratio in RATIOS
        for recipe in (PAPERS, DISTILL)
    }
    console = Console(width=110)
    for name, own in ((PAPERS, by_stages()), (DISTILL, by_command())):
        for environment in sorted({point.environment for point in own}):
            console.print(f"{name}: {environment}", highlight=False)
    console.print(results_table("Kept of the teacher's score, per cent, in minutes", GLUE_TASKS, rows))


if __name__ == "__main__":
    main()
