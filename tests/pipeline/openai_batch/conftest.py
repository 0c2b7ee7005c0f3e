"""A store for the tests of batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

from millrace.engine.storage import RemoteFiles, StorageOptions
from millrace.pipeline.files.storage import Storage


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket of a real S3 server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    name = f"lake-{port}"  # The server's memory is the process's, and outlives it.
    place = Storage.at(f"s3://{name}", options=StorageOptions(endpoint_url=f"http://{host}:{port}"))
    RemoteFiles("s3", place.options).library.mkdir(name)
    yield place
    server.stop()
