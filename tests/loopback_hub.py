"""A hub on loopback, for the real client of huggingface_hub: repositories with commits, pull requests, LFS, and faults.

Its answers follow what the client asks for and reads; what is stored can be looked at through `Hub.repos`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_FROM = 1_000_000  # bytes
LFS_ENDINGS = (".safetensors", ".png", ".bin")


def git_oid(content):
    """Name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path, size):
    return path.endswith(LFS_ENDINGS) or size >= LFS_FROM


def metadata(card):
    """What stands between the lines at the top of a card."""
    return yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None


@dataclass
class Repo:
    private: bool
    revisions: dict = field(default_factory=dict)
    """Commit by branch."""
    commits: dict = field(default_factory=dict)
    """Files, content by path, by commit."""
    log: list = field(default_factory=list)
    """(commit, branch, message), oldest first."""

    def commit(self, branch, files, message):
        name = hashlib.sha1(repr((len(self.log), branch, message, sorted(files))).encode()).hexdigest()
        self.commits[name] = files
        self.revisions[branch] = name
        self.log.append((name, branch, message))
        return name

    def files(self, revision="main"):
        return self.commits[self.revisions.get(revision, revision)]


@dataclass
class Fault:
    """What happens to the next `times` requests with this method whose path matches."""

    method: str
    path: str
    status: int | None = None
    """None: the connection is cut after `after` bytes of the body were read, or before the answer."""
    headers: dict = field(default_factory=dict)
    times: int = 1
    after: int = 0
    done: bool = False
    """The request is carried out before it fails: only the answer is lost."""


class Hub:
    """Start with `with Hub() as hub:`; `hub.url` is its endpoint."""

    def __init__(self, tokens=("hf_good",)):
        self.tokens, self.namespaces = set(tokens), {"org"}
        self.repos: dict[str, Repo] = {}
        """By "models/org/name" or "spaces/org/name"."""
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @staticmethod
    def empty_repo(private=False):
        repo = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return repo

    def repo(self, name, kind="models"):
        return self.repos[f"{kind}/{name}"]


class _RefusedError(Exception):
    def __init__(self, status, code=None, message=""):
        self.status, self.code, self.message = status, code, message


