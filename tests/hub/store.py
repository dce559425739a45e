"""Repositories on disk: content-addressed objects, commits and refs, one JSON file per repository."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path


class NotFound(Exception):
    """Raised with the Hub's error code: RepoNotFound, RevisionNotFound or EntryNotFound."""


class Conflict(Exception):
    """Raised with an HTTP status, 409 or 412, and a message."""


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Store:
    """All repositories of one Hub below a folder; every write is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        for name in ("objects", "repos"):
            (root / name).mkdir(parents=True, exist_ok=True)

    # Objects: LFS files by SHA-256, regular files by git's blob id.

    def object_path(self, oid: str) -> Path:
        assert oid.isalnum()
        return self.root / "objects" / oid

    def has_object(self, oid: str) -> bool:
        return self.object_path(oid).is_file()

    def put_object(self, oid: str, content: bytes) -> None:
        path = self.object_path(oid)
        part = path.with_name(f"{oid}.{threading.get_ident()}.part")
        part.write_bytes(content)
        part.replace(path)

    # LFS objects belong to a repository: what another one has must be sent again.

    def _lfs_mark(self, kind: str, repo_id: str, oid: str) -> Path:
        return self.root / "lfs" / f"{kind}--{repo_id.replace('/', '--')}" / oid

    def has_lfs(self, kind: str, repo_id: str, oid: str) -> bool:
        return self._lfs_mark(kind, repo_id, oid).exists()

    def put_lfs(self, kind: str, repo_id: str, oid: str, content: bytes) -> None:
        self.put_object(oid, content)
        mark = self._lfs_mark(kind, repo_id, oid)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    # Repositories.

    def _file(self, kind: str, repo_id: str) -> Path:
        return self.root / "repos" / f"{kind}--{repo_id.replace('/', '--')}.json"

    def load(self, kind: str, repo_id: str) -> dict:
        try:
            return json.loads(self._file(kind, repo_id).read_text())
        except FileNotFoundError:
            raise NotFound("RepoNotFound") from None

    def save(self, kind: str, repo_id: str, repo: dict) -> None:
        path = self._file(kind, repo_id)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(repo))
        part.replace(path)

    def create(self, kind: str, repo_id: str, *, private: bool, gated: bool = False) -> None:
        with self.lock:
            if self._file(kind, repo_id).exists():
                raise Conflict(409, "You already created this repo")
            repo = {"id": repo_id, "private": private, "gated": gated, "refs": {}, "commits": {}, "pulls": 0}
            self.save(kind, repo_id, repo)
            attributes = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"
            oid = git_oid(attributes)
            self.put_object(oid, attributes)
            tree = {".gitattributes": {"oid": oid, "size": len(attributes)}}
            self._add_commit(repo, "refs/heads/main", None, tree, "initial commit", "")
            self.save(kind, repo_id, repo)

    @staticmethod
    def _add_commit(repo: dict, ref: str, parent: str | None, tree: dict, title: str, user: str) -> str:
        number = len(repo["commits"])
        content = json.dumps([parent, tree, title, user, number, repo["id"]], sort_keys=True)
        oid = hashlib.sha1(content.encode()).hexdigest()
        date = f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}.000Z"
        repo["commits"][oid] = {"parent": parent, "tree": tree, "title": title, "user": user, "date": date}
        repo["refs"][ref] = oid
        return oid

    def resolve(self, repo: dict, revision: str) -> str:
        """The commit of a branch, tag, ref or commit id."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repo["refs"]:
                return repo["refs"][ref]
        if revision in repo["commits"]:
            return revision
        raise NotFound("RevisionNotFound")

    def tree(self, repo: dict, revision: str) -> dict[str, dict]:
        return repo["commits"][self.resolve(repo, revision)]["tree"]

    def add_ref(self, kind: str, repo_id: str, ref: str, start: str) -> None:
        with self.lock:
            repo = self.load(kind, repo_id)
            if ref in repo["refs"]:
                raise Conflict(409, f"Reference {ref} already exists")
            repo["refs"][ref] = self.resolve(repo, start)
            self.save(kind, repo_id, repo)

    def commit(
        self,
        kind: str,
        repo_id: str,
        revision: str,
        operations: list[tuple],
        *,
        title: str,
        user: str,
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[str, int | None]:
        """Applies `("add", path, entry)`, `("delete", path)`, `("delete_folder", path)` at once, or not at all."""
        with self.lock:
            repo = self.load(kind, repo_id)
            head = self.resolve(repo, revision)
            if parent is not None and parent != head and not pull_request:
                raise Conflict(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo["commits"][head]["tree"])
            for name, path, *rest in operations:
                if name == "add":
                    if not self.has_object(rest[0]["oid"]):
                        raise Conflict(400, f"The file {path} was never uploaded")
                    tree[path] = rest[0]
                elif name == "delete":
                    if path not in tree:
                        raise NotFound("EntryNotFound")
                    del tree[path]
                else:
                    tree = {p: e for p, e in tree.items() if not p.startswith(path.rstrip("/") + "/")}
            number = None
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if pull_request:
                number = repo["pulls"] = repo["pulls"] + 1
                ref = f"refs/pr/{number}"
            elif ref not in repo["refs"]:
                raise NotFound("RevisionNotFound")
            oid = self._add_commit(repo, ref, head, tree, title, user)
            self.save(kind, repo_id, repo)
            return oid, number
