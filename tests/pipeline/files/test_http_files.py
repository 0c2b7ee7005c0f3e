"""Files behind http://: an input is read there, and no secret goes along when the server sends us elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest
from fsspec.config import conf

from millrace.engine.storage import remote
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.sources.source import Source

ROWS = b'{"id": 1}\n{"id": 2}\n'
SECRETS = ("s3cr3t", "Authorization", "X-Api-Key", "Cookie", "dXNlcjpzM2NyM3Q")


@dataclass
class FileServer:
    """A server of one file, or of redirects to another address.

    Attributes:
        target: Address of the redirects; empty to answer with the file.
        seen: The requests so far, with their headers, as text.
        url: Address of the server.
    """

    target: str = ""
    seen: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FileServer, FileServer]]:
    """Two servers of different origins; headers with keys are configured for all requests."""
    headers = {"X-Api-Key": "s3cr3t", "Cookie": "a=s3cr3t"}
    monkeypatch.setitem(conf, "http", {"client_kwargs": {"headers": headers}})
    remote._filesystem.cache_clear()
    here, there = FileServer(), FileServer()
    running = [_start(one) for one in (here, there)]
    yield here, there
    for one in running:
        one.shutdown()
        one.server_close()
    remote._filesystem.cache_clear()


def _start(server: FileServer) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.seen.append(f"{self.path}\n{self.headers}")
            is_sent_on = bool(server.target) and not self.path.startswith("/moved")
            self.send_response(302 if is_sent_on else 200)
            if is_sent_on:
                self.send_header("Location", server.target)
            self.send_header("Content-Length", "0" if is_sent_on else str(len(ROWS)))
            self.end_headers()
            if not is_sent_on and self.command == "GET":
                self.wfile.write(ROWS)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


def test_another_origin_gets_no_secret_of_the_url_or_the_settings(servers: tuple[FileServer, FileServer]) -> None:
    here, there = servers
    here.target = f"{there.url}/moved.jsonl"
    file = Storage.at(here.url.replace("://", "://user:s3cr3t@") + "/in.jsonl?token=s3cr3t")
    assert file.read_bytes() == ROWS
    assert file.size() == len(ROWS)
    assert all("s3cr3t" in one for one in here.seen)  # The origin itself gets them.
    assert there.seen
    assert not [(secret, one) for one in there.seen for secret in SECRETS if secret.lower() in one.lower()]


def test_another_origin_gets_no_user_of_the_settings(
    servers: tuple[FileServer, FileServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = servers
    here.target = f"{there.url}/moved.jsonl"
    monkeypatch.setitem(conf, "http", {"client_kwargs": {"auth": aiohttp.BasicAuth("user", "s3cr3t")}})
    assert Storage.at(f"{here.url}/in.jsonl").read_bytes() == ROWS
    assert all("Authorization: Basic dXNlcjpzM2NyM3Q" in one for one in here.seen)
    assert there.seen and not [one for one in there.seen if "authorization" in one.lower()]


def test_another_address_of_the_origin_gets_the_headers(servers: tuple[FileServer, FileServer]) -> None:
    here, _ = servers
    here.target = "/moved.jsonl"
    assert Storage.at(f"{here.url}/in.jsonl").read_bytes() == ROWS
    assert all("X-Api-Key: s3cr3t" in one for one in here.seen)


def test_the_rows_of_an_input_behind_a_redirect_are_read(servers: tuple[FileServer, FileServer]) -> None:
    here, there = servers
    here.target = f"{there.url}/moved.jsonl"
    source = Source.find([here.url.replace("://", "://user:s3cr3t@") + "/in.jsonl?token=s3cr3t"])
    (unit,) = source.units
    assert [id_ for table in source.tables(unit) for id_ in table["id"].to_pylist()] == [1, 2]
    assert not [(secret, one) for one in there.seen for secret in SECRETS if secret.lower() in one.lower()]
