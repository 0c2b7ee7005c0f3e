"""Whatever a server answers, it is the answer or the error of its row, and the next request is answered."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from input_files import JSON_VALUES
from raw_server import RawServer, running_raw

from millrace.pipeline import columns
from millrace.pipeline.processor.operators import Finish, pack
from millrace.pipeline.stages.backends.http import HttpRequestStage
from millrace.pipeline.stages.backends.pace import RetryRule, retry_after_s
from millrace.pipeline.stages.base import Row

MAX_EXAMPLES = int(os.environ.get("MILLRACE_FUZZ_EXAMPLES", "300"))
MAX_BYTES = 1 << 16
GOOD = {"payload": {"text": "é", "numbers": [1, 2.5]}}
KINDS = ("Http", "Client", "Server", "TransferEncoding", "ContentLength", "BadStatus", "LineTooLong", "InvalidHeader")

STATUSES = st.one_of(
    st.sampled_from([100, 101, 103, 200, 201, 204, 206, 299, 300, 301, 302, 303, 304, 307, 308, 400, 401, 404, 408])
    | st.sampled_from([413, 418, 429, 500, 502, 503, 504, 599, 600, 999]).map(lambda code: code),
).map(lambda code: b"HTTP/1.1 %d Reason" % code)
STATUS_LINES = st.one_of(
    *(st.just(b"HTTP/1.1 200 OK") for _ in range(4)),
    STATUSES,
    st.sampled_from(
        [b"HTTP/1.0 200 OK", b"HTTP/9.9 200 OK", b"HTTP/1.1 0200 OK", b"HTTP/1.1 -1 x", b"HTTP/1.1", b"ICY 200"]
    )
    | st.sampled_from(
        [b"HTTP/1.1 200 " + b"r" * 5000, b"HTTP/1.1 500 \xff\xfe", b"", b"\x00", b"{}", b"HTTP/1.1 2x0 OK"]
    )
    | st.binary(max_size=20),
)
BODIES = st.one_of(
    JSON_VALUES.map(str.encode),
    st.sampled_from(
        [
            *(b"", b"{", b"null", b"NaN", b"-Infinity", b"1" * 5000, b"9" * 400, b"[" * 5000, b"[" * 600 + b"]" * 600),
            *(
                b'{"a":' * 300 + b"1" + b"}" * 300,
                b'"\\ud800"',
                b'"\xff"',
                '{"a": 1}'.encode("utf-16"),
                b"\xef\xbb\xbf{}",
            ),
            *(
                b'{"a": 1}{"b": 2}',
                b'{"choices": []}',
                b'{"choices": [{"message": null}]}',
                b'{"data": {"embedding": 3}}',
            ),
            *(b'{"choices": [{"message": {"content": [1, "x", null]}}, 3]}', b'{"": {"": 18446744073709551616}}'),
            *(b'"' + b"x" * MAX_BYTES + b'"', b" " * (MAX_BYTES - 2) + b"{}", b"<html>" + b"e" * 5000),
        ]
    ),
    st.binary(max_size=30),
)
BOMB = gzip.compress(bytes(64 << 20))
ENCODINGS: list[tuple[bytes, Any]] = [
    *[(b"", bytes)] * 6,
    *((b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"deflate", lambda body: zlib.compress(body)[2:-4])),
    *((b"gzip", bytes), (b"gzip", lambda body: gzip.compress(body)[:-6]), (b"gzip, gzip", gzip.compress)),
    *((b"br", bytes), (b"zstd", bytes), (b"identity", bytes), (b"\xff", bytes), (b"deflate", bytes)),
    (b"gzip", lambda body: BOMB),
    (b"gzip", lambda body: gzip.compress(body) + b"more"),
]
RETRY_AFTER = st.sampled_from(
    [
        *(
            b"0",
            b"-1",
            b"nan",
            b"inf",
            b"1e400",
            b"9" * 400,
            b"\xb2",
            b"\xd9\xa3",
            b"",
            b" ",
            b"Thu, 01 Jan 1970 00:00:00 GMT",
        ),
        *(b"Fri, 31 Dec 9999 23:59:59 -2359", b"Thu, 01 Jan 1970 00:00:00 +99999999", b"0x10", b"1, 2", b"\x00"),
    ]
)
LOCATIONS = st.sampled_from(
    [
        *(
            b"",
            b"/",
            b"//",
            b"http://",
            b"ftp://x/",
            b"http://[::",
            b"http://127.0.0.1:99999/",
            b"?" * 3000,
            b"\xff",
            b"http://a b/",
        ),
        *(b"javascript:1", b"http://user:secret@127.0.0.1:1/", b"\\\\x", b"/v1/ask"),
    ]
)
HEADERS = st.one_of(
    RETRY_AFTER.map(lambda value: b"Retry-After: " + value),
    LOCATIONS.map(lambda value: b"Location: " + value),
    st.sampled_from(
        [
            *(
                b"Content-Type: application/json; charset=klingon",
                b"Content-Type: \xff",
                b"Set-Cookie: ;;=\xff; Max-Age=x",
            ),
            *(
                b"Connection: keep-alive, close",
                b"Upgrade: websocket",
                b"no colon",
                b": no name",
                b" folded",
                b"X: " + b"y" * 9000,
            ),
            *(b"Trailer: x", b"Content-Range: bytes 0-", b"X\x00: 1", b"Content-Length: 1", b"Transfer-Encoding: gzip"),
        ]
    ),
)


@st.composite
def answers(draw: Any) -> list[bytes | float]:
    """Draws what a server sends: bytes, and seconds of silence."""
    encoding, encode = draw(st.sampled_from(ENCODINGS))
    body = encode(draw(BODIES))
    head = [draw(STATUS_LINES), *draw(st.lists(HEADERS, max_size=2))]
    head += [b"Content-Encoding: " + encoding] if encoding else []
    framing = draw(
        st.sampled_from(["length", "length", "chunks", "end", "short", "long", "odd", "chunks cut", "chunks odd"])
    )
    if framing in ("length", "short", "long", "odd"):
        given = {"length": len(body), "short": max(0, len(body) - 1), "long": len(body) + 5, "odd": 0}[framing]
        odd = draw(st.sampled_from([b"-1", b"x", b"9" * 30, b"1e3", b"", b"+2", b"1, 2"]))
        head.append(b"Content-Length: " + (odd if framing == "odd" else b"%d" % given))
    elif framing != "end":
        head.append(b"Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n" % (len(body), body) + b"0\r\n\r\n" * (framing == "chunks")
        if framing == "chunks odd":
            body = draw(st.sampled_from([b"-1\r\n", b"zz\r\n", b"f" * 20 + b"\r\n", b"2;" + b"x" * 9000])) + body
    whole = b"\r\n".join(head) + b"\r\n\r\n" + body
    at = draw(st.integers(0, min(len(whole), 200)))
    pause = draw(st.sampled_from([None, None, None, None, 0.0, 0.3]))
    parts: list[bytes | float] = [whole] if pause is None else [whole[:at], pause, whole[at:]]
    if draw(st.integers(0, 9)) == 0:
        parts = [whole[:at]]
    return parts


@pytest.fixture(scope="module")
def server() -> Iterator[RawServer]:
    with running_raw() as server:
        yield server


@pytest.fixture(scope="module")
def stage(server: RawServer) -> Iterator[HttpRequestStage]:
    retry = RetryRule(max_retries=1, base_wait_s=0.001, max_wait_s=0.002)
    stage = HttpRequestStage(server.url, request_timeout_s=0.15, max_response_bytes=MAX_BYTES, retry=retry)
    yield stage
    stage.close()


@pytest.mark.soak
@settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=answers())
def test_any_answer_is_that_of_its_row_or_its_error(
    server: RawServer, stage: HttpRequestStage, script: list[bytes | float]
) -> None:
    server.script = script
    row, good = Row.read({"payload": {}}), Row.read(dict(GOOD))
    stage.run([row])
    server.script = None
    for _ in range(20):  # On a busy machine the answer may come after the short time limit of this test.
        good.error = None
        stage.run([good])
        if good.error is None:
            break
    assert good.data[columns.HTTP_RESPONSE] == GOOD["payload"]
    if row.error is not None:
        assert row.error.kind.startswith(KINDS), row.error
        assert len(row.error.message) < 1500
        assert "secret" not in row.error.message
    table = Finish(list, mark_success=True)(pack([row, good]))
    _, second = table.to_pylist() if not isinstance(table, dict) else [{}, {columns.INFERENCE_ERROR: ""}]
    assert second[columns.INFERENCE_ERROR] == ""


@given(RETRY_AFTER.map(lambda value: value.decode("latin-1")) | st.text(max_size=20) | st.datetimes().map(str))
def test_nonsense_in_retry_after_asks_for_a_number_of_seconds(value: str) -> None:
    assert retry_after_s(value) >= 0
