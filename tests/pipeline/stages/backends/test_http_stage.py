"""Rows to a real HTTP server and back: how many at once, how often, and what a row is told that got no answer."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import numpy as np
import pytest
from http_server import Server, bomb, cut, endless, hang, hang_up, running, status
from hypothesis import given
from hypothesis import strategies as st

from millrace.pipeline import RowFailedError
from millrace.pipeline.stages.backends.http import HttpRequestStage
from millrace.pipeline.stages.backends.pace import RetryRule, Throttle, retry_after_s
from millrace.pipeline.stages.base import Row

SOON = RetryRule(max_retries=3, base_wait_s=0.001, max_wait_s=0.01)

MakeStage = Callable[..., HttpRequestStage]


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


@pytest.fixture
def make_stage(server: Server) -> Iterator[MakeStage]:
    stages: list[HttpRequestStage] = []

    def make(**settings: Any) -> HttpRequestStage:
        stages.append(HttpRequestStage(**{"url": server.url, **settings}))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


def rows_of(*payloads: Any) -> list[Row]:
    return [Row.read({"payload": payload}) for payload in payloads]


def run(stage: HttpRequestStage, *payloads: Any) -> list[Row]:
    rows = rows_of(*payloads)
    stage.run(rows)
    return rows


def test_ten_rows_are_all_under_way_at_once(server: Server, make_stage: MakeStage) -> None:
    server.hold = 10  # Nobody is answered before all ten are there: one after another would wait forever.
    rows = run(make_stage(request_timeout_s=30), *range(10))
    assert [row.data["http_response"] for row in rows] == [{"echo": number} for number in range(10)]
    assert server.max_in_flight == 10


def test_blocks_share_the_places(server: Server, make_stage: MakeStage) -> None:
    server.hold = 6
    stage = make_stage(max_concurrent_requests=6, request_timeout_s=30)
    blocks = [rows_of(*range(3 * block, 3 * block + 3)) for block in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(stage.run, blocks))
    assert [row.data["http_response"]["echo"] for block in blocks for row in block] == list(range(12))
    assert server.max_in_flight == 6


def test_what_is_sent_is_json_with_the_headers_asked_for(server: Server, make_stage: MakeStage) -> None:
    payload = {"ids": np.arange(3), "x": np.float32(0.5), "on": np.bool_(True), "text": "ü", "none": None}
    (row,) = run(make_stage(headers={"Authorization": "Bearer me"}), payload)
    assert row.data["http_response"] == {"echo": {"ids": [0, 1, 2], "x": 0.5, "on": True, "text": "ü", "none": None}}
    assert row.data["payload"] is payload
    (seen,) = server.seen
    assert seen.headers["Content-Type"] == "application/json"
    assert seen.headers["Authorization"] == "Bearer me"


@pytest.mark.parametrize(
    ("payload", "model", "sent"),
    [
        ({"messages": []}, "legal", {"messages": [], "model": "legal"}),
        ({"prompt": "x", "model": None}, "legal", {"prompt": "x", "model": "legal"}),
        ({"input": "x", "model": "own"}, "legal", {"input": "x", "model": "own"}),
        ({"input": "x"}, None, {"input": "x"}),
        ({"input": "x"}, math.nan, {"input": "x"}),
        ({"address": "x"}, "legal", {"address": "x"}),
        ("text", "legal", "text"),
    ],
)
def test_a_question_that_names_no_model_asks_that_of_its_row(
    server: Server, make_stage: MakeStage, payload: Any, model: Any, sent: Any
) -> None:
    row = Row.read({"payload": payload, "model": model})
    make_stage().run([row])
    assert row.data["http_response"] == {"echo": sent}
    assert row.data["payload"] is payload


def test_a_content_type_of_the_users_stands(server: Server, make_stage: MakeStage) -> None:
    run(make_stage(headers={"content-type": "application/x-ndjson"}), 1)
    assert server.seen[0].headers["Content-Type"] == "application/x-ndjson"


def test_files_go_out_as_a_form(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(200, "{}"), status(200, "{}")]
    named = {"content": b"\x01", "filename": "a.wav", "content_type": "audio/wav"}
    run(make_stage(headers={"Content-Type": "application/json"}), {"file": named, "raw": b"\x02", "n": 3, "s": "t"})
    (seen,) = server.seen
    assert seen.headers["Content-Type"].startswith("multipart/form-data; boundary=")
    parts = seen.body.split(b"--" + seen.headers["Content-Type"].split("boundary=")[1].encode())[1:-1]
    assert b'name="file"; filename="a.wav"' in parts[0] and b"Content-Type: audio/wav" in parts[0]
    assert b'name="raw"; filename="raw"' in parts[1] and parts[1].rstrip().endswith(b"\x02")
    assert parts[2].rstrip().endswith(b"3")
    assert parts[3].rstrip().endswith(b"t")


@pytest.mark.parametrize("fault", [status(code) for code in (408, 429, 500, 502, 503, 504)] + [hang_up, cut], ids=repr)
@pytest.mark.parametrize("payload", [1, {"file": b"x"}], ids=["json", "form"])
def test_what_may_go_better_is_sent_again(server: Server, make_stage: MakeStage, fault: Any, payload: Any) -> None:
    server.answers = [fault, fault, status(200, '{"ok": 1}')]
    (row,) = run(make_stage(retry=SOON), payload)
    assert row.error is None
    assert (row.data["http_response"], row.data["attempt"]) == ({"ok": 1}, 3)
    assert len(server.seen) == 3


def test_a_request_that_hangs_is_cut_off_and_sent_again(server: Server, make_stage: MakeStage) -> None:
    server.answers = [hang, status(200, "1")]
    (row,) = run(make_stage(retry=SOON, request_timeout_s=0.2), 0)
    assert (row.data["http_response"], row.data["attempt"]) == (1, 2)


@pytest.mark.parametrize(
    ("answers", "said", "retryable", "attempts"),
    [
        ([status(400, "no " + "x" * 999)], "HttpStatusError: {url} answered 400 Bad Request: 'no", False, 1),
        ([status(404)], "HttpStatusError: {url} answered 404 Not Found: ''", False, 1),
        ([status(301, Location="ftp://elsewhere")], "HttpRedirectError: {url}: the server redirects", False, 1),
        ([status(503, "busy")] * 4, "HttpStatusError: {url} answered 503 Service Unavailable: 'busy'", True, 4),
        ([hang_up] * 4, "ServerDisconnectedError: {url}: Server disconnected", True, 4),
        ([status(200, "<html>")], "HttpBodyError: {url} answered 200 with a body that is no JSON: '<html>'", False, 1),
        ([hang] * 4, "HttpTimeoutError: {url}: no answer within 0.2 s", True, 4),
    ],
    ids=["400", "404", "301", "503", "hang up", "no json", "hang"],
)  # fmt: skip
def test_a_row_without_an_answer_fails_alone(
    server: Server, make_stage: MakeStage, answers: list[Any], said: str, retryable: bool, attempts: int
) -> None:
    server.answers = list(answers)
    stage = make_stage(url=server.url + "?key=secret", retry=SOON, request_timeout_s=0.2)
    rows = run(stage, "bad")
    rows += run(stage, "good")
    error = rows[0].error
    assert error is not None
    assert f"{error.kind}: {error.message}".startswith(said.format(url=server.url))
    assert (error.stage, error.retryable, error.attempts) == ("http_request", retryable, attempts)
    assert len(error.message) < 400
    assert "secret" not in error.message
    assert rows[1].error is None


@pytest.mark.parametrize("fault", [endless, bomb], ids=["endless", "gzip"])
def test_no_more_of_an_answer_is_read_than_the_limit(server: Server, make_stage: MakeStage, fault: Any) -> None:
    server.answers = [fault]
    rows = run(make_stage(max_response_bytes=10_000), "bad", "good")
    (error,) = [row.error for row in rows if row.error is not None]
    assert "answered 200 with a body that has more than 10000 bytes; set max_response_bytes" in str(error)


def test_an_answer_that_is_nested_too_deeply_fails_its_row(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(200, "[" * 100_000)]
    (row,) = run(make_stage(), 1)
    assert "nested too deeply" in str(row.error)


def test_a_server_that_is_not_there_is_said() -> None:
    stage = HttpRequestStage("http://127.0.0.1:9/ask", retry=RetryRule(1, 0.001))
    (row,) = run(stage, 1)
    stage.close()
    assert row.error is not None
    assert (row.error.kind, row.error.retryable, row.error.attempts) == ("ClientConnectorError", True, 2)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": 1}, "PromptTypeError: the row has no column 'payload'"),
        ({"payload": {"a": object()}}, "TypeError: object"),
    ],
)
def test_what_cannot_be_sent_is_not(server: Server, make_stage: MakeStage, columns: dict[str, Any], said: str) -> None:
    rows = [Row.read(columns), *rows_of(1)]
    make_stage(retry=SOON).run(rows)
    assert said in str(rows[0].error)
    assert rows[1].error is None
    assert len(server.seen) == 1


def test_the_first_failed_row_stops_a_job_that_stops(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(400, "no")]
    with pytest.raises(RowFailedError, match="a row failed in http_request: HttpStatusError"):
        run(make_stage(stop_on_error=True), 1)


def test_rows_that_failed_before_are_not_sent(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(400)]
    stage = make_stage()
    rows = run(stage, 1)
    stage.run(rows)
    assert len(server.seen) == 1


def test_requests_are_spaced_and_so_are_those_sent_again(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(503)]
    run(make_stage(qps=20, retry=SOON), *range(5))
    times = sorted(seen.at_s for seen in server.seen)
    assert len(times) == 6
    assert times[-1] - times[0] >= 2 / 20  # Five gaps; the first may have been late at the server.


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.1, 1000))
def test_turns_are_a_gap_apart_and_never_in_the_past(times: list[float], qps: float) -> None:
    throttle = Throttle(qps)
    turns = [throttle.take_turn(now_s) for now_s in sorted(times)]
    assert all(turn >= now_s for turn, now_s in zip(turns, sorted(times), strict=True))
    assert all(later - turn >= 1 / qps * 0.999 for turn, later in itertools.pairwise(turns))
    assert Throttle(None).take_turn(times[0]) == times[0]


def test_a_server_says_when_to_come_back(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(429, **{"Retry-After": "1"}), status(200, "1")]
    run(make_stage(retry=RetryRule(1, 0.001, max_wait_s=0.3)), 0)
    first, second = (seen.at_s for seen in server.seen)
    assert second - first >= 0.29  # As long as it asked, or as the bound lets it.


def test_dates_and_seconds_are_read_and_nonsense_is_nothing() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < retry_after_s(later) <= 90
    assert (retry_after_s("120"), retry_after_s(" 1.5 "), retry_after_s("9" * 5000)) == (120, 1.5, math.inf)
    assert [retry_after_s(value) for value in ("\u00b2", f"Wed, 21 Oct 2015 07:28:00 +{'9' * 30}")] == [0, 0]
    assert [retry_after_s(value) for value in (None, "", "soon", "-3", "Wed, 21 Oct 2015 07:28:00 GMT")] == [0] * 5


@given(st.integers(1, 10_000), st.floats(0.001, 10), st.floats(0.001, 100))
def test_waits_grow_below_a_bound_that_doubles(attempt: int, base_s: float, max_s: float) -> None:
    rule = RetryRule(9, base_s, max_s)
    assert 0 <= rule.wait_s(attempt) <= min(max_s, base_s * 2.0 ** min(attempt - 1, 64))
    assert rule.wait_s(attempt, "99999") == max_s
    assert max_s / 2 <= rule.wait_s(attempt, str(max_s / 2)) <= max_s


def test_the_users_session_is_used(server: Server, make_stage: MakeStage) -> None:
    (row,) = run(make_stage(session_factory=lambda: aiohttp.ClientSession(headers={"X-Mill": "yes"})), 1)
    assert row.error is None
    assert server.seen[0].headers["X-Mill"] == "yes"


def test_one_row_alone(server: Server, make_stage: MakeStage) -> None:
    assert json.dumps(make_stage().process({"payload": [1]})["http_response"]) == '{"echo": [1]}'


SECRET = {"Authorization": "Bearer secret", "api-key": "secret", "Content-Type": "application/json"}


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    with running(Server()) as server:
        yield server


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_gets_nothing(
    server: Server, elsewhere: Server, make_stage: MakeStage, code: int
) -> None:
    server.answers = [status(code, Location=elsewhere.url)]
    (row,) = run(make_stage(headers=SECRET), {"text": "private"})
    assert row.error is not None and row.error.kind == "HttpRedirectError" and not row.error.retryable
    assert "another origin" in row.error.message and elsewhere.url.partition("/v1")[0] in row.error.message
    assert not elsewhere.seen


def test_an_answer_at_another_origin_is_fetched_without_secrets_where_a_setting_allows_it(
    server: Server, elsewhere: Server, make_stage: MakeStage
) -> None:
    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers={"X-Key": "secret"}, cookies={"key": "secret"})

    stage = make_stage(headers=SECRET, session_factory=session, follow_other_origins=True)
    server.answers = [status(303, Location=elsewhere.url), status(307, Location=elsewhere.url)]
    elsewhere.answers = [status(200, "7")]
    rows = run(stage, {"text": "private"}) + run(stage, {"text": "private"})
    assert rows[0].data["http_response"] == 7
    (seen,) = elsewhere.seen
    assert seen.body == b"" and "secret" not in str(seen.headers)
    assert rows[1].error is not None and rows[1].error.kind == "HttpRedirectError"  # It asks for the row itself.


def test_a_redirect_within_an_origin_is_followed_with_the_request(server: Server, make_stage: MakeStage) -> None:
    server.answers = [status(307, Location="/v2/ask")]
    (row,) = run(make_stage(headers=SECRET), [1])
    assert row.data["http_response"] == {"echo": [1]}
    assert [seen.headers["api-key"] for seen in server.seen] == ["secret", "secret"]


@pytest.mark.parametrize(("location", "said"), [("/v1/ask", "more than 5 times"), ("http://[", "no address")])
def test_a_redirect_that_leads_nowhere_is_the_error_of_its_row(
    server: Server, make_stage: MakeStage, location: str, said: str
) -> None:
    server.answers = [status(307, Location=location)] * 10
    (row,) = run(make_stage(), 1)
    assert row.error is not None and said in row.error.message


@pytest.mark.parametrize("code", [200, 400])
@pytest.mark.parametrize("pad", ["", "x" * 190])
def test_an_echo_of_our_headers_shows_none_of_their_values(
    server: Server, make_stage: MakeStage, code: int, pad: str
) -> None:
    headers = {"api-key": 'hunter2"a/b', "X-Own": "Basic hunter2hunter2", "Accept": "text/plain"}
    echo = f"{pad} headers: {json.dumps(headers)}, hunter2hunter2 {headers['api-key']} text/plain"
    server.answers = [status(code, echo)]
    (row,) = run(make_stage(headers=headers), "bad")
    assert row.error is not None and "hunter" not in row.error.message
    assert "headers" in row.error.message and ("text/plain" in row.error.message or pad)
