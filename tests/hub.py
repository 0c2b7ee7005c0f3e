"""A stand-in for Hugging Face's hub on loopback: repositories from folders, with the answers that its library reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["Hub", "start_hub"]

API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<revision>[^/]+)")
FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Hub:
    """A running hub.

    Attributes:
        url: Its address.
        repositories: Name of each repository -> revision -> folder.
        gated: Names of repositories that ask for a token.
        downloaded: Names of the files that were downloaded.
        tokens: Tokens that requests had.
    """

    url: str = ""
    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    downloaded: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def find(self, repository: str, revision: str) -> tuple[Path | None, str]:
        """Returns the folder of a branch or commit, and the code of the error if there is none."""
        revisions = self.repositories.get(repository)
        if revisions is None:
            return None, "RepoNotFound"
        found = {commit(name): folder for name, folder in revisions.items()} | revisions
        return found.get(revision), "RevisionNotFound"


def commit(revision: str) -> str:
    """Returns the commit of a branch."""
    return hashlib.sha1(revision.encode()).hexdigest()


class Server(ThreadingHTTPServer):
    """The server of a hub."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server.hub
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None:
            return self.answer(404)
        hub.tokens.add(self.headers.get("Authorization", ""))
        revision = match["revision"]
        folder, code = hub.find(match["repository"], revision)
        if match["repository"] in hub.gated and "Authorization" not in self.headers:
            return self.answer(403, error="GatedRepo")
        if folder is None:
            return self.answer(404, error=code)
        sha = revision if len(revision) == 40 else commit(revision)
        if match.re is FILE:
            return self.answer_file(folder / match["name"], match["name"], sha)
        return self.answer_listing(folder, match, sha)

    def answer_listing(self, folder: Path, match: re.Match[str], sha: str) -> None:
        names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        tree = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
            for name, path in names.items()
        ]
        info = {"id": match["repository"], "sha": sha, "siblings": [{"rfilename": name} for name in names]}
        self.answer(200, json.dumps(info if match["kind"] == "revision" else tree).encode())

    def answer_file(self, path: Path, name: str, sha: str) -> None:
        if not path.is_file():
            return self.answer(404, error="EntryNotFound")
        if self.command == "GET":
            self.server.hub.downloaded.append(name)
        return self.answer(200, path.read_bytes(), {"ETag": f'"{etag(path)}"', "X-Repo-Commit": sha})

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, error: str = "") -> None:
        self.send_response(status)
        told = {"X-Error-Code": error} if error else {}
        for key, value in {"Content-Length": str(len(body)), **told, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextlib.contextmanager
def start_hub() -> Iterator[Hub]:
    """Runs a hub for the time of a block."""
    server = Server(Hub())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(path: Path) -> str:
    """Returns the name of a file's content."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
