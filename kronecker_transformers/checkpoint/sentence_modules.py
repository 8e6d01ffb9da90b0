"""What sentence-transformers keeps beside a model: modules after the encoder, pooling, prompts, length, similarity.

A folder with ``modules.json`` is opened by `SentenceTransformer`. A student and its dense twin take these files over
from the teacher, so that they encode as the teacher's settings say. The files are read with the teacher, and written
with every model that was made from it. They may come from anywhere, so only what is known to hold no code is taken
over: modules of sentence-transformers itself, their settings in JSON and their weights in safetensors.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from .pooling import MEAN, Pooling

logger = logging.getLogger(__name__)

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
ENCODER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Settings of the encoder; sentence-transformers takes the first that is there."""
_NEEDED = {
    "Pooling": ("config.json",), "Dense": ("config.json", "model.safetensors"),
    "LayerNorm": ("config.json", "model.safetensors"),
}  # fmt: skip
"""Files without which a module is not what it was."""
_MODULE_FILES = ("config.json", "cnn_config.json", "lstm_config.json", "model.safetensors", "pytorch_model.bin")
_ENCODERS = ("Transformer", "MLMTransformer")
KINDS = (
    "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "WeightedLayerPooling", "CNN", "LSTM", "WordWeights",
    "SpladePooling", "SparseAutoEncoder", "MultiVectorMask", "HierarchicalTokenPooling", "LogitScore",
)  # fmt: skip
"""Modules of sentence-transformers that may follow the encoder."""
_ACTIVATIONS = ("activation_fn", "sbert_ce_default_activation_function")
_CODE = ("auto_map", "custom_pipelines", "code_revision", "trust_remote_code", "activation_function",
         "tokenizer_class", "tokenizer_name_or_path")  # fmt: skip
_SHARED = "sentence_modules"  # attribute of a model


@dataclass(frozen=True)
class SentenceModules:
    """The files of sentence-transformers beside one model.

    Attributes:
        files: content by name, relative to the folder of the model.
        kinds: of the modules, in their order, without the encoder.
    """

    files: Mapping[str, bytes]
    kinds: tuple[str, ...] = ()

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Put them beside a model."""
        for name, content in self.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _object(self, name: str) -> dict[str, Any]:
        return json.loads(self.files[name]) if name in self.files else {}

    def pooling(self) -> Pooling:
        """The pooling, without a prompt.

        Raises:
            ValueError: other modules than Pooling and Normalize make the embeddings, or an unknown mode of pooling.
        """
        if self.kinds not in (("Pooling",), ("Pooling", "Normalize")):
            raise ValueError(
                f"{MODULES_FILE} of the teacher has the modules {', '.join(self.kinds) or 'none'}; embeddings are "
                "compared after Pooling, with or without Normalize; distil a copy of the teacher without the others"
            )
        settings = self._pooling_settings()
        modes = settings.get("pooling_mode") or [
            mode for key, mode in _OLD_MODES.items() if settings.get(f"pooling_mode_{key}")
        ]
        return Pooling((modes,) if isinstance(modes, str) else tuple(modes))

    def _pooling_settings(self) -> dict[str, Any]:
        entries = _entries(self.files[MODULES_FILE], "the teacher")
        return self._object(next(f"{entry['path']}/config.json" for entry in entries if _kind(entry) == "Pooling"))

    def settings(self, tokenizer: PreTrainedTokenizerBase) -> EncoderSettings:
        """How a sentence becomes an embedding, for a distillation and its evaluation.

        Raises:
            ValueError: as `pooling`; or embeddings that are cut, or are compared neither by their cosine nor by their
                product; or sentences that are not encoded as the tokenizer does it.
        """
        pooling, general = self.pooling(), self._object(SETTINGS_FILE)
        similarity = general.get("similarity_fn_name") or "cosine"
        if similarity not in ("cosine", "dot"):
            raise ValueError(
                f"similarity_fn_name={similarity!r} of the teacher must be cosine or dot; correct its {SETTINGS_FILE}"
            )
        if general.get("truncate_dim"):
            raise ValueError(
                f"truncate_dim={general['truncate_dim']} of the teacher would cut the embeddings, which are compared "
                f"whole here; remove it from {SETTINGS_FILE} in a copy of the teacher"
            )
        if not isinstance(general.get("prompts") or {}, dict):
            raise ValueError(
                f"prompts={general['prompts']!r} in {SETTINGS_FILE} of the teacher must be an object; mend it"
            )
        prompt = (general.get("prompts") or {}).get(general.get("default_prompt_name") or "") or ""
        if prompt and not self._pooling_settings().get("include_prompt", True):
            ids = tokenizer(prompt).input_ids
            ends = ids[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id)
            pooling = replace(pooling, skip=len(ids) - ends)
        encoder = next((self._object(name) for name in ENCODER_FILES if name in self.files), {})
        if encoder.get("do_lower_case") and tokenizer("A").input_ids != tokenizer("a").input_ids:
            raise ValueError(
                "do_lower_case=True in the settings of the teacher's encoder is not what its tokenizer does; give the "
                "tokenizer a Lowercase normalizer, or remove the setting, in a copy of the teacher"
            )
        given = encoder.get("processing_kwargs") or {}
        chosen = {**(given.get("common") or {}), **(given.get("text") or {})}
        longest = chosen.pop("max_length", None) or encoder.get("max_seq_length") or tokenizer.model_max_length
        if other := {key: v for key, v in chosen.items() if key != "padding" and (key, v) != ("truncation", True)}:
            raise ValueError(
                f"processing_kwargs of the teacher's encoder has {other}, which a distillation does not follow; remove "
                "it in a copy of the teacher"
            )
        if not isinstance(longest, (int, float)):  # of some tokenizers it is 1e30
            raise ValueError(f"max_seq_length={longest!r} of the teacher's encoder must be a number; correct it")
        is_unit = similarity == "cosine" or "Normalize" in self.kinds
        return EncoderSettings(pooling, prompt, None if longest >= LARGE_INTEGER else int(longest), is_unit)


_OLD_MODES = {
    "cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean", "lasttoken": "lasttoken",
}  # fmt: skip


@dataclass(frozen=True)
class EncoderSettings:
    """How a sentence becomes an embedding.

    Attributes:
        pooling: of the last hidden states.
        prompt: put before every sentence.
        max_length: tokens at which a sentence is cut; None where nothing says.
        normalize: whether embeddings are compared at length 1.
    """

    pooling: Pooling = MEAN
    prompt: str = ""
    max_length: int | None = None
    normalize: bool = True

    def check_length(self, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Whether something of a sentence is left beside the prompt, if both are cut at `length` tokens.

        Raises:
            ValueError: nothing is left.
        """
        tokens = len(tokenizer(self.prompt).input_ids) if self.prompt else 0
        if tokens >= length:
            raise ValueError(
                f"a sentence is cut at {length} tokens, and the prompt {self.prompt!r} alone has {tokens} with the "
                "special ones, so all sentences would be the same; raise max_length, or shorten the teacher's prompt"
            )


