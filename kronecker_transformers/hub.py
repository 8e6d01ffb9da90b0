"""From the folder of a checkpoint to a repository on the Hub, in one commit.

What is published is chosen by name, so that nothing else that lies in a folder ever travels: no optimizer state, no
training arguments, no pickle of any kind. Weights are safetensors; with a factored model go the Python files that its
config names, so that a process without this package can load it.

One commit is all or nothing: a reader sees the repository as it was or as it shall be. It is made on top of the commit
that was looked at, so that two pushes at a time do not mix. What the repository holds already is not sent again, and if
that is all, no commit is made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers.dynamic_module_utils import get_relative_import_files

from .checkpoint import REPORT_FILE

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PUBLISHED = (
    "README.md", "config.json", "generation_config.json", *WEIGHTS,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt",
    REPORT_FILE, "results.json", "plan.yaml", "*.png",
)  # fmt: skip
"""Names in the top folder of a checkpoint that are published; code comes by what the config names."""
ATTEMPTS = 5
"""At a push that the Hub, or the line to it, fails."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers after which it is worth to try again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedFile:
    """A file of a push."""

    name: str
    """In the repository."""
    path: Path
    size: int
    """Bytes."""
    is_code: bool
    """Whether `trust_remote_code=True` runs it."""

    def sha256(self) -> str:
        """Of its content, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Pushed:
    """What a push has done."""

    url: str
    """Of the commit, or of the pull request."""
    commit: str
    """The commit that holds the files."""
    is_new: bool
    """False where the repository held all of it already."""


def published_files(folder: str | os.PathLike[str]) -> list[PublishedFile]:
    """The files of a checkpoint that a push sends, sorted by name.

    Raises:
        FileNotFoundError: no folder, no config, no weights, or a file that the config or the index names is missing.
        ValueError: config or index are not readable, or name files outside the folder.
    """
    folder = Path(folder)
    config = _read_json(folder, "config.json")
    names = {path.name for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, p) for p in PUBLISHED)}
    code = _code(folder, config)
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
    return [
        PublishedFile(name, folder / name, (folder / name).stat().st_size, name in code)
        for name in sorted(names | code)
    ]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"folder {str(folder)!r} holds no {name}; give the folder of a saved model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); save the model again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds {type(found).__name__}, not an object; save the model again")
    return found


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


def files_table(repository: str, files: Iterable[PublishedFile]) -> Table:
    """What a push sends, for a terminal."""
    table = Table(title=repository, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("SHA-256 of code that trust_remote_code runs", no_wrap=True)
    for file in files:
        table.add_row(file.name, f"{file.size:,}", file.sha256() if file.is_code else "")
    return table


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish a checkpoint as one commit.

    A repository that does not exist is made, and so is a branch. Weights and code of an older version that the new one
    has no more are removed in the same commit; other files are left alone.

    Args:
        folder: of the checkpoint, as `compress`, the examples and `save_pretrained` write it.
        repo_id: "organisation/name", or a name of one's own.
        private: of a new repository only.
        revision: branch; default main.
        create_pr: propose the commit as a pull request instead.
        message: of the commit.
        token: default: that of `hf auth login`, or HF_TOKEN.

    Raises:
        FileNotFoundError, ValueError: see `published_files`; or a name that the Hub does not allow.
        OSError: the Hub refuses, or cannot be reached; then nothing of the push is visible, and it can be made again.
    """
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(f"revision={revision!r} cannot be combined with a pull request, which goes to main; leave one")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repository {repo_id!r} is no name that the Hub allows: {error}") from error
    files = published_files(folder)
    api = HfApi(token=token)

    def create() -> str:
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id

    branch = revision or constants.DEFAULT_REVISION
    repo_id = _tried(create, api, repo_id)
    before = _tried(lambda: _head(api, repo_id, branch), api, repo_id).sha

    def commit() -> Pushed:
        head = _head(api, repo_id, branch)  # at a second try it may be the commit of the first, whose answer was lost
        remote = {sibling.rfilename for sibling in head.siblings or ()}
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(file.name, str(file.path)) for file in files),
                *(CommitOperationDelete(name) for name in _left_over(remote, files)),
            ],
            commit_message=message or "Upload model",
            revision=branch,
            create_pr=create_pr,
            parent_commit=head.sha,
        )
        return Pushed(done.pr_url or done.commit_url, done.oid, done.oid != before)

    return _tried(commit, api, repo_id, attempts=1 if create_pr else ATTEMPTS)  # never two pull requests


def _head(api: HfApi, repo_id: str, branch: str) -> Any:
    try:
        return api.model_info(repo_id, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.model_info(repo_id, revision=branch)


def _left_over(remote: Iterable[str], files: Iterable[PublishedFile]) -> list[str]:
    """Weights and code of an older version in the repository."""
    sent = {file.name for file in files}
    ours = {path.name for path in (Path(__file__).parent / "models").glob("*.py")} - {"__init__.py"}
    return sorted(
        name for name in set(remote) - sent if name in ours or any(fnmatch(name, pattern) for pattern in WEIGHTS)
    )


def _tried(work: Callable[[], Any], api: HfApi, repo_id: str, attempts: int = ATTEMPTS) -> Any:
    """Do it; again where the Hub or the line failed for the moment; refusals become one clear error."""
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except Exception as error:
            status, wait = _failure(error)
            if status is None:
                raise
            if (status and status not in _PASSING) or attempt == attempts:
                raise OSError(_explained(status, error, api, repo_id)) from error
            wait = min(2.0**attempt, 60) if wait is None else wait
            logger.warning("the Hub failed (%s); trying again in %g seconds", status or type(error).__name__, wait)
            time.sleep(wait)
    raise AssertionError("not reached")


def _failure(error: BaseException | None) -> tuple[int | None, float | None]:
    """Status of the Hub's answer, 0 where there was none, None for an error of another kind; and how long to wait."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            after = error.response.headers.get("Retry-After", "")
            return error.response.status_code, float(after) if re.fullmatch(r"\d+", after) else None
        client = type(error).__module__.partition(".")[0]
        if isinstance(error, (ConnectionError, TimeoutError)) or client in ("httpx", "httpx2"):
            return 0, None
        error = error.__cause__
    return None, None


def _explained(status: int, error: Exception, api: HfApi, repo_id: str) -> str:
    known = {
        0: f"{api.endpoint} cannot be reached ({type(error).__name__}); look at the network, then push again",
        401: f"{api.endpoint} does not accept the token; log in with `hf auth login`, or set HF_TOKEN",
        403: f"the token may not write to {repo_id!r}; use one with write access, or push to another name",
        404: f"{repo_id!r} is not found, or hidden from this token; check the name and the token's rights",
        412: f"{repo_id!r} has been changed by somebody else in the meantime; push again",
        429: f"{api.endpoint} asks for fewer requests; push again later",
    }
    details = " ".join(str(getattr(error, "server_message", None) or error).split())
    again = f"{api.endpoint} answered {status} ({details})" + ("; push again later" if status in _PASSING else "")
    return f"push failed, and nothing of it is visible: {known.get(status, again)}"
