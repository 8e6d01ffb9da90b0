"""Reading teachers and students, and writing them as checkpoint folders."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..models import DENSE_CLASSES, FACTORED_CLASSES
from ..models.kronecker_family import FAMILIES, family_of, supported_families
from ..models.kronecker_internals import WeightsError
from .files import new_folder, to_json
from .sentence_modules import SentenceModules, encoder_folder, modules_of, read_modules, saved_class, share_modules

logger = logging.getLogger(__name__)

REPORT_FILE = "compression.json"
"""Beside the weights: what was lost in compression, bound to the factors by their SHA-256."""
_OLD_BUFFERS = (".position_ids", ".token_type_ids", ".attn.bias", ".attn.masked_bias")  # of earlier versions
_TRUNCATION = "truncation_and_padding"  # attribute of a tokenizer
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")


def load_teacher(
    source: str | os.PathLike[str], head: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A dense teacher and its tokenizer, from a folder or the Hub.

    Args:
        source: folder, or name on the Hub.
        head: how the names of the classes end whose head is wanted; any other model is loaded without its head.

    Raises:
        ValueError: another family or another head.
        OSError: nothing there, or unreadable weights.
    """
    config = _load_config(source)
    classes: dict[str, Any] = {cls.__name__: cls for cls in FACTORED_CLASSES}
    if config.model_type.startswith("kronecker_"):
        raise ValueError(f"teacher {str(source)!r} is compressed already; give the dense model it came from")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"teacher {str(source)!r} is quantized; give the weights from before its quantization")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"teacher {str(source)!r} has position_embedding_type={config.position_embedding_type!r}, which "
            "transformers 5 does not compute; give one with absolute positions"
        )
    base_class = DENSE_CLASSES[FAMILIES[config.model_type].base_class]
    architecture = saved_class(config.architectures) or base_class.__name__  # without a head, for all that is known
    modules = read_modules(source)
    passed_over = not architecture.endswith(head)
    if passed_over or (modules is not None and "Pooling" in modules.kinds):  # whatever head its own teacher had
        architecture = base_class.__name__
    if architecture not in classes:
        raise ValueError(
            f"teacher {str(source)!r} has the architecture {architecture!r}; supported: {', '.join(sorted(classes))}; "
            "load it as one of these and pass the model"
        )
    return _load(classes[architecture], source, modules, knows_head=passed_over or bool(config.architectures))


def load_student(folder: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A factored model and its tokenizer, from a folder or the Hub, with the classes of this package.

    Raises:
        ValueError: not a factored checkpoint, or weights that do not fit its plan.
        OSError: nothing there, or unreadable weights.
    """
    config = _load_config(folder)
    architecture = saved_class(config.architectures) or "none"
    model_class: Any = {cls.__name__: cls for cls in DENSE_CLASSES}.get(architecture)
    if model_class is None or config.model_type != model_class.config_class.model_type:
        raise ValueError(
            f"{str(folder)!r} holds a {config.model_type!r} model of class {architecture}, not a factored one; "
            "compress it first"
        )
    return _load(model_class, folder, read_modules(folder))


def source_name(source: str) -> str:
    """For records: a name on the Hub as it is, a file or folder by its whole path, so that they cannot be confused."""
    return str(Path(source).resolve()) if source and os.path.exists(source) else source


def load_model(source: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A dense or factored model and its tokenizer, as its config says.

    Raises:
        ValueError, OSError: as `load_teacher` and `load_student`.
    """
    factored = _load_config(source).model_type.startswith("kronecker_")
    return load_student(source) if factored else load_teacher(source)


def _load_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    source = encoder_folder(source)
    if os.path.isfile(source):
        raise NotADirectoryError(f"{source!r} is a file; give the folder that holds the model")
    if os.path.isfile(os.path.join(source, "adapter_config.json")):
        raise ValueError(
            f"folder {source!r} holds a PEFT adapter; merge_and_unload() it, save the model, and give that folder"
        )
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise FileNotFoundError(f"folder {source!r} holds no config.json; give the folder that holds the model")
    if not os.path.isdir(source) and (os.path.isabs(source) or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"folder {source!r} does not exist; give an existing folder or a model name of the Hub")
    if os.path.isdir(source):
        _check_config_file(Path(source))
    try:
        model_type = str(PreTrainedConfig.get_config_dict(source)[0].get("model_type"))
        if model_type in FAMILIES or model_type.startswith("kronecker_"):
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a value of a wrong type raises errors of many kinds
        if os.path.isdir(source):
            raise OSError(f"config.json in {source!r} cannot be used ({error}); correct it") from error
        raise OSError(
            f"{source!r} is neither a folder with a model nor a model on the Hub that can be reached: {error}"
        ) from error
    raise ValueError(f"the model {source!r} is of the family {model_type!r}; supported are {supported_families()}")


def _check_config_file(folder: Path) -> None:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"config.json in {str(folder)!r} is not JSON ({error}); restore or replace it") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not model_type or (str(model_type).casefold() in FAMILIES and model_type not in FAMILIES):
        raise ValueError(
            f"config.json in {str(folder)!r} has model_type={model_type!r}, which is missing or misspelt; "
            f'add or correct it, for example "model_type": "bert"'
        )


