"""Which files of a checkpoint are published: chosen by name, so that nothing else that lies in a folder travels.

No optimizer state, no training arguments, no pickle of any kind. Weights are safetensors; with a factored model go the
Python files that its config names, so that a process without this package can load it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..checkpoint.files import to_json
from ..checkpoint.load import REPORT_FILE
from ..checkpoint.sentence_modules import read_modules

_PATH = re.compile(r"(?<![\w.:/~-])/(?:[^\s/'\"]+/)+[^\s/'\",;:)]*")
"""An absolute path of two parts or more in a text; not of an address, nor the end of a relative one."""
_WINDOWS_PATH = re.compile(r"(?<![\w/])[A-Za-z]:[\\/](?:[^\s\\/'\"]+[\\/])*(?=[^\s\\/'\"])")
"""The folders of a path of Windows."""
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
CARD = "README.md"
RESULTS_FILE, BENCHMARK_FILE = "results.json", "benchmark.json"
"""Beside the weights: what the examples, and the command benchmark with --json, have recorded."""
RECORDS = (REPORT_FILE, RESULTS_FILE, BENCHMARK_FILE)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PUBLISHED = (
    CARD, "config.json", "generation_config.json", *WEIGHTS,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "spiece.model", "sentencepiece.bpe.model", "spm.model",
    *RECORDS, "plan.yaml", "*.png",
)  # fmt: skip
"""Names in the top folder of a checkpoint that are published; code comes by what the config names, and the files of
sentence-transformers by what ``modules.json`` names."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of a push."""

    name: str
    """In the repository."""
    source: Path | bytes
    """Where it lies, or what is in it where that differs from the file in the folder."""
    is_code: bool = False
    """Whether `trust_remote_code=True` runs it."""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def content(self) -> bytes:
        """What is in it."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def sha256(self) -> str:
        """Of its content, in hex."""
        return hashlib.sha256(self.content()).hexdigest()

    def write(self, folder: Path) -> None:
        """Put a copy into a folder."""
        path = folder / self.name
        path.parent.mkdir(exist_ok=True)
        if isinstance(self.source, bytes):
            path.write_bytes(self.source)
        else:
            shutil.copyfile(self.source, path)


def without_local_paths(path: Path) -> bytes:
    """What is in a JSON file, with local paths cut to their last part.

    Raises:
        ValueError: it holds no object.
    """
    found = read_object(path, "write it again or remove it")
    return to_json(_without_paths(found)).encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def without_folders(text: str) -> str:
    """A text whose absolute paths are cut to their last part: a path as a whole, an option, or a message.

    A token of the Hub, should there be one, is cut too.
    """
    if os.path.isabs(text):
        return f"./{Path(text).name}"
    text = _WINDOWS_PATH.sub("./", _TOKEN.sub("hf_...", text))
    return _PATH.sub(lambda found: f"./{Path(found[0]).name}", text)


def published_files(folder: str | os.PathLike[str]) -> list[PublishedFile]:
    """The files of a checkpoint that a push sends, sorted by name; a card that a push would make is not among them.

    Raises:
        FileNotFoundError: no folder, no config, no weights, or a file that the config or the index names is missing.
        ValueError: config, index or a record are not readable, or they name files outside the folder; or a pipeline, a
            tokenizer or modules of sentence-transformers that may run other code.
    """
    folder = Path(folder)
    config = _read_json(folder, "config.json")
    names = {path.name for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, p) for p in PUBLISHED)}
    code = _code(folder, config)
    _refuse_foreign_code(folder, config)
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        raise FileNotFoundError(f"folder {str(folder)!r} holds no model.safetensors; save the model there first")
    if "model.safetensors.index.json" in names:
        shards = set(_read_json(folder, "model.safetensors.index.json").get("weight_map", {}).values())
        for shard in sorted(map(str, shards)):
            if not fnmatch(shard, WEIGHTS[1]) or "/" in shard or shard not in names:
                raise FileNotFoundError(
                    f"model.safetensors.index.json in {str(folder)!r} names {shard!r}, which is no weights file there; "
                    "save the model again"
                )
    found = [
        PublishedFile(name, without_local_paths(folder / name) if name in RECORDS else folder / name, name in code)
        for name in names | code
    ]
    modules = read_modules(folder)
    found += [PublishedFile(name, content) for name, content in (modules.files if modules else {}).items()]
    return sorted(found, key=lambda file: file.name)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"folder {str(folder)!r} holds no {name}; give the folder of a saved model")
    return read_object(path, "save the model again")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else; with the remedy.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds {type(found).__name__}, not an object; {remedy}")
    return found


def _refuse_foreign_code(folder: Path, config: dict[str, Any]) -> None:
    """A pipeline or a tokenizer that runs code from elsewhere, for whoever trusts this model's."""
    settings = {"config.json": config}
    if (folder / "tokenizer_config.json").is_file():
        settings["tokenizer_config.json"] = _read_json(folder, "tokenizer_config.json")
    for name, key in (("config.json", "custom_pipelines"), ("tokenizer_config.json", "auto_map")):
        if settings.get(name, {}).get(key):
            raise ValueError(
                f"{name} in {str(folder)!r} has {key}={settings[name][key]!r}, code that is not this model's; remove it"
            )


def _code(folder: Path, config: dict[str, Any]) -> set[str]:
    """The Python files that the config names, and those that they import."""
    found: set[str] = set()
    for reference in (config.get("auto_map") or {}).values():
        module, _, name = str(reference).partition(".")
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(
                f"auto_map in the config of {str(folder)!r} names {reference!r}, not module.Class; save the model again"
            )
        if not (folder / f"{module}.py").is_file():
            raise FileNotFoundError(
                f"config in {str(folder)!r} names code in {module}.py, which is missing; save the model again"
            )
        if f"{module}.py" not in found:
            paths = get_relative_import_files(str(folder / f"{module}.py"))
            found |= {f"{module}.py", *(Path(path).name for path in paths)}
    return found
