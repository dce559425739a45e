"""One request to the Hub: what each route must answer for the unmodified clients to work."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from .cards import validate_card
from .store import Conflict, NotFound, git_oid


if TYPE_CHECKING:
    from .server import LoopbackHub


LFS_SUFFIXES = (".parquet", ".safetensors", ".arrow", ".bin", ".pt", ".pkl", ".ckpt", ".png", ".jpg")
WRITES = {"preupload", "commit", "lfs_batch", "add_ref"}


@dataclass
class Entry:
    """One request, as the server saw it."""

    method: str
    path: str
    status: int
    user: str | None
    authorized: bool
    received: int
    sent: int = 0
    origin: str = "hub"
    range: str | None = None


@dataclass
class Fault:
    """What to do to the next `times` requests that match: call something, wait, answer `status`, cut or reset."""

    method: str
    path: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "fault on demand"
    cut_after: int | None = None  # bytes of the answer's (or of the upload's) body before the connection is closed
    reset: bool = False
    delay: float = 0.0
    call: Callable[[], None] | None = None
    seen: int = 0


class Answer(Exception):
    """Ends a request with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    origin: str
    protocol_version = "HTTP/1.1"
    KIND = r"(?P<kind>models|datasets)"
    REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", rf"/api/{KIND}/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", rf"/api/{KIND}/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/{KIND}/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", rf"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "list_tree"),
        ("POST", rf"/api/{KIND}/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"/api/{KIND}/{REPO}/refs", "refs"),
        ("GET", rf"/api/{KIND}/{REPO}/commits/(?P<revision>[^/]+)", "commits"),
        ("POST", rf"/api/{KIND}/{REPO}/(?P<what>branch|tag)/(?P<revision>[^/]+)", "add_ref"),
        ("POST", rf"/((?P<kind>datasets)/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("GET", rf"/((?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    ]  # fmt: skip

    def log_message(self, *_: object) -> None:
        pass

    # One request.

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.url_path, self.query = url.path, parse_qs(url.query)
        self.replied = False
        self.received, self.user, self.role = 0, None, None
        fault = self._fault()
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.call:
            fault.call()
        if fault and self.command == "PUT" and (fault.cut_after is not None or fault.reset):
            self.received = len(self.rfile.read(fault.cut_after or 0))
            return self._drop(fault)
        self.body = self._read_body()
        self.cut = fault if fault and (fault.cut_after is not None or fault.reset) else None
        try:
            if fault and fault.status:
                raise Answer(fault.status, fault.message, **fault.headers)
            self._authenticate()
            if self.origin == "cdn":
                self._content_delivery()
            else:
                self._dispatch()
        except Answer as answer:
            self._json({"error": answer.message}, answer.status, **answer.headers)
        except NotFound as error:
            self._not_found(str(error))
        except Conflict as error:
            status, message = error.args
            self._json({"error": message}, status, **{"X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _fault(self) -> Fault | None:
        for fault in self.hub.faults:
            if self.command == fault.method and re.search(fault.path, self.path):
                fault.seen += 1
                if fault.skip < fault.seen <= fault.skip + fault.times:
                    return fault
        return None

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(pieces)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.received = len(body)
        return body

    def _authenticate(self) -> None:
        header = self.headers.get("Authorization")
        if header is None:
            return
        known = self.hub.tokens.get(header.removeprefix("Bearer "))
        if known is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        self.user, self.role = known

    def _dispatch(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            if verb == method and (match := re.fullmatch(pattern, self.url_path)):
                values = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                values.setdefault("kind", "models")
                if "repo" in values:
                    self._check_access(
                        values["kind"], values["repo"], write=name in WRITES, content=name == "download"
                    )
                else:
                    del values["kind"]
                return getattr(self, name)(**values)
        raise Answer(404, f"No such route: {self.command} {self.url_path}")

    def _check_access(self, kind: str, repo_id: str, *, write: bool, content: bool) -> None:
        try:
            repo = self.hub.store.load(kind, repo_id)
        except NotFound:
            repo = None
        owner = self.user is not None and self.user == repo_id.split("/")[0]
        if repo is None or (repo["private"] and not owner):
            # To a stranger a private repository does not exist, and anonymous ones are told to log in for either.
            raise Answer(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if repo["gated"] and content and not owner:
            raise Answer(403 if self.user else 401, "Access to this repository is restricted", "GatedRepo")
        if write and self.user is None:
            raise Answer(401, "Authentication required")
        if write and not self._may_write(repo_id):
            raise Answer(403, "You don't have the rights to write to this repository")

    def _may_write(self, repo_id: str) -> bool:
        if "create_pr" in self.query or self.url_path.endswith("/info/lfs/objects/batch"):
            return self.role == "write"  # anybody may propose a change
        return self.user == repo_id.split("/")[0] and self.role == "write"

    # Answers.

    def _log(self, status: int, sent: int) -> None:
        header = self.headers.get("Authorization")
        self.hub.log.append(
            Entry(
                self.command, self.path, status, self.user, header is not None, self.received, sent, self.origin,
                self.headers.get("Range"),
            )
        )  # fmt: skip

    def _drop(self, fault: Fault) -> None:
        self._log(0, 0)
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if self.cut and self.cut.reset and self.cut.cut_after is None:
            return self._drop(self.cut)
        body = b"" if self.command == "HEAD" else content
        if self.cut:
            body = body[: self.cut.cut_after]
        self._log(status, len(body))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if self.cut:
            self.wfile.flush()
            if self.cut.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _not_found(self, code: str, **headers: str) -> None:
        message = {"RevisionNotFound": "Invalid rev id", "EntryNotFound": "Entry not found"}.get(
            code, "Repository not found"
        )
        self._json({"error": message}, 404, **{"X-Error-Code": code, "X-Error-Message": message, **headers})

    # Routes: users and repositories.

    def whoami(self) -> None:
        if self.user is None:
            raise Answer(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.role}
        self._json({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        kind = f"{wanted.get('type') or 'model'}s"
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if self.user is None:
            raise Answer(401, "Authentication required")
        if not self._may_write(repo_id):
            raise Answer(
                403, f"You don't have the rights to create a {kind[:-1]} under the namespace {repo_id.split('/')[0]!r}"
            )
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        try:
            self.hub.store.create(kind, repo_id, private=private)
        except Conflict as error:
            return self._json({"error": error.args[1], "url": url}, 409)
        self._json({"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        wanted = json.loads(self.body)
        errors = validate_card(wanted["content"], wanted.get("repoType", "model"))
        self._json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        data = self.hub.store.load(kind, repo)
        sha = self.hub.store.resolve(data, revision)
        commit = data["commits"][sha]
        answer = {
            "id": repo,
            "sha": sha,
            "private": data["private"],
            "gated": data["gated"],
            "tags": [],
            "downloads": 0,
        }
        answer |= {"lastModified": commit["date"], "createdAt": "2026-01-01T00:00:00.000Z", "likes": 0}
        self._json(answer | {"siblings": [{"rfilename": path} for path in sorted(commit["tree"])]})

    def refs(self, kind: str, repo: str) -> None:
        found: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in self.hub.store.load(kind, repo)["refs"].items():
            group = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
            found[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid})
        self._json(found)

    def commits(self, kind: str, repo: str, revision: str) -> None:
        data = self.hub.store.load(kind, repo)
        oid, found = self.hub.store.resolve(data, revision), []
        while oid:
            commit = data["commits"][oid]
            author = [{"user": commit["user"]}]
            found.append(
                {"id": oid, "title": commit["title"], "message": "", "date": commit["date"], "authors": author}
            )
            oid = commit["parent"]
        self._json(found)

    def add_ref(self, kind: str, repo: str, what: str, revision: str) -> None:
        wanted = json.loads(self.body or b"{}")
        if what == "tag":
            self.hub.store.add_ref(kind, repo, f"refs/tags/{wanted['tag']}", revision)
        else:
            self.hub.store.add_ref(kind, repo, f"refs/heads/{revision}", wanted.get("startingPoint") or "main")
        self._json({})

    # Routes: files.

    @staticmethod
    def _entry(path: str, entry: dict) -> dict:
        described = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
        if entry.get("lfs"):
            described["oid"] = git_oid(entry["oid"].encode())
            described["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 130}
        return described

    def list_tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        tree = self.hub.store.tree(self.hub.store.load(kind, repo), revision)
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = {name: entry for name, entry in tree.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise NotFound("EntryNotFound")
        folders = set()
        for name in inside:
            parts = name.removeprefix(prefix).split("/")[:-1]
            folders |= {
                prefix + "/".join(parts[: i + 1]) for i in range(len(parts) if recursive else min(1, len(parts)))
            }
        found = [{"type": "directory", "path": f, "oid": git_oid(f.encode()), "size": 0} for f in sorted(folders)]
        found += [
            self._entry(n, e) for n, e in sorted(inside.items()) if recursive or "/" not in n.removeprefix(prefix)
        ]
        self._json(found)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        tree = self.hub.store.tree(self.hub.store.load(kind, repo), revision)
        self._json([self._entry(path, tree[path]) for path in paths if path in tree])

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        tree = self.hub.store.tree(self.hub.store.load(kind, repo), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > 10 * 2**20
            mode = "lfs" if binary or file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = tree.get(file["path"], {}).get("oid")
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, kind: str, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {**wanted, "authenticated": True}
            if not self.hub.store.has_lfs(kind, repo, wanted["oid"]):
                answer["actions"] = {"upload": {"href": self.hub.sign("up", kind, repo, wanted["oid"])}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header, operations = {}, []
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                self.hub.store.put_object(git_oid(content), content)
                operations.append(("add", value["path"], {"oid": git_oid(content), "size": len(content)}))
            elif key == "lfsFile":
                if not self.hub.store.has_lfs(kind, repo, value["oid"]):
                    raise Answer(400, f"{value['path']} points to an object that was not uploaded")
                size = self.hub.store.object_path(value["oid"]).stat().st_size
                operations.append(("add", value["path"], {"oid": value["oid"], "size": size, "lfs": True}))
            else:
                operations.append(("delete" if key == "deletedFile" else "delete_folder", value["path"]))
        pull_request = "create_pr" in self.query
        oid, number = self.hub.store.commit(
            kind,
            repo,
            revision,
            operations,
            title=header["summary"],
            user=self.user,
            parent=header.get("parentCommit"),
            pull_request=pull_request,
        )
        base = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo}"
        pull = {"pullRequestUrl": f"{base}/discussions/{number}"} if pull_request else {}
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{base}/commit/{oid}", "hookOutput": "", **pull})

    def download(self, kind: str, repo: str, revision: str, path: str) -> None:
        data = self.hub.store.load(kind, repo)
        sha = self.hub.store.resolve(data, revision)
        entry = data["commits"][sha]["tree"].get(path)
        if entry is None:
            return self._not_found("EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if entry.get("lfs"):
            headers |= {"X-Linked-ETag": f'"{entry["oid"]}"', "X-Linked-Size": str(entry["size"])}
            return self._send(302, b"", {**headers, "Location": self.hub.sign("down", kind, repo, entry["oid"])})
        self._ranged(self.hub.store.object_path(entry["oid"]).read_bytes(), headers)

    def _ranged(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self._send(200, content, headers)
        if match[1]:
            first, last = int(match[1]), int(match[2] or len(content) - 1)
        else:
            first, last = max(0, len(content) - int(match[2])), len(content) - 1
        if first >= len(content):
            return self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
        last = min(last, len(content) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], {**headers, **span})

    def _content_delivery(self) -> None:
        match = re.fullmatch(r"/(up|down)/(models|datasets)--([\w.-]+?)--([\w.-]+)/(\w+)", self.url_path)
        if match is None:
            raise Answer(404, "No such object")
        verb, kind, owner, name, oid = match.groups()
        if self.hub.sign(verb, kind, f"{owner}/{name}", oid) != f"{self.hub.cdn}{self.path}":
            raise Answer(403, "The signature does not match")
        if verb == "up" and self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Answer(400, "The content is not what was announced")
            self.hub.store.put_lfs(kind, f"{owner}/{name}", oid, self.body)
            return self._send(200, b"", {})
        if verb == "down" and self.command in ("GET", "HEAD"):
            return self._ranged(
                self.hub.store.object_path(oid).read_bytes(), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
            )
        raise Answer(405, "Method not allowed")