def _check_weights_file(source: str | os.PathLike[str]) -> None:
    """Name the real cause where a folder has weights in another format."""
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists():
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
    if any(name.startswith("pytorch_model") for name in found):
        remedy = (
            "a pickle can run code, so it is not opened; if you trust it, convert it once: "
            f"AutoModel.from_pretrained({str(source)!r}, use_safetensors=False).save_pretrained(NEW_FOLDER), with the "
            "class of its head in place of AutoModel"
        )
    else:
        remedy = "save the model with save_pretrained of transformers 5"
    raise OSError(
        f"folder {str(source)!r} holds no model.safetensors, but {', '.join(found) or 'no weights at all'}; {remedy}"
    )


def _load(
    model_class: type[PreTrainedModel],
    source: str | os.PathLike[str],
    modules: SentenceModules | None,
    knows_head: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    place = encoder_folder(source)
    _check_weights_file(place)
    model = _load_weights(model_class, place, knows_head)
    share_modules(modules, model)
    return model, _load_tokenizer(place)


def _load_weights(
    model_class: type[PreTrainedModel], source: str | os.PathLike[str], knows_head: bool
) -> PreTrainedModel:
    """A model with every weight from its checkpoint; one that was saved without a pooler comes back without.

    What does not fit is an error here, so the library's own report on it is not shown.
    """
    load: Any = partial(
        model_class.from_pretrained, source, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = load()
        pooler = family_of(model).pooler_module
        if info["missing_keys"] and all(key.startswith(f"{pooler}.") for key in info["missing_keys"]):
            model, info = load(add_pooling_layer=False)
    except SafetensorError as error:
        raise OSError(
            f"the weights in {str(source)!r} are truncated or corrupted ({error}); copy or download them again"
        ) from error
    except WeightsError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, SafetensorError):  # our own models say it already
            raise
        raise OSError(f"the model in {str(source)!r} cannot be loaded ({error}); restore or replace it") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    base = model.base_model
    parts = {name for name, _ in base.named_children()} - {pooler}
    for key in sorted(info["unexpected_keys"]):
        name = key.removeprefix(f"{model.base_model_prefix}.")
        if name.split(".")[0] not in (*parts, pooler) and not knows_head:
            raise ValueError(
                f"config.json in {str(source)!r} has no architectures, and the weights hold {key!r}, part of a head; "
                'add the class that was saved, for example "architectures": ["BertForSequenceClassification"]'
            )
        if name.split(".")[0] in parts and not name.endswith(_OLD_BUFFERS):
            raise ValueError(
                f"the weights in {str(source)!r} hold {key!r}, for which its config.json has no place, so the outputs "
                "would be others than those it was trained for; restore its config.json"
            )
    left = [key for key in sorted(info["unexpected_keys"]) if not key.endswith(_OLD_BUFFERS)]
    if left:
        logger.warning("%s holds weights that %s does not use: %s", source, model_class.__name__, ", ".join(left[:5]))
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"the weights in {str(source)!r} lack {len(missing)} parameters, {missing[0]!r} first; restore them"
        )
    return model.eval()


def _load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    if os.path.isdir(source) and not any((Path(source) / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        if os.path.isdir(source):
            raise OSError(
                f"the tokenizer in {str(source)!r} cannot be loaded ({error}); restore or remove its files"
            ) from error
        logger.warning("%s comes without a tokenizer that can be loaded: %s", source, error)
        return None
    remember_truncation(tokenizer)
    tokenizer.init_kwargs.pop("auto_map", None)  # code that is not used here, and would travel with every checkpoint
    return tokenizer


def save_folder(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model, its tokenizer, its files for sentence-transformers and a record of its compression, atomically.

    Raises:
        FileExistsError: the folder holds something already.
        OSError: it cannot be written.
    """
    with new_folder(folder) as draft:
        write_checkpoint(draft, model, tokenizer, record)
    return Path(folder)


def remember_truncation(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Keep how a fast tokenizer truncates and pads by itself: each call sets both, and the last would be saved."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        vars(tokenizer).setdefault(_TRUNCATION, (backend.truncation, backend.padding))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer that truncates and pads as it did when it was loaded.

    A reference to code of its own, which it was loaded without, is left out: it would run for whoever trusts the
    student's.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs.pop("auto_map", None)
    if _TRUNCATION in vars(tokenizer):
        truncation, padding = vars(tokenizer)[_TRUNCATION]
        backend: Any = tokenizer.backend_tokenizer  # of a fast one
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    tokenizer.save_pretrained(folder)


def write_checkpoint(
    draft: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """The files of `save_folder`, in a folder that is there."""
    model.save_pretrained(draft)
    if tokenizer is not None:
        save_tokenizer(tokenizer, draft)
    if modules := modules_of(model):
        modules.write(draft)
    if record is not None:
        record = {"teacher": source_name(model.config.name_or_path or "") or None, **record}
        (draft / REPORT_FILE).write_text(to_json(record), encoding="utf-8")
