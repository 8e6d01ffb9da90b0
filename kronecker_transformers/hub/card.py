"""A model card from what is known of a checkpoint. Nothing is typed by hand, and what was not measured says so.

Sizes and costs are counted in the model itself. Its training, quality and time come from the files that the examples
and the command `benchmark --json` write: ``results.json`` and ``benchmark.json`` beside the weights.
"""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint.load import REPORT_FILE, load_model
from ..checkpoint.sentence_modules import read_modules
from ..evaluation.cost import describe, recorded_errors
from ..models import DENSE_CLASSES, FACTORED_CLASSES
from ..models.kronecker_family import heads_of
from .files import BENCHMARK_FILE, CARD, RESULTS_FILE, published_files
from .records import as_recorded, is_hub_name, read_record, speed, told

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "card.md"
MADE = "<!-- Made by kronecker_transformers: a push makes it anew. Remove this line to keep what you write here. -->"
"""In every card."""
_LICENCE = ("license", "license_name", "license_link")
_SENTENCE = "The students were proud of what their teacher had taught them."


_SIMILARITY = {
    "source_sentence": _SENTENCE,
    "sentences": ["What they had learned made their teacher proud of them.", "The weather was fine that day."],
}


class _Use(NamedTuple):
    """How a head is used."""

    pipeline_tag: str
    widget: list[dict[str, Any]]
    inference: dict[str, Any] | None = None


_USES = {
    None: _Use("feature-extraction", [{"text": _SENTENCE}]),
    "words": _Use("fill-mask", [{"text": "Paris is the [MASK] of France."}]),
    "next_token": _Use(
        "text-generation", [{"text": "A small model learns what"}], {"parameters": {"max_new_tokens": 40}}
    ),
    "sequence": _Use("text-classification", [{"text": "A film of rare warmth and wit."}]),
    "replaced": _Use("feature-extraction", [{"text": _SENTENCE}]),  # for which the Hub has no task
    "tokens": _Use("token-classification", [{"text": "Ada Lovelace lived in London."}]),
    "span": _Use(
        "question-answering", [{"text": "Where did Ada Lovelace live?", "context": "Ada Lovelace lived in London."}]
    ),
    "choices": _Use("multiple-choice", [{"text": _SENTENCE}]),
}
"""By the kind of a model's first head."""


def auto_class(model: Any) -> str:
    """The Auto class with which a factored model, or its dense twin, is loaded."""
    factored = type(model) if type(model) in DENSE_CLASSES else FACTORED_CLASSES[type(model)]
    references: dict[str, str] = factored.config_class.auto_classes
    return next(auto for auto, reference in references.items() if reference.endswith(f".{factored.__name__}"))


def _with_mask(example: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """An example with the mask token of a tokenizer."""
    mask = getattr(tokenizer, "mask_token", None) or "[MASK]"
    return {**example, "text": example["text"].replace("[MASK]", mask)}


def model_card(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = None,
    twin_of: str | None = None,
    has_twin: bool = False,
    records: str | os.PathLike[str] | None = None,
    look_up: Callable[[str], Mapping[str, Any]] | None = None,
) -> ModelCard:
    """The card of a factored model, or of a dense twin.

    Args:
        folder: of the checkpoint.
        repo_id: name of the repository it is for.
        base_model: name of the teacher on the Hub; default: the recorded one if it is such a name.
        license: default: that of the teacher's card, if there is one in its folder or `look_up` finds it.
        language: the same.
        twin_of: for a dense twin, the name of the factored model.
        has_twin: whether the dense twin is published beside it, as ``<repo_id>-dense``.
        records: folder of the records; for a dense twin that of the factored model; default: the same folder.
        look_up: from the name of a teacher on the Hub to the metadata of its card, as `push.card_metadata`; without it
            nothing is asked on the Hub.

    Raises:
        ValueError, OSError: the folder holds no model, or records that are not readable.
    """
    folder = Path(folder)
    records = Path(records or folder)
    model, tokenizer = load_model(folder)
    if type(model) not in DENSE_CLASSES and twin_of is None:
        raise ValueError(
            f"{str(folder)!r} holds a {type(model).__name__}, not a factored model; push the factored folder, with "
            "--with-dense-twin for its twin, or write a README.md of your own beside a dense model"
        )
    factored = load_model(records)[0] if twin_of else model
    record = _of_these(read_record(records / RESULTS_FILE), describe(factored).factors_sha256, records / RESULTS_FILE)
    with as_recorded(records / RESULTS_FILE):
        found = told(record, twin_of is not None)
    with as_recorded(folder / BENCHMARK_FILE):
        time = speed(folder, model)
    options, training = record.get("options", {}), record.get("training", {})
    source = options.get("teacher") or read_record(records / REPORT_FILE).get("teacher")
    given = {"base_model": base_model, "license": license, "language": language}
    teacher = base_model or (source if is_hub_name(source) else Path(source).name if source else None)
    asked = base_model or (source if is_hub_name(source) else None)  # not the model that a teacher was made from
    known = _first_of({key: value for key, value in given.items() if value}, *map(folder_metadata, (source, records)))
    base_model = known.get("base_model") or asked
    if look_up and isinstance(asked, str) and not {"license", "language"} <= known.keys():
        known = _first_of(known, look_up(asked))
    architecture = type(model).__name__.removeprefix("Kronecker")
    heads = heads_of(model)
    use = _USES[heads[0].kind if heads else None]
    modules = read_modules(folder)
    is_sentence_encoder = modules is not None and "Pooling" in modules.kinds
    results: list[EvalResult] = found.pop("results")
    data = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="sentence-transformers" if is_sentence_encoder else "transformers",
        pipeline_tag="sentence-similarity" if is_sentence_encoder else use.pipeline_tag,
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        tags=[
            "kronecker",
            "compression",
            "distillation",
            *(["sentence-transformers"] if is_sentence_encoder else []),
            *(["dense-twin"] if twin_of else ["custom_code"]),
        ],
        datasets=found.pop("datasets") or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        widget=[_SIMILARITY] if is_sentence_encoder else [_with_mask(example, tokenizer) for example in use.widget],
        inference=use.inference,
    )
    code = [file for file in published_files(folder) if file.is_code]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        made=MADE,
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        twin_of=twin_of,
        has_twin=has_twin,
        teacher=teacher or base_model,
        architecture=architecture,
        auto_class=auto_class(model),
        is_sentence_encoder=is_sentence_encoder,
        has_tokenizer=tokenizer is not None,
        only_factored=not training and bool(recorded_errors(records, describe(factored).factors_sha256)),
        trust="" if twin_of else ", trust_remote_code=True",
        **_costs(model, twin_of is not None),
        **found,
        speed=time,
        figures=[file.name for file in published_files(folder) if file.name.endswith(".png")],
        code=[(file.name, _first_line(file.content()), file.sha256()) for file in code],
    )


