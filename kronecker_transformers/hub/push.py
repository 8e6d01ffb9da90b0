"""From a folder to a repository on the Hub, in one commit.

One commit is all or nothing: a reader sees the repository as it was or as it will be. It is made on top of the commit
that was looked at, so that two pushes at a time do not mix. What the repository holds already is not sent again, and if
that is all, no commit is made.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    SpaceCardData,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .card import has_own_card, model_card
from .files import CARD, WEIGHTS, PublishedFile, published_files

ATTEMPTS = 5
"""At a push that the Hub, or the line to it, fails."""
PYTHON = "3.11"
"""Of a Space, whose default is an older one than the code of a model needs."""
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers after which it is worth to try again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What a push has done."""

    url: str
    """Of the commit, or of the pull request."""
    commit: str
    """The commit that holds the files."""
    is_new: bool
    """False where the repository held all of it already."""


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    card: ModelCard | None = None,
    also: Mapping[str, Path | bytes] | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish a checkpoint as one commit.

    A repository that does not exist is made, and so is a branch. Weights and code of an older version that the new one
    has no more are removed in the same commit; other files are left alone.

    Args:
        folder: of the checkpoint, as `compress`, the examples and `save_pretrained` write it.
        repo_id: "organisation/name", or a name of one's own.
        private: make a new repository private; one that is there must be private already.
        revision: branch; default main.
        create_pr: propose the commit as a pull request instead.
        message: of the commit.
        card: default: README.md, or `model_card` of what is recorded where there is none, or one that it has made.
        also: further files or their contents, by their names in the repository.
        token: default: that of `hf auth login`, or HF_TOKEN.

    Raises:
        FileNotFoundError, ValueError: see `published_files`; or a name that the Hub does not allow, or a public
            repository with `private`.
        OSError: the Hub refuses, or cannot be reached; then nothing of the push is visible, and it can be made again.
    """
    check_branch(revision, create_pr)
    repo_id = full_name(repo_id, token)
    sources = {file.name: file.source for file in files_to_push(folder, repo_id, card=card, token=token)}
    sources.update(also or {})
    files = {name: source if isinstance(source, bytes) else str(source) for name, source in sources.items()}
    return _publish(
        HfApi(token=token), repo_id, files, message or "Upload model", {"private": private}, revision, create_pr
    )


def check_branch(revision: str | None, create_pr: bool) -> None:
    """Refuse a pull request to another branch than main.

    Raises:
        ValueError: it is asked for.
    """
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(f"revision={revision!r} cannot be combined with a pull request, which goes to main; leave one")


def files_to_push(
    folder: str | os.PathLike[str], repo_id: str, *, card: ModelCard | None = None, token: str | None = None
) -> list[PublishedFile]:
    """What `push` sends, with the card, sorted by name; its arguments and errors."""
    files, repo_id = published_files(folder), full_name(repo_id, token)
    if card is None and not has_own_card(folder):
        card = model_card(folder, repo_id, look_up=partial(card_metadata, token=token))
    if card is not None:
        files = [file for file in files if file.name != CARD] + [PublishedFile(CARD, str(card).encode())]
    return sorted(files, key=lambda file: file.name)


def card_metadata(repo_id: str, token: str | None = None) -> dict[str, Any]:
    """The metadata of a model's card on the Hub; empty, with a warning, where it cannot be had."""
    try:
        data = HfApi(token=token).model_info(repo_id).card_data
    except Exception as error:
        if _failure(error)[0] is None and not isinstance(error, HFValidationError):
            raise
        logger.warning("the card of %r cannot be read (%s): no licence is taken from it", repo_id, type(error).__name__)
        return {}
    return data.to_dict() if data else {}


