"""A Hub of our own over real HTTP, for the unmodified huggingface_hub client: repositories, commits, LFS, faults.

Speaks what the client asks for when a repository is made, pushed to and loaded from: whoami, create, refs, branches,
tags, preupload, LFS batch, upload and verify, commit (ndjson), pull requests, tree, resolve with ETag and ranges, CDN
of large files. Everything is kept in memory. LFS is spoken by clients with HF_HUB_DISABLE_XET=1 only.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: "Commit | None"
    title: str
    description: str
    files: dict[str, Blob]


@dataclass
class Repository:
    kind: str
    name: str
    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)  # refs/heads/x, refs/tags/x, refs/pr/1

    def find(self, revision: str) -> Commit | None:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        every = [commit for head in self.refs.values() for commit in history(head)]
        return next((commit for commit in every if commit.oid == revision), None)

    @property
    def commits(self) -> list[Commit]:
        """All commits of the main branch, the newest first; the last is the one that made the repository."""
        return history(self.refs["refs/heads/main"])


def history(commit: Commit | None) -> list[Commit]:
    found = []
    while commit is not None:
        found.append(commit)
        commit = commit.parent
    return found


@dataclass
class Fault:
    """What goes wrong at a step of a repository, `times` times (None: always).

    `status` is answered instead of doing it; `cut_after` bytes the connection is cut; `silent` does it and never
    answers; with `race` somebody else commits first.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    silent: bool = False
    race: bool = False
    times: int | None = None


class HubServer:
    """The server's state. `tokens` maps a token to (user, whether it may write)."""

    def __init__(self) -> None:
        self.tokens = {"hf_ada": ("ada", True), "hf_reader": ("bob", False)}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[tuple[str, str], bytes] = {}  # by repository and sha256
        self.faults: dict[tuple[str, str], list[Fault]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.cdn = self.endpoint.replace("127.0.0.1", "localhost")  # another host, as the client expects of a CDN

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def fail(self, name: str, step: str, **fault) -> None:
        """Let a step of a repository go wrong: create, info, preupload, batch, upload, commit, tag, resolve, cdn."""
        self.faults.setdefault((name, step), []).append(Fault(**fault))

    def take_fault(self, name: str, step: str) -> Fault | None:
        """The first fault of this step that is not used up."""
        with self.lock:
            for fault in self.faults.get((name, step), []):
                if fault.times is None:
                    return fault
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def create(self, kind: str, name: str, private: bool = False) -> Repository:
        repository = self.repositories[kind, name] = Repository(kind, name, private)
        self.commit(
            repository, "refs/heads/main", "initial commit", "", {".gitattributes": Blob(b"*.bin lfs\n", False)}
        )
        return repository

    def commit(self, repository: Repository, ref: str, title: str, description: str, files: dict[str, Blob]) -> Commit:
        parent = repository.refs.get(ref)
        content = json.dumps([title, parent and parent.oid, sorted((path, b.oid) for path, b in files.items())])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, description, files)
        repository.refs[ref] = commit
        return commit


@contextmanager
def hub_server():
    """A running [`HubServer`]."""
    server = HubServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


