"""`HttpRequestStage`: posts the column `payload` to an HTTP endpoint, and adds the column `http_response`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
)

from ....engine.errors import PromptTypeError
from ....engine.shown import HIDDEN, without_secrets
from ... import columns
from ..base import RowError
from .pace import RetryRule, Throttle
from .redirect import post
from .request import DescribedError, RequestId, RequestStage

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
RETRIED_ERRORS = (TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
SHOWN_BODY = 200
"""Number of characters of an answer's body that an error quotes."""

MAX_RESPONSE_BYTES = 16 << 20
"""Size of the largest body that is read, if the user sets no other."""

PUBLIC_HEADERS = frozenset({"accept", "accept-encoding", "content-type", "user-agent"})
SECRET_CHARS = 6
"""Least length of a value of a header that errors hide. Shorter words are in many texts."""

READ_BYTES = 64 << 10

QUESTIONS = ("messages", "prompt", "input")
"""Fields by which a payload asks a model something, as in OpenAI's API."""

SessionFactory = Callable[[], aiohttp.ClientSession]


@dataclass(frozen=True)
class Answer:
    """The answer of a server.

    Attributes:
        status: Status code, such as 200.
        reason: Text of the status, such as OK.
        retry_after: Value of the header `Retry-After`; None if there is none.
        body: Bytes of the body.
    """

    status: int
    reason: str
    retry_after: str | None
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status says that the request succeeded."""
        return 200 <= self.status < 300

    @property
    def is_retried(self) -> bool:
        """Whether the status says that another attempt may succeed."""
        return self.status in RETRIED_STATUSES


class HttpRequestStage(RequestStage):
    """A stage that posts the payload of each row, and adds the JSON of the answer to the row.

    A payload that holds bytes, or dicts with `content` (and `filename`, `content_type`), is sent as a form; any other
    payload is sent as JSON. A payload that asks a model (`QUESTIONS`) and names none gets the `model` of its row,
    such as the name of an adapter. After a temporary failure (a busy server, a lost connection, a cut body) the
    request is sent again. After the last retry, and at once for any other status of failure, the row fails with the
    status and the start of the body.

    Args:
        url: URL of the endpoint.
        headers: Headers of every request.
        qps: Most requests per second, retries included; None for no limit.
        retry: Rule for the number and the waits of retries.
        request_timeout_s: Most seconds of one attempt; None for no limit.
        max_response_bytes: Size of the largest body that is read, decompressed; the row of a larger one fails.
        max_concurrent_requests: Most requests under way at once.
        session_factory: Function that makes the session, in the worker; None for a session without a limit on
            connections.
        follow_other_origins: Whether an answer may be fetched from another origin when the server redirects there.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "http_request"

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        qps: float | None = None,
        retry: RetryRule | None = None,
        request_timeout_s: float | None = None,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        max_concurrent_requests: int = 256,
        session_factory: SessionFactory | None = None,
        follow_other_origins: bool = False,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(max_concurrent_requests, stop_on_error=stop_on_error)
        self._url = url
        # Errors show the URL without its credentials and its query.
        parts = urlsplit(url)
        self._shown_url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._headers = dict(headers or {})
        self._secrets = _secrets_of(self._headers)
        self._throttle = Throttle(qps)
        self._retry = retry or RetryRule()
        self._follow_other_origins = follow_other_origins
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self._max_bytes = max_response_bytes
        self._session = self.wait(_open(session_factory or _unlimited_session))

    async def request(self, request_id: RequestId, row: Mapping[str, Any]) -> dict[str, Any]:
        """Posts the payload of a row, with retries; returns the answer's JSON and the number of attempts as columns."""
        payload = checked_payload(row)
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._retry.max_retries + 1),
            wait=self._wait_s,
            retry=retry_if_exception_type(RETRIED_ERRORS) | retry_if_result(lambda answer: answer.is_retried),
            retry_error_callback=_last_outcome,
        )
        try:
            answer: Answer = await retrying(self._send, payload)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise DescribedError(self._lost(error, _num_attempts(retrying))) from error
        attempts = _num_attempts(retrying)
        if not answer.is_success:
            raise DescribedError(self._refused(answer, attempts))
        return {columns.HTTP_RESPONSE: self._read(answer, attempts), columns.ATTEMPT: attempts}

    def close(self) -> None:
        """Closes the session and ends the event loop."""
        self.wait(self._session.close())
        super().close()

    async def _send(self, payload: Any) -> Answer:
        await self._throttle()
        # The body is encoded for each attempt, because a form can be sent only once.
        request = functools.partial(encode, payload, self._headers)
        async with post(self._session, self._url, request, self._timeout, self._follow_other_origins) as response:
            retry_after = response.headers.get("Retry-After")
            return Answer(response.status, response.reason or "", retry_after, await self._read_body(response))

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        """Reads a body in pieces, which are decompressed one by one, and no more of it than a little over the limit."""
        most = self._max_bytes if 200 <= response.status < 300 else 4 * SHOWN_BODY
        body = bytearray()
        async for piece in response.content.iter_chunked(READ_BYTES):
            body += piece
            if len(body) > most:
                response.close()
                break
        return bytes(body)

    def _wait_s(self, state: RetryCallState) -> float:
        failed = state.outcome is None or state.outcome.failed
        return self._retry.wait_s(state.attempt_number, None if failed else _last_outcome(state).retry_after)

    def _read(self, answer: Answer, attempts: int) -> Any:
        if len(answer.body) > self._max_bytes:
            message = f"has more than {self._max_bytes} bytes; set max_response_bytes to read larger ones"
            raise DescribedError(self._unread(answer, message, attempts))
        try:
            return json.loads(answer.body)
        except RecursionError as error:
            raise DescribedError(
                self._unread(answer, f"is nested too deeply: {self._start(answer)!r}", attempts)
            ) from error
        except ValueError as error:
            raise DescribedError(self._unread(answer, f"is no JSON: {self._start(answer)!r}", attempts)) from error

    def _unread(self, answer: Answer, said: str, attempts: int) -> RowError:
        message = f"{self._shown_url} answered {answer.status} with a body that {said}"
        return RowError(self.name, "HttpBodyError", message, False, attempts)

    def _refused(self, answer: Answer, attempts: int) -> RowError:
        message = f"{self._shown_url} answered {answer.status} {self._shown(answer.reason)}: {self._start(answer)!r}"
        return RowError(self.name, "HttpStatusError", message, answer.is_retried, attempts)

    def _start(self, answer: Answer) -> str:
        # A secret at the end of the shown characters is whole in this text, so it is found.
        return self._shown(answer.body[:READ_BYTES].decode("utf-8", "replace"))

    def _shown(self, text: str) -> str:
        """Returns the beginning of what the server sent, which may be an echo of our headers, without their values."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return str(without_secrets(text[: 4 * SHOWN_BODY]))[:SHOWN_BODY]

    def _lost(self, error: Exception, attempts: int) -> RowError:
        is_timeout = isinstance(error, TimeoutError)
        said = self._shown(str(error))
        if is_timeout and self._timeout.total:
            said = f"no answer within {self._timeout.total:g} s"
        kind = "HttpTimeoutError" if is_timeout else type(error).__name__
        message = f"{self._shown_url}: {said or type(error).__name__}"
        return RowError(self.name, kind, message, isinstance(error, RETRIED_ERRORS), attempts)


def _secrets_of(headers: Mapping[str, str]) -> list[str]:
    """Returns the values of headers, and the words in them, that an error must not show, the longest first."""
    values = [value for name, value in headers.items() if name.lower() not in PUBLIC_HEADERS]
    words = {word for value in values for word in (value, *value.split()) if len(word) >= SECRET_CHARS}
    return sorted(words | {json.dumps(word)[1:-1] for word in words}, key=len, reverse=True)


def checked_payload(row: Mapping[str, Any]) -> Any:
    """Returns the payload of a row, with the model that the row names if the payload asks a model and names none.

    Args:
        row: The columns of the row.

    Raises:
        PromptTypeError: The row has no payload.
    """
    if row.get(columns.PAYLOAD) is None:
        raise PromptTypeError(
            f"the row has no column {columns.PAYLOAD!r} with something to send; let preprocess return it. Its columns "
            f"are: {', '.join(map(str, row)) or 'none'}"
        )
    payload, model = row[columns.PAYLOAD], row.get(columns.MODEL)
    if not isinstance(payload, Mapping) or payload.get("model") is not None or not isinstance(model, str):
        return payload
    return {**payload, "model": model} if any(name in payload for name in QUESTIONS) else payload


def encode(payload: Any, headers: Mapping[str, str]) -> tuple[bytes | aiohttp.FormData, dict[str, str]]:
    """Returns the body and the headers of a request: a form for a payload that holds files, otherwise JSON.

    Args:
        payload: The payload of the row.
        headers: Headers from the user.
    """
    plain = {name: value for name, value in headers.items() if name.lower() != "content-type"}
    if isinstance(payload, Mapping) and any(_is_file(value) for value in payload.values()):
        return _form(payload), plain  # aiohttp sets the content type, which names the boundary of the form.
    asked = next((value for name, value in headers.items() if name.lower() == "content-type"), "application/json")
    return _json(payload).encode(), {**plain, "Content-Type": asked}


def _is_file(value: Any) -> bool:
    return isinstance(value, bytes | bytearray) or (isinstance(value, Mapping) and "content" in value)


def _form(payload: Mapping[str, Any]) -> aiohttp.FormData:
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in payload.items():
        if isinstance(value, Mapping) and "content" in value:
            given = {"filename": value.get("filename") or name, "content_type": value.get("content_type")}
            form.add_field(name, value["content"], **given)
        elif isinstance(value, bytes | bytearray):
            form.add_field(name, bytes(value), filename=name)
        else:
            form.add_field(name, value if isinstance(value, str) else _json(value))
    return form


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """Returns a numpy value as a list or a Python number, for `json.dumps`; raises TypeError for any other value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r:.80} cannot be sent as JSON")


def _last_outcome(state: RetryCallState) -> Answer:
    """Returns the answer of the last attempt, or raises the error of that attempt."""
    assert state.outcome is not None
    return state.outcome.result()


def _num_attempts(retrying: AsyncRetrying) -> int:
    return int(retrying.statistics["attempt_number"])


async def _open(factory: SessionFactory) -> aiohttp.ClientSession:
    return factory()  # A session must be made on the event loop that it runs on.


def _unlimited_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
