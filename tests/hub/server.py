"""A Hugging Face Hub on loopback, as far as the unmodified clients need one.

Standard library and PyYAML only. Users and tokens, private and gated repositories, commits, refs, pull requests, LFS
with signed addresses on a second origin, ranges, and faults on demand. Every request is logged before its answer is
sent.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from .handler import LFS_SUFFIXES, Entry, Fault, Handler
from .store import Store, git_oid


class LoopbackHub:
    """The server: `with LoopbackHub(folder) as hub: ...`; `hub.url` is the endpoint, `hub.log` what was asked."""

    def __init__(self, root: Path) -> None:
        self.store = Store(Path(root))
        self.tokens: dict[str, tuple[str, str]] = {}
        self.log: list[Entry] = []
        self.faults: list[Fault] = []
        self.secret = hashlib.sha256(str(root).encode()).digest()
        self.threads: list[threading.Thread] = []
        self.servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> LoopbackHub:
        for name in ("hub", "cdn"):
            handler = type("Handler", (Handler,), {"hub": self, "origin": name})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            self.servers.append(server)
            self.threads.append(thread)
        self.url = f"http://127.0.0.1:{self.servers[0].server_address[1]}"
        self.cdn = f"http://localhost:{self.servers[1].server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for thread in self.threads:
            thread.join()

    # What tests ask and arrange.

    def add_user(self, name: str, token: str, *, role: str = "write") -> str:
        self.tokens[token] = (name, role)
        return token

    @contextmanager
    def fault(self, method: str, path: str, **what: object) -> Iterator[Fault]:
        """Makes requests whose method and path (a regular expression, searched) match go wrong inside of the block."""
        fault = Fault(method, path, **what)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    @contextmanager
    def recorded(self) -> Iterator[list[Entry]]:
        """Gives the requests made inside of the block, once it has ended."""
        start, seen = len(self.log), []
        yield seen
        seen.extend(self.log[start:])

    def requests(self, method: str, path: str, *, log: list[Entry] | None = None) -> list[Entry]:
        return [e for e in (self.log if log is None else log) if e.method == method and re.search(path, e.path)]

    def files(self, repo_id: str, *, kind: str = "datasets", revision: str = "main") -> dict[str, bytes]:
        tree = self.store.tree(self.store.load(kind, repo_id), revision)
        return {path: self.store.object_path(entry["oid"]).read_bytes() for path, entry in tree.items()}

    def history(self, repo_id: str, *, kind: str = "datasets", revision: str = "main") -> list[str]:
        repo = self.store.load(kind, repo_id)
        oid, titles = self.store.resolve(repo, revision), []
        while oid:
            titles.append(repo["commits"][oid]["title"])
            oid = repo["commits"][oid]["parent"]
        return titles

    def put(self, repo_id: str, files: dict[str, bytes], *, kind: str = "datasets", revision: str = "main") -> str:
        """Commits files as somebody else would."""
        operations = []
        for path, content in files.items():
            lfs = path.endswith(LFS_SUFFIXES)
            oid = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
            self.store.put_object(oid, content)
            operations.append(("add", path, {"oid": oid, "size": len(content), **({"lfs": True} if lfs else {})}))
        return self.store.commit(kind, repo_id, revision, operations, title="by hand", user="somebody")[0]

    def sign(self, verb: str, kind: str, repo_id: str, oid: str) -> str:
        """An address on the other origin that works without a token."""
        path = f"{verb}/{kind}--{repo_id.replace('/', '--')}/{oid}"
        return f"{self.cdn}/{path}?signature={hmac.new(self.secret, path.encode(), 'sha256').hexdigest()}"