class Answer(Exception):
    """Ends the handling of a request with an answer."""

    def __init__(self, status: int, body: object = None, **headers: str):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_any(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.hub.requests.append((self.command, url.path, {k.lower(): v for k, v in self.headers.items()}))
        self.body = None
        try:
            self.route(parts)
            raise Answer(404, {"error": "Not found"}, X_Error_Message="Not found")
        except Answer as answer:
            if self.body is None:
                self.read_body()
            self.send(answer.status, answer.body, answer.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    # -- reading and answering

    def read_body(self, at_most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
                if at_most is not None and len(data) >= at_most:
                    return data
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length if at_most is None else min(length, at_most))
        self.body = data
        return data

    def json_body(self) -> dict:
        return json.loads(self.read_body() or b"{}")

    def send(self, status: int, body: object, headers: dict[str, str], cut_after: int | None = None) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        names = {name.lower() for name in headers}
        if "content-type" not in names:
            self.send_header(
                "Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json"
            )
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut_after is None else data[:cut_after])
        if cut_after is not None:
            self.cut()

    def cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        raise ConnectionAbortedError

    def trip(self, name: str, step: str) -> Fault | None:
        """Do what a fault says before a step; a fault that concerns the body or the answer is returned."""
        fault = self.hub.take_fault(name, step)
        if fault is None or (fault.status is None):
            return fault
        messages = {401: "Invalid credentials in Authorization header", 403: "Forbidden: pass a write token"}
        raise Answer(
            fault.status,
            {"error": messages.get(fault.status, "fault")},
            **{"X-Error-Message": messages.get(fault.status, "fault"), **fault.headers},
        )

    # -- who asks, and for what

    def user(self, write: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if not token:
            if write:
                message = "Invalid username or password."
                raise Answer(401, {"error": message}, X_Error_Message=message)
            return None
        if token not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, X_Error_Message=message)
        name, may_write = self.hub.tokens[token]
        if write and not may_write:
            raise Answer(403, {"error": "no write access"}, X_Error_Message="You don't have the rights to write")
        return name

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        user = self.user(write)
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and user != name.split("/")[0]):
            raise Answer(404 if user else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound",
                         X_Error_Message="Repository not found")  # fmt: skip
        return found

    @staticmethod
    def revision(repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound",
                         X_Error_Message=f"Invalid rev id: {revision}")  # fmt: skip
        return commit

    # -- the routes

    def route(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "whoami-v2"]:
            user = self.user(write=False)
            if user is None:
                raise Answer(401, {"error": "no token"}, X_Error_Message="Invalid credentials in Authorization header")
            raise Answer(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})
        if parts == ["api", "validate-yaml"]:
            raise Answer(200, {"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            self.create()
        if parts[0] == "api" and parts[1] in ("models", "spaces", "datasets") and len(parts) >= 4:
            self.api(parts[1][:-1], "/".join(parts[2:4]), parts[4:])
        if parts[0] == "lfs":
            self.large_file(parts[1], "/".join(parts[2:4]), parts[4])
        kind = "model"
        if parts[0] in ("spaces", "datasets"):
            kind, parts = parts[0][:-1], parts[1:]
        if parts[2:5] == ["info", "lfs", "objects"]:
            self.batch(kind, "/".join(parts[:2]).removesuffix(".git"))
        if len(parts) > 4 and parts[2] == "resolve":
            self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def create(self) -> None:
        asked = self.json_body()
        user = self.user(write=True)
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or user}/{asked['name']}"
        self.trip(name, "create")
        if not name.startswith(f"{user}/"):
            raise Answer(403, {"error": "no"}, X_Error_Message=f"You don't have the rights to create in {name}")
        prefix = "" if kind == "model" else f"{kind}s/"
        url = {"url": f"{self.hub.endpoint}/{prefix}{name}", "name": name}
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                raise Answer(409, {"error": "You already created this model repo", **url})
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.create(kind, name, private)
        raise Answer(200, url)

    def api(self, kind: str, name: str, rest: list[str]) -> None:
        action = rest[0] if rest else "revision"
        if self.command == "GET":
            repository = self.repository(kind, name)
            if action == "revision":
                self.trip(name, "info")
                commit = self.revision(repository, rest[1] if rest else "main")
                files = [{"rfilename": path} for path in sorted(commit.files)]
                known = {"_id": "1", "id": name, "modelId": name, "private": repository.private}
                raise Answer(200, {**known, "sha": commit.oid, "siblings": files})
            if action == "refs":
                raise Answer(200, {
                    "branches": self.listed(repository, "refs/heads/"), "tags": self.listed(repository, "refs/tags/"),
                    "converts": [], "pullRequests": self.listed(repository, "refs/pr/"),
                })  # fmt: skip
            if action == "commits":
                raise Answer(200, [
                    {"id": c.oid, "title": c.title, "message": c.description, "authors": [{"user": "ada"}],
                     "date": "2026-01-01T00:00:00.000Z"}
                    for c in history(self.revision(repository, rest[1]))
                ])  # fmt: skip
            if action == "tree":
                self.tree(self.revision(repository, rest[1]), "/".join(rest[2:]))
        if self.command == "POST":
            if action == "preupload":
                self.preupload(kind, name, rest[1])
            if action == "commit":
                self.commit(kind, name, rest[1])
            if action == "paths-info":
                commit = self.revision(self.repository(kind, name), rest[1])
                paths = [path for path in self.json_body()["paths"] if path in commit.files]
                raise Answer(200, [entry(path, commit.files[path]) for path in paths])
            if action in ("branch", "tag"):
                repository = self.repository(kind, name, write=True)
                self.trip(name, action)
                asked = self.json_body()
                if action == "tag":
                    ref, start = f"refs/tags/{asked['tag']}", rest[1]
                else:
                    ref, start = f"refs/heads/{rest[1]}", asked.get("startingPoint", "main")
                if ref in repository.refs:
                    raise Answer(409, {"error": "Reference already exists"})
                repository.refs[ref] = self.revision(repository, start)
                raise Answer(200, {})

    @staticmethod
    def listed(repository: Repository, prefix: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit.oid}
            for ref, commit in repository.refs.items()
            if ref.startswith(prefix)
        ]

    def tree(self, commit: Commit, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound", X_Error_Message="not found")
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        entries, folders = [], set()
        for path, blob in sorted(below.items()):
            first, *deeper = path.removeprefix(prefix).split("/")
            if deeper and not recursive:
                folders.add(prefix + first)
            else:
                entries.append(entry(path, blob))
        raise Answer(
            200, [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)] + entries
        )

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write="create_pr" not in self.query)
        self.trip(name, "preupload")
        files = self.revision(repository, revision).files
        answer = []
        for asked in self.json_body()["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000 else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": answer})

    def batch(self, kind: str, name: str) -> None:
        self.repository(kind, name, write=True)
        self.trip(name, "batch")
        objects = []
        for asked in self.json_body()["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if (name, asked["oid"]) not in self.hub.blobs:
                href = f"{self.hub.endpoint}/lfs/{{}}/{name}/{asked['oid']}"
                one["actions"] = {"upload": {"href": href.format("upload")}, "verify": {"href": href.format("verify")}}
            objects.append(one)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def large_file(self, action: str, name: str, oid: str) -> None:
        if action == "upload":
            fault = self.trip(name, "upload")
            if fault is not None and fault.cut_after is not None:
                self.read_body(at_most=fault.cut_after)
                self.cut()
            data = self.read_body()
            if hashlib.sha256(data).hexdigest() != oid:
                raise Answer(400, {"error": "the content is not what was announced"})
            self.hub.blobs[name, oid] = data
            raise Answer(200)
        if action == "verify":
            size = self.json_body()["size"]
            raise Answer(200 if len(self.hub.blobs.get((name, oid), b"")) == size else 404)
        if action == "cdn":
            self.content(name, "cdn", self.hub.blobs[name, oid], {"ETag": f'"{oid}"'})

    def commit(self, kind: str, name: str, revision: str) -> None:
        create_pr = "create_pr" in self.query
        repository = self.repository(kind, name, write=not create_pr)
        fault = self.trip(name, "commit")
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        header = lines[0]["value"]
        with self.hub.lock:
            head = self.revision(repository, revision)
            if fault is not None and fault.race:
                theirs = {**head.files, "theirs.md": Blob(b"first", False)}
                head = self.hub.commit(repository, f"refs/heads/{revision}", "theirs", "", theirs)
            if not create_pr and header.get("parentCommit") not in (None, head.oid):
                raise Answer(412, {"error": "the branch was changed"}, X_Error_Message="A commit has happened since")
            files = dict(head.files)
            for line in lines[1:]:
                path = line["value"]["path"]
                if line["key"] == "file":
                    files[path] = Blob(base64.b64decode(line["value"]["content"]), False)
                elif line["key"] == "lfsFile":
                    if (name, line["value"]["oid"]) not in self.hub.blobs:
                        raise Answer(400, {"error": "LFS object was not uploaded"})
                    files[path] = Blob(self.hub.blobs[name, line["value"]["oid"]], True)
                elif line["key"] == "deletedFile":
                    del files[path]
            ref = f"refs/heads/{revision}" if f"refs/heads/{revision}" in repository.refs else revision
            if create_pr:
                number = 1 + sum(known.startswith("refs/pr/") for known in repository.refs)
                ref = f"refs/pr/{number}"
                repository.refs[ref] = head
            made = self.hub.commit(repository, ref, header["summary"], header.get("description", ""), files)
        if fault is not None and fault.silent:
            self.cut()
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.endpoint}/{prefix}{name}"
        discussion = f"{url}/discussions/{ref.removeprefix('refs/pr/')}" if create_pr else None
        raise Answer(200, {"success": True, "commitUrl": f"{url}/commit/{made.oid}", "commitOid": made.oid,
                           "pullRequestUrl": discussion})  # fmt: skip

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self.repository(kind, name)
        self.trip(name, "resolve")
        commit = self.revision(repository, revision)
        if path not in commit.files:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound",
                         X_Error_Message="Entry not found", X_Repo_Commit=commit.oid)  # fmt: skip
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            self.content(name, "resolve_body", blob.data, headers)
        self.hub.blobs[name, blob.oid] = blob.data
        headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-ETag": f'"{blob.oid}"'}
        raise Answer(302, None, Location=f"{self.hub.cdn}/lfs/cdn/{name}/{blob.oid}", **headers)

    def content(self, name: str, step: str, data: bytes, headers: dict[str, str]) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            raise Answer(200, None, Content_Length=str(len(data)), **headers)
        fault = self.trip(name, step)
        status, part = 200, data
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(end) + 1 if end else None]
            status = 206
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        if fault is not None and fault.cut_after is not None:
            self.send(status, part, headers, cut_after=fault.cut_after)
        raise Answer(status, part, **headers)


def entry(path: str, blob: Blob) -> dict:
    """A file as the tree lists it."""
    found = {"type": "file", "path": path, "oid": blob.oid[:40], "size": len(blob.data)}
    if blob.lfs:
        found["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
    return found