DEFAULT = EncoderSettings()
"""Of a model without modules: means of the tokens, at length 1."""


def encoder_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EncoderSettings:
    """Those of the model's own modules, `DEFAULT` for a model without any.

    Raises:
        ValueError: modules or settings that a distillation does not follow.
    """
    modules = modules_of(model)
    return DEFAULT if modules is None else modules.settings(tokenizer)


def modules_of(model: PreTrainedModel) -> SentenceModules | None:
    """The modules that a model was loaded with, or made from a model with; None if there are none.

    A model that was loaded by transformers has those of its folder, or of the Hub's cache, if they are for its class.

    Raises:
        ValueError: as `read_modules`.
    """
    if _SHARED not in vars(model):
        source, found = model.config.name_or_path, None
        if source and (model.base_model is model or _architecture(source) == type(model).__name__):
            found = read_modules(source, local=True)
            if found is None and not os.path.isdir(source) and model.base_model is model:
                logger.warning(
                    "whether %s has pooling and prompts of sentence-transformers is not known, since the model was "
                    "passed; pass its name, or a folder with all of its files, if it is a sentence encoder",
                    source,
                )
        share_modules(found, model)
    shared: SentenceModules | None = vars(model)[_SHARED]
    return shared


def share_modules(modules: SentenceModules | None, *models: PreTrainedModel) -> None:
    """Let models have these modules; what is saved of them has the files beside it."""
    for model in models:
        vars(model)[_SHARED] = modules


def encoder_folder(source: str | os.PathLike[str]) -> str:
    """Where the encoder lies in a folder of sentence-transformers: in the folder itself, or in its 0_Transformer.

    Raises:
        ValueError: as `read_modules`.
    """
    path = Path(source) / MODULES_FILE
    if not path.is_file() or (Path(source) / "config.json").is_file():
        return os.fspath(source)
    return os.path.join(source, _entries(path.read_bytes(), os.fspath(source))[0]["path"])


