"""Learning rates at BERT-base's size: students of one start, trained for equally many minutes.

    python benchmarks/base_rates.py --data DIR --work WORK > benchmarks/logs/base_rates.txt

The teacher is all-mpnet-base-v2, fine-tuned as in distilled_tasks.py, whose WORK may be used again. A dense student
with six of its twelve layers is distilled first, then factored by a searched plan, as `distill --task NAME --layers 6
--minutes 20` does it (8 of the minutes for the dense student); then the factored one learns for the other 12 minutes,
at several rates, on one thread each. Judged as in task_plans.py. WORK keeps dense students and starts; finished runs
are lines of logs/base_rates.jsonl, and are not made again. --table shows them without a run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from common import RunLog, runs_parser, spread
from datasets import disable_progress_bars
from distilled_tasks import BASE, LAYERS, fine_tune
from rich.console import Console
from task_plans import compared, watching
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_student, load_teacher
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.lessons import Lesson, task_lesson
from kronecker_transformers.experiments.training import Schedule, kept_layers, shallow, train
from kronecker_transformers.tasks.glue import glue_task

LOG = RunLog("base_rates")
RATIO, MINUTES = 7.7, 20.0
TASK = "cola"
RATES = (1e-4, 2.5e-4, 7e-4)


@dataclass(frozen=True)
class Run:
    """A student of a task, by Muon or AdamW, at a learning rate."""

    task: str
    muon: bool
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{'Muon' if self.muon else 'AdamW'}, {self.rate:g}"


def prepared(task: str, options: Any) -> tuple[PreTrainedModel, PreTrainedModel, Any, Lesson]:
    """The teacher of a task, its dense student, their tokenizer, and the lesson."""
    source = fine_tune(BASE, task, options)
    loaded, tokenizer, lesson = task_lesson(str(source), task, str(options.data / "glue"))
    teacher, target = loaded.float().eval(), options.work / "rates" / f"dense-{task}"
    if not target.exists():
        schedule, _ = Schedule(MINUTES, None, None, True, 0).divided()
        kept = kept_layers(teacher, LAYERS[BASE]) or []
        student, _ = shallow(teacher, kept, lesson, schedule, *watching(teacher, lesson))
        student.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return teacher, load_teacher(str(target))[0].float().eval(), tokenizer, lesson


def ratio_of_rest(teacher: PreTrainedModel, dense: PreTrainedModel) -> float:
    """How many times smaller than the dense student the factored one is."""
    left, whole = (sum(p.numel() for p in model.base_model.parameters()) for model in (dense, teacher))
    return RATIO * left / whole


def start_of(task: str, teacher: PreTrainedModel, dense: PreTrainedModel, lesson: Lesson, options: Any) -> Any:
    """The untrained factored student, the same for all rates."""
    target = options.work / "rates" / f"start-{task}"
    if not target.exists():
        ratio, source = ratio_of_rest(teacher, dense), options.work / "rates" / f"dense-{task}"
        compress(source, "search", ratio=ratio, calibration=lesson.calibration).save_pretrained(target)
    return load_student(str(target))[0].float().requires_grad_(True)


def perform(run: Run, options: Any) -> None:
    """Make and judge one student."""
    teacher, dense, _, lesson = prepared(run.task, options)
    student = start_of(run.task, teacher, dense, lesson, options)
    _, schedule = Schedule(MINUTES, None, None, True, run.seed).divided()
    kept, lesson = kept_layers(teacher, LAYERS[BASE]), replace(lesson, muon=run.muon)
    schedule = replace(schedule, learning_rate=run.rate)
    summary = train(student, teacher, lesson, schedule, *watching(teacher, lesson), kept)
    quality = compared(run.task, lesson, teacher=teacher, dense=dense, student=student)
    LOG.add(asdict(run), {**quality, "training": summary})


def rows() -> dict[str, list[Any]]:
    """Teacher and dense student, then the rates."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in LOG.lines():
        for name, row in (("teacher", "teacher"), ("dense", f"{LAYERS[BASE]} of 12 layers, dense")):
            found[row]["near"] = [line["correlations"][name]]
            found[row]["score"] = [line["scores"][name]]
        found["start"]["near"] = [line["training"]["curve"]["values"][0]]
        row = Run(line["task"], line["muon"], line["rate"], line["seed"]).name
        found[row]["steps"].append(line["training"]["steps"])
        found[row]["near"].append(line["correlations"]["student"])
        found[row]["score"].append(line["scores"]["student"])
    return {
        name: [spread(values["steps"], 0), spread(values["near"]), spread(values["score"])]
        for name, values in found.items()
    }


def main() -> None:
    """Run what is missing, then show it."""
    parser = runs_parser("Learning rates at BERT-base's size.", "teachers, dense students and starts")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="(default: %(default)s)")
    parser.add_argument("--adamw", action="store_true", help="AdamW for the factors of linear layers too, not Muon")
    options = parser.parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if not options.table:
        LOG.finish([Run(TASK, not options.adamw, rate, 0) for rate in options.rates], perform, options)
    headings = ["steps", "correlation", glue_task(TASK).headline]
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    console.print(results_table(f"{BASE} on CoLA, students of {RATIO:g}x, per cent", headings, rows()))


if __name__ == "__main__":
    main()
