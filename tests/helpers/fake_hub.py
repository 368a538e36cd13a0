"""The Hub, imitated by a real local server: the few endpoints that ke_ray uses."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FakeHub(http.server.ThreadingHTTPServer):
    """``<root>/<org>/<repo>/<revision>/`` behind the few endpoints that ke_ray uses.

    Revisions are branches, or tags where ``tags`` names them. Those in ``commits`` of a repository,
    as (revision, title) with the newest last, are commits of ``main`` and neither.
    Files in ``sizes`` are listed with that size, and as other weights in each revision, whatever
    they hold. ``base`` is the URL that clients know the server by.
    """

    daemon_threads = True

    def __init__(self, root: Path, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.root = root
        self.base = self.url
        self.tags: set[str] = set()
        # What it says its weight files have, by path in the repository or by repository.
        self.sizes: dict[str, int] = {}
        self.commits: dict[str, list[tuple[str, str]]] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.refuse: list[tuple[str, int, dict[str, str]]] = []
        self.lock = threading.Lock()

    def weights(self, repo: str, commit: str, name: str, data: bytes) -> tuple[int, str]:
        """Size and sha256 that a weight file is listed with."""
        size = self.sizes.get(name, self.sizes.get(repo, len(data)))
        content = f"{commit}/{name}".encode() if name in self.sizes else data
        return size, hashlib.sha256(content).hexdigest()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def folder(self, repo: str, commit: str) -> Path | None:
        base = self.root / repo
        for revision in base.iterdir() if base.is_dir() else ():
            if commit in (revision.name, self.commit(repo, revision.name)):
                return revision
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def answer(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            self.server.tokens.append(self.headers.get("Authorization"))
            refusals = [item for item in self.server.refuse if item[0] in path]
            if refusals:
                self.server.refuse.remove(refusals[0])
        if refusals:
            _, status, headers = refusals[0]
            self.send(status, b"{}", **headers)
        elif path.startswith("api/models/") and path.endswith("/refs"):
            self.refs(path.removeprefix("api/models/").removesuffix("/refs"))
        elif path.startswith("api/models/") and "/tree/" in path:
            self.tree(*path.removeprefix("api/models/").split("/tree/"))
        elif path.startswith("api/models/") and "/commits/" in path:
            self.commits(*path.removeprefix("api/models/").split("/commits/"))
        elif path == "api/models":
            self.repositories()
        elif "/resolve/" in path:
            repo, rest = path.split("/resolve/")
            self.file(repo, *rest.split("/", 1))
        else:
            self.send(404)

    def refs(self, repo: str) -> None:
        base = self.server.root / repo
        if not base.is_dir():
            self.send(404, X_Error_Code="RepoNotFound")
            return
        hidden = {revision for revision, _ in self.server.commits.get(repo, [])}
        refs = [
            {"name": entry.name, "ref": "", "targetCommit": self.server.commit(repo, entry.name)}
            for entry in sorted(base.iterdir(), reverse=True)
            if entry.name not in hidden
        ]
        tags = [ref for ref in refs if ref["name"] in self.server.tags]
        branches = [ref for ref in refs if ref["name"] not in self.server.tags]
        answer = {"branches": branches, "tags": tags, "converts": []}
        self.send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def commits(self, repo: str, branch: str) -> None:
        entries = [
            {"id": self.server.commit(repo, revision), "title": title, "message": "", "authors": []}
            for revision, title in reversed(self.server.commits.get(repo, []))
        ]
        self.pages(entries)

    def repositories(self) -> None:
        query = urllib.parse.parse_qs(self.path.partition("?")[2])
        (owner,) = query["author"]
        folder = self.server.root / owner
        repos = [f"{owner}/{e.name}" for e in folder.iterdir()] if folder.is_dir() else []
        self.pages([{"id": repo, "sha": self.server.commit(repo, "main")} for repo in repos])

    def tree(self, repo: str, rest: str) -> None:
        commit, _, subfolder = rest.partition("/")
        folder = self.server.folder(repo, commit)
        if folder is None or not (folder / subfolder).is_dir():
            self.send(404, X_Error_Code="RevisionNotFound" if folder is None else "EntryNotFound")
            return
        recursive = "recursive=true" in self.path
        entries = []
        for file in sorted((folder / subfolder).glob("**/*" if recursive else "*")):
            name = file.relative_to(folder).as_posix()
            if file.is_dir():
                entries.append({"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
                continue
            data = file.read_bytes()
            is_weights = file.suffix in (".safetensors", ".bin")
            entry = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            if is_weights:
                size, digest = self.server.weights(repo, commit, name, data)
                entry |= {"size": size}
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            entries.append(entry)
        self.pages(entries)

    def pages(self, entries: list[dict[str, Any]]) -> None:
        """Two pages, as for a large repository."""
        second = "cursor=2" in self.path
        page = entries[1:] if second else entries[:1]
        mark = "&" if "?" in self.path else "?"
        link = f'<{self.server.base}{self.path}{mark}cursor=2>; rel="next"'
        headers = {} if second else {"Link": link}
        self.send(200, json.dumps(page).encode(), **headers)

    def file(self, repo: str, commit: str, name: str) -> None:
        folder = self.server.folder(repo, commit)
        if folder is None or not (folder / name).is_file():
            self.send(404, X_Error_Code="EntryNotFound")
            return
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self.send(200, data, ETag=f'"{digest}"', X_Repo_Commit=commit)


@contextmanager
def serving(root: Path) -> Iterator[FakeHub]:
    server = FakeHub(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