def push_space(
    folder: str | os.PathLike[str],
    repo_id: str,
    model: str,
    teacher: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish the Space of ``examples/space`` for a model on the Hub and its teacher, as one commit.

    The model is pinned to its present commit, so that the Space runs no other code later.

    Args:
        folder: with app.py and requirements.txt.
        repo_id: of the Space.
        model: name on the Hub of the factored model.
        teacher: the same of its teacher.
        private: make a new Space private; one that is there must be private already.
        token: default: that of `hf auth login`, or HF_TOKEN.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a name that the Hub does not allow, or a public Space with `private`.
        OSError: as `push`.
    """
    for name in (repo_id, model, teacher):
        _check_name(name)
    parts = {name: Path(folder) / name for name in ("app.py", "requirements.txt")}
    for name, path in parts.items():
        if not path.is_file():
            raise FileNotFoundError(f"folder {str(folder)!r} holds no {name}; give examples/space of this package")
    files: dict[str, str | bytes] = {name: str(path) for name, path in parts.items()}
    api = HfApi(token=token)
    commit = _tried(lambda: api.model_info(model), api, model).sha
    settings = {"model": model, "teacher": teacher, "revision": commit}
    files["space.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    title = model.rpartition("/")[2]
    data = SpaceCardData(
        title=title, sdk="gradio", python_version=PYTHON, app_file="app.py", models=[model, teacher],
        tags=["kronecker", "compression"],
    )  # fmt: skip
    text = f"{title} beside its teacher {teacher}: answers, sizes and times on one CPU server."
    files["README.md"] = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n".encode()
    options = {"private": private, "repo_type": "space", "space_sdk": "gradio"}
    return _publish(api, repo_id, files, "Upload Space", options)


def full_name(repo_id: str, token: str | None = None) -> str:
    """A name with its owner; of a name alone, the owner is whoever is logged in.

    Raises:
        ValueError: a name that the Hub does not allow, or without an owner where nobody is logged in.
        OSError: the Hub cannot be asked who that is.
    """
    _check_name(repo_id)
    if "/" in repo_id:
        return repo_id
    if not (token or get_token()):
        raise ValueError(
            f"repository {repo_id!r} names no owner, and nobody is logged in; write owner/{repo_id}, or log in with "
            "`hf auth login`"
        )
    api = HfApi(token=token)
    return f"{_tried(api.whoami, api, repo_id)['name']}/{repo_id}"


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repository {repo_id!r} is no name that the Hub allows: {error}") from error


def _publish(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, str | bytes],
    message: str,
    new: Mapping[str, Any],
    revision: str | None = None,
    create_pr: bool = False,
) -> Pushed:
    """Make the repository with the options of `new` if there is none, and commit: name to path or content."""
    branch, kind = revision or constants.DEFAULT_REVISION, new.get("repo_type")
    repo_id = _tried(lambda: api.create_repo(repo_id, exist_ok=True, **new).repo_id, api, repo_id)
    found = _tried(lambda: _head(api, repo_id, kind, branch), api, repo_id)
    if new.get("private") and found.private is False:
        raise ValueError(
            f"repository {repo_id!r} is public, and private=True makes only a new one private; change its visibility "
            "on the Hub first, choose another name, or leave private out"
        )
    before = found.sha

    def commit() -> Pushed:
        head = _head(api, repo_id, kind, branch)  # at a second try perhaps the commit of the first, unanswered one
        remote = {sibling.rfilename for sibling in head.siblings or ()}
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in _left_over(remote, files)),
            ],
            commit_message=message,
            repo_type=kind,
            revision=branch,
            create_pr=create_pr,
            parent_commit=head.sha,
        )
        return Pushed(done.pr_url or done.commit_url, done.oid, done.oid != before)

    return _tried(commit, api, repo_id, attempts=1 if create_pr else ATTEMPTS)  # never two pull requests


def _head(api: HfApi, repo_id: str, kind: str | None, branch: str) -> Any:
    try:
        return api.repo_info(repo_id, repo_type=kind, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repo_id, repo_type=kind, branch=branch, exist_ok=True)
        return api.repo_info(repo_id, repo_type=kind, revision=branch)


def _left_over(remote: Iterable[str], sent: Iterable[str]) -> list[str]:
    """Weights and code of an older version in the repository."""
    ours = {path.name for path in (Path(__file__).parent.parent / "models").glob("*.py")} - {"__init__.py"}
    return sorted(
        name
        for name in set(remote).difference(sent)
        if name in ours or any(fnmatch(name, pattern) for pattern in WEIGHTS)
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
                unknown = attempts == 1 and status not in range(400, 500)  # the one answer to a pull request was lost
                outcome = "look whether the pull request exists" if unknown else "nothing of it is visible"
                raise OSError(f"push failed; {outcome}: {_explained(status, error, api, repo_id)}") from error
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
    return known.get(status, again)