def read_modules(source: str | os.PathLike[str], local: bool = False) -> SentenceModules | None:
    """The files of sentence-transformers beside a model; None if there is no ``modules.json``.

    Args:
        source: folder, or name on the Hub.
        local: look for a name in the cache only.

    Raises:
        ValueError: broken files, or modules that a student could not take over.
    """
    content = _content(source, MODULES_FILE, local)
    if content is None:
        return None
    entries = _entries(content, os.fspath(source))
    encoder = entries[0]["path"]
    found = {MODULES_FILE: content}
    if encoder:  # an old layout; a student has its encoder, and the code that opens it, in the folder itself
        entries = [{**entries[0], "path": ""}, *entries[1:]]
        found[MODULES_FILE] = (json.dumps(entries, indent=2) + "\n").encode()
    for name in ENCODER_FILES:
        if (content := _content(source, f"{encoder}/{name}" if encoder else name, local)) is not None:
            found[name] = content
            break
    if (content := _content(source, SETTINGS_FILE, local)) is not None:
        found[SETTINGS_FILE] = content
    for entry in entries[1:]:
        for name in (f"{entry['path']}/{file}" for file in _MODULE_FILES):
            if name.endswith(".bin") and f"{entry['path']}/model.safetensors" in found:
                continue
            if (content := _content(source, name, local)) is not None:
                found[name.replace("pytorch_model.bin", "model.safetensors")] = (
                    _as_safetensors(content, name) if name.endswith(".bin") else content
                )
    for entry in entries[1:]:
        for name in (f"{entry['path']}/{file}" for file in _NEEDED.get(_kind(entry), ())):
            if name not in found:
                raise ValueError(
                    f"{MODULES_FILE} of {os.fspath(source)!r} has the module {_kind(entry)}, but {name} is missing; "
                    "save or download the teacher again"
                )
    for name, content in found.items():
        if name.endswith(".json"):
            settings = _parsed(content, name)
            if not isinstance(settings, dict) and name != MODULES_FILE:
                raise ValueError(f"{name} of the teacher holds {settings!r}, not an object; mend or remove it")
            refuse_code(settings, name, _CODE)
    return SentenceModules(found, tuple(_kind(entry) for entry in entries[1:]))


def _architecture(source: str) -> str | None:
    """The class of the model in a folder, or in the Hub's cache."""
    content = _content(source, "config.json", local=True)
    return saved_class(_parsed(content, "config.json").get("architectures")) if content else None


def saved_class(architectures: list[str] | str | None) -> str | None:
    """The class that was saved, by what a config has as `architectures`."""
    return next(iter(architectures), None) if isinstance(architectures, list) else architectures


def _content(source: str | os.PathLike[str], name: str, local: bool) -> bytes | None:
    source = os.fspath(source)
    if os.path.isdir(source):
        path = Path(source) / name
        return path.read_bytes() if path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, name) if local else hf_hub_download(source, name)
    except LocalEntryNotFoundError as error:
        if name == MODULES_FILE:
            logger.warning("%s of %s cannot be looked up: if it has one, the student lacks its pooling", name, source)
        elif not constants.HF_HUB_OFFLINE:
            raise OSError(
                f"{name} of {source!r} cannot be looked up ({error}); try again, or set HF_HUB_OFFLINE=1 if all of its "
                "files are in the cache"
            ) from error
        return None
    except (EntryNotFoundError, HFValidationError):
        return None
    except Exception as error:  # of the Hub's client and of the HTTP client below it
        raise OSError(f"{name} of {source!r} cannot be read ({error}); try again") from error
    return Path(cached).read_bytes() if isinstance(cached, str) else None


def _parsed(content: bytes, name: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name} of the teacher is not JSON ({error}); mend or remove it") from error


def _entries(content: bytes, source: str) -> list[dict[str, Any]]:
    """The modules that are listed, the encoder first."""
    remedy = f"remove {MODULES_FILE} from a copy of it to compress its encoder alone, without pooling and prompts"
    entries = _parsed(content, MODULES_FILE)
    listed = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    seen = set()
    for entry in entries if listed and entries else [{}]:
        path, kind = entry.get("path"), str(entry.get("type"))
        is_folder = isinstance(path, str) and re.fullmatch(r"\w[\w.-]*", path)
        if path in seen or not (is_folder or (path == "" and entry is entries[0])):
            raise ValueError(
                f"{MODULES_FILE} of {source!r} has a module with the path {path!r}, no folder of its own; {remedy}"
            )
        seen.add(path)
        known = KINDS if entry is not entries[0] else _ENCODERS
        if not kind.startswith("sentence_transformers.") or _kind(entry) not in known:
            raise ValueError(
                f"{MODULES_FILE} of {source!r} has the module {kind!r}, where {' or '.join(known)} of "
                f"sentence-transformers can be taken over; {remedy}"
            )
    return entries


def _kind(entry: Mapping[str, Any]) -> str:
    return str(entry["type"]).rpartition(".")[2]


def refuse_code(found: Any, name: str, others: Iterable[str] = ()) -> None:
    """Refuse settings that name code: sentence-transformers would import and call it for whoever opens the student.

    Args:
        found: content of a file with settings.
        name: of the file.
        others: further keys that must not be set.

    Raises:
        ValueError: an activation outside ``torch.nn``, or one of the other keys.
    """
    for value in found if isinstance(found, list) else ():
        refuse_code(value, name, others)
    for key, value in found.items() if isinstance(found, dict) else ():
        if key in (*_ACTIVATIONS, *others) and value and not str(value).startswith("torch.nn."):
            raise ValueError(
                f"{key}={value!r} in {name} of the teacher could run code (an activation must begin with torch.nn.); "
                "remove it from a copy of the teacher"
            )
        refuse_code(value, name, others)


def _as_safetensors(content: bytes, name: str) -> bytes:
    try:
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return save({key: value.contiguous().clone() for key, value in weights.items()}, {"format": "pt"})
    except Exception as error:  # of many kinds
        raise ValueError(f"{name} of the teacher holds no plain weights ({error}); save the teacher again") from error
