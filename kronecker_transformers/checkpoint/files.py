"""Output files and folders: checked before long work begins, and written atomically."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def check_file(path: str | os.PathLike[str]) -> Path:
    """Refuse an output file before long work begins.

    Raises:
        FileNotFoundError: its folder does not exist.
        PermissionError: nothing may be written there.
        IsADirectoryError: it is a folder.
        FileExistsError: it is a device or a pipe.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {str(path.parent)!r} of the file {path.name!r} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"folder {str(path.parent)!r} may not be written; choose another one for {path.name!r}")
    if path.is_dir():
        raise IsADirectoryError(f"output {str(path)!r} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"output {str(path)!r} is no regular file; give the name of one")
    return path


def to_json(value: Any) -> str:
    """Strict JSON, for records: numbers that JSON does not have, infinite ones and NaN, are null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file, whole or not at all; an older one is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path).resolve()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def check_new_folder(folder: str | os.PathLike[str]) -> Path:
    """Refuse an output folder before long work begins.

    Returns:
        Its absolute path, links resolved.

    Raises:
        FileExistsError: it exists and is not an empty folder, or is a mount point, which cannot be replaced.
        PermissionError: it could not be made where it should be.
    """
    target = Path(folder).resolve()
    if target == Path.cwd():
        raise FileExistsError(f"output {str(folder)!r} is the current folder; name a new one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"output {str(folder)!r} already holds something; choose another folder or remove it first"
        )
    if os.path.ismount(target):
        raise FileExistsError(f"output {str(folder)!r} is a mount point; name a new folder in it")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output {str(folder)!r} could not be written: {str(existing)!r} is not a folder that may be written; "
            "choose another folder"
        )
    return target


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft beside `folder` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: the folder holds something already.
        OSError: it cannot be written.
    """
    target = check_new_folder(folder)
    missing = [parent for parent in target.parents if not parent.exists()]  # innermost first
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        draft.mkdir()
        yield draft
        probe = draft / ".probe"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        for path in filter(Path.is_file, draft.rglob("*")):
            path.chmod(mode)  # safetensors makes files that only their owner may read
        if target.exists():
            draft.chmod(target.stat().st_mode)
        draft.replace(target)
    except BaseException as error:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        # the weights' library raises an error of its own on a full disk, the tokenizer's a bare Exception
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise OSError(
            f"output {str(folder)!r} could not be written and nothing was left behind: {error}; "
            "free some space or choose another folder"
        ) from error