class _CutError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def serve(self):
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.route))
            fault = next(
                (f for f in self.hub.faults if f.times and f.method == self.command and re.search(f.path, self.route)),
                None,
            )
            if fault:
                fault.times -= 1
        try:
            if fault and not fault.done:
                if fault.status is None:
                    self.rfile.read(min(fault.after, int(self.headers.get("Content-Length", 0))))
                    raise _CutError
                self._body()
                return self._answer(fault.status, {"error": "injected"}, fault.headers)
            status, content, headers = self._dispatch()
            if fault:
                raise _CutError
            self._answer(status, content, headers)
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._answer(refused.status, {"error": refused.message}, {**headers, "X-Error-Message": refused.message})
        except _CutError:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status, content, headers):
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _dispatch(self):
        body = self._body()
        with self.hub.lock:
            for method, pattern, action in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, self.route)):
                    return action(self, body, **match.groupdict())
        raise _RefusedError(404, message=f"no route for {self.command} {self.route}")

    # who asks
    def _token(self):
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        return token

    def _writer(self, name):
        if self._token() is None:
            raise _RefusedError(401, message="Invalid username or password.")
        if name.split("/")[0] not in self.hub.namespaces:
            raise _RefusedError(403, message=f"You don't have the rights to write to {name}")

    def _found(self, kind, name):
        repo = self.hub.repos.get(f"{kind}/{name}")
        if repo is None or (repo.private and self._token() is None):
            raise _RefusedError(
                404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found"
            )
        return repo

    def _revision(self, repo, revision):
        if revision not in repo.revisions and revision not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo.revisions.get(revision, revision)

    # routes
    def whoami(self, _):
        if self._token() is None:
            raise _RefusedError(401, message="Invalid username or password.")
        return 200, {"type": "user", "name": "org", "orgs": []}, {}

    def create(self, body):
        asked = json.loads(body)
        name, kind = f"{asked.get('organization') or 'org'}/{asked['name']}", (asked.get("type") or "model") + "s"
        self._writer(name)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if f"{kind}/{name}" in self.hub.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self.hub.repos[f"{kind}/{name}"] = Hub.empty_repo(asked.get("visibility") == "private")
        return 200, {"url": url, "name": name}, {}

    def validate(self, body):
        try:
            metadata(json.loads(body)["content"])
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, body, kind, name, revision):
        repo = self._found(kind, name)
        self._writer(name)
        files = repo.files(self._revision(repo, revision))
        found = []
        for file in json.loads(body)["files"]:
            path, lfs = file["path"], is_lfs(file["path"], file["size"])
            content = files.get(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
            found.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return 200, {"files": found}, {}

    def batch(self, body, name):
        self._writer(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid = asked["oid"]
            upload = {"href": f"{self.hub.url}/lfs/{oid}"}
            verify = {"href": f"{self.hub.url}/lfs/{oid}/verify"}
            known = {} if oid in self.hub.lfs else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, **known})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, message="content does not have this SHA-256")
        self.hub.lfs[oid] = body
        return 200, {}, {}

    def verify(self, body, oid):
        if oid not in self.hub.lfs:
            raise _RefusedError(404, message="not uploaded")
        return 200, {}, {}

    def commit(self, body, kind, name, revision):
        repo = self._found(kind, name)
        self._writer(name)
        parent = self._revision(repo, revision)
        files, header = dict(repo.files(parent)), {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
                if value.get("parentCommit", parent) != parent:
                    raise _RefusedError(412, message="A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _RefusedError(400, message=f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise _RefusedError(400, message=f"unknown operation {item['key']}")
        branch, answer = revision, {}
        if self.query.get("create_pr"):
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.revisions)
            branch, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        oid = repo.commit(branch, files, header["summary"])
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, **answer}, {}

    def info(self, body, kind, name, revision="main"):
        repo = self._found(kind, name)
        commit = self._revision(repo, revision)
        siblings = [{"rfilename": path} for path in repo.files(commit)]
        known = {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        if card := metadata(repo.files(commit).get("README.md", b"").decode()):
            known |= {"cardData": card, **{key: card[key] for key in ("pipeline_tag", "library_name") if key in card}}
        return 200, known, {}

    def tree(self, body, kind, name, revision, folder=None):
        repo = self._found(kind, name)
        files = repo.files(self._revision(repo, revision))
        if folder:
            files = {path: content for path, content in files.items() if path.startswith(f"{folder}/")}
            if not files:
                raise _RefusedError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        found = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if is_lfs(path, len(content)):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            found.append(entry)
        return 200, found, {}

    def branch(self, body, kind, name, revision):
        repo = self._found(kind, name)
        self._writer(name)
        if revision in repo.revisions:
            raise _RefusedError(409, message="Reference already exists")
        repo.revisions[revision] = repo.revisions["main"]
        return 200, {}, {}

    def resolve(self, body, kind, name, revision, path):
        repo = self._found(kind or "models", name)
        commit = self._revision(repo, revision)
        content = repo.files(commit).get(path)
        headers = {"X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if content is None:
            return 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
        headers["ETag"] = f'"{git_oid(content)}"'
        if is_lfs(path, len(content)):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        if wanted := self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, content[start:], headers
        return 200, content, headers


for _method in ("GET", "HEAD", "POST", "PUT"):
    setattr(_Handler, f"do_{_method}", _Handler.serve)

_REPO = r"/api/(?P<kind>models|spaces)/(?P<name>[^/]+/[^/]+)"
_FILE = r"/(?:(?P<kind>spaces)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", _REPO + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", _REPO + r"/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", _REPO + r"/branch/(?P<revision>.+)", _Handler.branch),
    ("GET", _REPO, _Handler.info),
    ("GET", _REPO + r"/revision/(?P<revision>.+)", _Handler.info),
    ("GET", _REPO + r"/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", r"(?:/spaces)?/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.put),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", _Handler.verify),
    ("GET", _FILE, _Handler.resolve),
    ("HEAD", _FILE, _Handler.resolve),
]