def _of_these(record: dict[str, Any], factors_sha256: str, path: Path) -> dict[str, Any]:
    """A record, without its scores if it says that they are those of other factors."""
    measured = record.get("factors_sha256")
    if measured in (None, factors_sha256):
        return record
    logger.warning(
        "%s was measured with other factors than these (trained since, or rounded): the card has none of its scores",
        path,
    )
    return {key: value for key, value in record.items() if key not in ("rows", "models", "metrics", "protocol")}


def has_own_card(folder: str | os.PathLike[str]) -> bool:
    """Whether a README.md lies there that this package has not made; a push leaves it as it is."""
    path = Path(folder) / CARD
    return path.is_file() and MADE not in path.read_text(encoding="utf-8")


def folder_metadata(source: str | os.PathLike[str] | None) -> dict[str, Any]:
    """What the card in a folder says of base model, licence and language; empty where nothing can be read."""
    path = Path(source or "") / CARD
    if not source or not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("the first lines of %s are not read (%s); mend them, or give licence and language", path, error)
        return {}
    return {key: data[key] for key in ("base_model", "language", *_LICENCE) if data.get(key)}


def _first_of(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Of metadata in several places what comes first; a licence with its own name and link, or with none."""
    found: dict[str, Any] = {}
    for source in reversed(sources):
        if source.get("license"):
            found = {key: value for key, value in found.items() if key not in _LICENCE}
        found |= source
    return found


def _costs(model: Any, is_twin: bool) -> dict[str, Any]:
    """Rows of the table of numbers, and what the text says of the plan."""
    report = describe(model)
    rows: list[tuple[str, float, float, str]] = [
        ("parameters", report.dense.parameters, report.factored.parameters, "{:,.0f}"),
        ("megabytes of weights", report.dense.bytes / 1e6, report.factored.bytes / 1e6, "{:,.1f}"),
        (
            f"GFLOPs for {report.length} tokens, linear layers",
            report.dense.linear_flops / 1e9, report.factored.linear_flops / 1e9, "{:,.2f}",
        ),
        (
            f"GFLOPs for {report.length} tokens, with the products of attention",
            report.dense.total_flops / 1e9, report.factored.total_flops / 1e9, "{:,.2f}",
        ),
    ]  # fmt: skip
    costs = [
        (label, [form.format(small)] if is_twin else [form.format(dense), form.format(small), f"{dense / small:.2f}x"])
        for label, dense, small, form in rows
    ]
    base = describe(model.base_model)
    entries = getattr(model.config, "factor_plan", None) or {}
    shapes = {(entry["m1"], entry["n1"], entry["terms"]) for entry in entries.values()}
    return {
        "costs": costs,
        "ratio": report.dense.parameters / report.factored.parameters,
        "layers": sum(not layer.name.endswith(".frequent") for layer in base.layers),
        "plan": f"{len(entries)} entries, {len(shapes)} shapes (m1, n1, terms)",
    }


def _first_line(code: bytes) -> str:
    return (ast.get_docstring(ast.parse(code)) or "").partition("\n")[0]
