"""A Space: a factored model beside its teacher, with their answers, sizes, and times on the server at hand.

    pip install gradio sentence-transformers
    python examples/space/app.py --model output/student --teacher path/to/bert

Both are folders or names on the Hub. On the Hub the names come from ``space.json`` beside this file, which
`kronecker-transformers push-space` writes. What can be typed depends on the model: text to classify, a sentence with a
[MASK], the beginning of a text, or two sentences to compare.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, pipeline

SETTINGS = Path(__file__).parent / "space.json"
Answer = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """What a visitor types, and what a model makes of it."""

    inputs: tuple[str, ...]
    """Labels of the text fields."""
    examples: list[list[str]]
    is_label: bool
    """Whether an answer is a label with its probability, or text."""
    load: Callable[[str, dict[str, Any]], tuple[Any, Answer]]
    """From a name to the model and its answer."""


def with_pipeline(task: str, shown: Callable[[Any], Any], **settings: Any) -> Callable[..., tuple[Any, Answer]]:
    """Answers of a pipeline of transformers."""

    def load(name: str, options: dict[str, Any]) -> tuple[Any, Answer]:
        pipe: Any = pipeline(task, model=name, device="cpu", **options)  # type: ignore[call-overload]
        return pipe.model, lambda text: shown(pipe(text, **settings))

    return load


def similarity(name: str, options: dict[str, Any]) -> tuple[Any, Answer]:
    """Cosine similarity of sentence embeddings, with the pooling and the prompt that the model's own settings say."""
    code = {key: value for key, value in options.items() if key == "code_revision"}
    pinned = {key: value for key, value in options.items() if key != "code_revision"}
    encoder = SentenceTransformer(
        name, device="cpu", model_kwargs=code, processor_kwargs=code, config_kwargs=code, **pinned
    )

    def answer(first: str, second: str) -> str:
        one, other = encoder.encode([first, second], normalize_embeddings=True, show_progress_bar=False)
        return f"{float(one @ other):.3f}"

    return encoder, answer


def labels(results: list[dict[str, Any]]) -> dict[str, float]:
    """Label to probability."""
    return {result.get("label") or result["token_str"]: result["score"] for result in results}


TASKS = {
    "ForSequenceClassification": Task(
        ("text",),
        [["A film of rare warmth and wit."], ["Two hours that I shall not get back."]],
        True,
        with_pipeline("text-classification", labels, top_k=3),
    ),
    "ForMaskedLM": Task(
        ("text with [MASK]",),
        [["Paris is the [MASK] of France."], ["She [MASK] the letter and put it away."]],
        True,
        with_pipeline("fill-mask", labels, top_k=5),
    ),
    "LMHeadModel": Task(
        ("beginning",),
        [["A small model learns what"], ["On the first day of spring"]],
        False,
        with_pipeline("text-generation", lambda found: found[0]["generated_text"], max_new_tokens=40, do_sample=False),
    ),
    "Model": Task(
        ("first sentence", "second sentence"),
        [["A man is playing a guitar.", "Someone makes music."], ["A man is playing a guitar.", "It will rain."]],
        False,
        similarity,
    ),
}
"""By the end of the name of a class."""


def task_of(name: str, options: dict[str, Any]) -> Task:
    """The task of a model.

    Raises:
        ValueError: a head that this Space does not show.
    """
    architecture = (AutoConfig.from_pretrained(name, **options).architectures or [""])[0]
    fitting = [ending for ending in TASKS if architecture.endswith(ending)]
    if not fitting:
        raise ValueError(f"{name!r} is a {architecture}; shown are {', '.join(TASKS)}")
    return TASKS[max(fitting, key=len)]


def forward_seconds(model: Any) -> list[float]:
    """Seconds of every forward pass of the model in it, without tokenizer and pooling, as they come."""
    inner: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    forward, spent = inner.forward, list[float]()

    @functools.wraps(forward)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return output

    inner.forward = timed
    return spent


def side(task: Task, name: str, options: dict[str, Any]) -> tuple[str, Callable[..., tuple[Any, str]]]:
    """The heading of a model, and a function from the visitor's text to its answer and its time."""
    model, answer = task.load(name, options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spent = forward_seconds(model)

    def timed(*texts: str) -> tuple[Any, str]:
        seconds: list[float] = []
        while len(seconds) < 9 and sum(seconds) < 1:
            spent.clear()
            result = answer(*texts)
            seconds.append(sum(spent))
        return result, f"{1e3 * statistics.median(seconds):.1f} ms"

    timed(*task.examples[0])  # to warm up
    return f"### {Path(name).name}\n{parameters:,} parameters", timed


def build(model: str, teacher: str, revision: str | None = None) -> gradio.Blocks:
    """The page."""
    trusted: dict[str, Any] = {"trust_remote_code": True}
    if revision:
        trusted |= {"revision": revision, "code_revision": revision}
    task = task_of(model, trusted)
    if "[MASK]" in task.inputs[0]:
        mask = AutoTokenizer.from_pretrained(model, **trusted).mask_token  # the teacher's too
        task = replace(
            task,
            inputs=tuple(label.replace("[MASK]", mask) for label in task.inputs),
            examples=[[text.replace("[MASK]", mask) for text in texts] for texts in task.examples],
        )
    sides = [side(task, model, trusted), side(task, teacher, {})]
    with gradio.Blocks(title=Path(model).name) as page:
        gradio.Markdown(
            f"# {Path(model).name}\nThe compressed model (left) answers beside its dense teacher (right); times are "
            "those of the models alone, without their tokenizers, on this CPU server."
        )
        fields = [gradio.Textbox(label=label) for label in task.inputs]
        button = gradio.Button("Compare", variant="primary")
        outputs = []
        with gradio.Row():
            for heading, _ in sides:
                with gradio.Column(elem_classes="side"):
                    gradio.Markdown(heading)
                    answer = gradio.Label(label="answer") if task.is_label else gradio.Textbox(label="answer")
                    outputs += [answer, gradio.Textbox(label="time of the model (median of up to nine)")]

        def compare(*texts: str) -> list[Any]:
            if not all(text.strip() for text in texts):
                raise gradio.Error("Type something first, or choose an example.")
            return [value for _, timed in sides for value in timed(*texts)]

        button.click(compare, fields, outputs)
        for field in fields:
            field.submit(compare, fields, outputs)
        gradio.Examples(task.examples, fields)
    return page


def main(argv: list[str] | None = None) -> None:
    """Start the server."""
    known = json.loads(SETTINGS.read_text(encoding="utf-8")) if SETTINGS.exists() else {}
    parser = argparse.ArgumentParser(description="A factored model beside its teacher, in a browser.")
    for name in ("model", "teacher"):
        parser.add_argument(f"--{name}", default=known.get(name), required=name not in known, help="folder or Hub name")
    parser.add_argument("--revision", default=known.get("revision"), help="commit of the model, to pin its code")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    build(options.model, options.teacher, options.revision).launch(server_port=options.port)


if __name__ == "__main__":
    main()
