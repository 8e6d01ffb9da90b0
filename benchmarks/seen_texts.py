"""Whether students lack steps or texts: how near they are to their teachers on texts that they know and on others.

    python benchmarks/seen_texts.py --data DIR --work WORK > benchmarks/logs/seen_texts.txt

The students are those that distilled_tasks.py has left in WORK, of CoLA. Judged by the correlation of logits with the
teacher's (of their differences) and by the share of texts that get the teacher's label, on 1,000 training texts, as
they are, and on the dev set. Finished ones are lines of logs/seen_texts.jsonl, and are not judged again. --table shows
them without a run.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import numpy as np
from common import RunLog, runs_parser
from datasets import Dataset, disable_progress_bars
from distilled_tasks import LAYERS, Run, fine_tune, run_of
from rich.console import Console
from task_plans import correlation
from transformers.utils.logging import disable_progress_bar

from kronecker_transformers.checkpoint.load import load_student
from kronecker_transformers.display import results_table
from kronecker_transformers.experiments.classification import load_task
from kronecker_transformers.experiments.lessons import task_lesson
from kronecker_transformers.experiments.run import predict
from kronecker_transformers.tasks.pairs import encode_texts

LOG = RunLog("seen_texts")
TASK, TEXTS = "cola", 1000


def perform(run: Run, options: Any) -> None:
    """Judge one student."""
    data = str(options.data / "glue")
    folder = options.work / "students" / "-".join(map(str, asdict(run).values()))
    teacher, tokenizer, lesson = task_lesson(str(fine_tune(run.teacher, run.task, options)), run.task, data)
    models = teacher.float().eval(), load_student(folder)[0].float().eval()
    rows = random.Random(0).sample(load_task(run.task, data, None, None).rows(), TEXTS)
    encoded = encode_texts(tokenizer, [text for (text,) in rows])
    seen = [{name: values[place] for name, values in encoded.items()} for place in range(TEXTS)]
    found = {}
    for name, examples in (("training texts", seen), ("dev set", list(lesson.held_out))):
        logits = [
            np.stack(predict(model, Dataset.from_list(examples), lesson.collate)["logits"]) @ np.array([-1.0, 1.0])
            for model in models
        ]
        same = float(np.mean((logits[0] > 0) == (logits[1] > 0)))
        found[name] = {"correlation": correlation(*logits), "labels": 100 * same}
    LOG.add(asdict(run), found)


def main() -> None:
    """Judge what is missing, then show it."""
    options = runs_parser("Texts that students have seen.", "teachers and students").parse_args()
    disable_progress_bar()
    disable_progress_bars()
    if not options.table:
        runs = []
        for folder in sorted((options.work / "students").iterdir()):
            for teacher in LAYERS:
                if folder.name.startswith(f"{teacher}-{TASK}-"):
                    ratio, layers, minutes, seed = folder.name.removeprefix(f"{teacher}-{TASK}-").split("-")
                    runs.append(Run(teacher, TASK, float(ratio), int(layers), float(minutes), int(seed)))
        LOG.finish(runs, perform, options)
    console = Console(width=150)
    console.print(LOG.environments(), highlight=False)
    names = [f"{name},\n{what}" for name in ("training texts", "dev set") for what in ("correlation", "labels")]
    rows = {
        f"{run_of(line).teacher}, {run_of(line).name}": [
            round(line[name][what], 1) for name in ("training texts", "dev set") for what in ("correlation", "labels")
        ]
        for line in LOG.lines()
    }
    console.print(results_table("Students on CoLA, beside their teachers, per cent", names, rows))


if __name__ == "__main__":
    main()
