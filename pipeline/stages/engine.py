"""The engine's side of a row: a prompt becomes a request of the pool, and its output columns of the row.

A stage of this kind holds no model: it is a thin client of the engine pool, so a restart of it costs nothing. What is
asked of the engine is what its kinds differ in: `GenerateStage` and `PoolStage`.
"""

from __future__ import annotations

import sys
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ...engine import EngineOutput, GenerateRequest, Request
from ...engine.errors import ConfigError, EngineError
from ...engine.outputs import RequestMetrics
from .. import columns
from .base import Row, RowError, Stage
from .duplicates import Arrival, Duplicates, Inbox, request_key
from .prompts import checked_prompt, checked_token_ids

__all__ = ["EngineClient", "EngineStage", "in_good_order", "plain_values", "request_columns"]

METRICS = tuple(one.name for one in fields(RequestMetrics) if one.name not in ("attempt", "replica_id"))
"""What of a request's metrics is in the column of that name; the others have columns of their own."""


class EngineClient(Protocol):
    """What the stage needs of a pool's client; `actors.PoolClient` is one."""

    def generate(self, requests: list[Request]) -> Iterator[EngineOutput]:
        """Yields the output of each request once, as they finish."""
        ...


@dataclass(slots=True)
class Asked:
    """A row and its request.

    Attributes:
        row: The row.
        request: Its request.
        params: Its parameters as text.
        key: What identical requests share.
    """

    row: Row
    request: Request
    params: str
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.key = request_key(self.request, self.params)


@dataclass(slots=True)
class _Call:
    """The rows of a block under way: those that run, by request id, and how many wait for identical ones."""

    batch_uuid: str
    start_s: float
    running: dict[str, Asked] = field(default_factory=dict)
    num_waiting: int = 0
    inbox: Inbox = field(default_factory=Inbox)

    @property
    def requests(self) -> list[Request]:
        return [asked.request for asked in self.running.values()]


class EngineStage(Stage):
    """Sends the rows of a block to the engine pool and takes their outputs as they finish.

    Several blocks are under way at once (threads of one actor share a stage), so that a slow row of one holds up
    nothing but its own block.

    Args:
        client: The pool's client.
        model: The model that runs; a row that names another one is refused.
        duplicates: Whether identical requests run once.
        on_output: Called with each output as it arrives, from the thread of its block.
        stop_on_error: Whether the first failed row stops the job.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        model: str,
        duplicates: bool = True,
        on_output: Callable[[EngineOutput], None] | None = None,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._client = client
        self._model = model
        self._duplicates = Duplicates() if duplicates else None
        self._on_output = on_output

    @abstractmethod
    def make_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> Request:
        """Makes what a row asks of the engine.

        Args:
            request_id: Its id.
            prompt: Its text, None if only its tokens are known.
            prompt_token_ids: Its tokens, None if only its text is known.
            row: Its columns.
        """

    @abstractmethod
    def output_columns(self, asked: Asked, output: Any) -> dict[str, Any]:
        """Returns what an output adds to its row.

        Args:
            asked: The row and its request.
            output: What came of it, without an error.
        """

    def run(self, rows: Sequence[Row]) -> None:
        """Runs the rows in place, whatever the order in which they finish.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
            EngineError: The pool ended without an output for a row.
        """
        for _ in self.stream(rows):
            pass

    def stream(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Runs the rows in place and yields each as soon as it is finished, and first those that cannot run.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
            EngineError: The pool ended without an output for a row.
        """
        call = _Call(uuid.uuid4().hex, time.monotonic())
        try:
            for index, row in enumerate(rows):
                request = None if row.error is not None else self._request(f"{call.batch_uuid}-{index}", row)
                if request is None:
                    yield row
                else:
                    self._admit(call, Asked(row, request, repr(request.params)))
            for output in self._client.generate(in_good_order(call.requests)) if call.running else ():
                yield self._finish(call, output)
                yield from self._arrived(call)
            if call.running:
                raise EngineError(
                    f"the engine pool ended without an output for {len(call.running)} of {len(rows)} rows"
                )
            while call.num_waiting:
                yield self._take(call, call.inbox.get())
        finally:
            if self._duplicates is not None:
                for asked in call.running.values():
                    self._duplicates.abandon(asked.key, EngineError("the identical request of another row did not end"))

    def _admit(self, call: _Call, asked: Asked) -> None:
        """Decides whether a request runs or waits for one that is identical."""
        if self._duplicates is not None and not self._duplicates.claim(asked.key, call.inbox, asked):
            call.num_waiting += 1
        else:
            call.running[asked.request.request_id] = asked

    def _finish(self, call: _Call, output: EngineOutput) -> Row:
        asked = call.running.pop(output.request_id)
        if self._duplicates is not None:
            self._duplicates.finish(asked.key, output)
        if self._on_output is not None:
            self._on_output(output)
        return self._completed(call, asked, output, {})

    def _arrived(self, call: _Call) -> Iterator[Row]:
        """Yields the rows whose output came from an identical request meanwhile."""
        while not call.inbox.empty():
            yield self._take(call, call.inbox.get())

    def _take(self, call: _Call, arrival: Arrival) -> Row:
        call.num_waiting -= 1
        if arrival.output is None:
            raise arrival.error or EngineError("the identical request of another row did not end")
        own = {columns.REQUEST_ID: arrival.item.request.request_id, columns.IS_DUPLICATE: True}
        return self._completed(call, arrival.item, arrival.output, own)

    def _completed(self, call: _Call, asked: Asked, output: EngineOutput, own: Mapping[str, Any]) -> Row:
        if output.error is not None:
            self.fail(asked.row, self._row_error(output), output.error.to_exception())
            return asked.row
        timing = {columns.BATCH_UUID: call.batch_uuid, columns.TIME_TAKEN: time.monotonic() - call.start_s}
        added = self.output_columns(asked, output)
        self.merge(asked.row, {**added, **timing, **own})
        return asked.row

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Runs one row alone."""
        alone = Row.read(dict(row))
        self.run([alone])
        if alone.error is not None:
            raise EngineError(str(alone.error))
        return alone.data

    def _request(self, request_id: str, row: Row) -> Request | None:
        """Makes the row's request; None if the row cannot be one and now holds the reason."""
        try:
            return self._checked_request(request_id, row.data)
        except Exception as error:  # noqa: BLE001  # whatever the values of a row break is that row's error
            self.fail(row, RowError.from_exception(self.name, error), error)
            return None

    def _checked_request(self, request_id: str, row: Mapping[str, Any]) -> Request:
        if row.get(columns.MODEL) not in (None, self._model):
            raise ConfigError(
                f"column {columns.MODEL!r} asks for {row[columns.MODEL]!r}, but adapters chosen by row are not there "
                f"yet: all rows run on {self._model!r}; let preprocess set the column to None"
            )
        prompt_token_ids = checked_token_ids(row)
        prompt = checked_prompt(row) if prompt_token_ids is None else None
        return self.make_request(request_id, prompt, prompt_token_ids, row)

    def _row_error(self, output: EngineOutput) -> RowError:
        assert output.error is not None
        error = output.error
        return RowError(self.name, error.kind, error.message, error.retryable, output.metrics.attempt)


def in_good_order(requests: Iterable[Request]) -> list[Request]:
    """Puts long outputs first, and among those of one length prompts with a common beginning side by side.

    Length counts before: a block, and the last one of a job above all, ends sooner if its long outputs start first, and
    most blocks have one limit for all rows anyway. Where prompts with a common beginning stand side by side, the first
    of them has computed it, and the cache still holds it, when the next one comes.

    Args:
        requests: The requests of a block; an output without a limit counts as longest.

    Returns:
        The same requests.
    """
    return sorted(requests, key=_place)


def _place(request: Request) -> tuple[int, list[int], str]:
    prompt = (request.prompt_token_ids, "") if request.prompt_token_ids is not None else ([], request.prompt or "")
    max_tokens = request.sampling_params.max_tokens if isinstance(request, GenerateRequest) else 1
    return (-(max_tokens or sys.maxsize), *prompt)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns numpy arrays into the lists they were before they went through Arrow."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}


def request_columns(output: EngineOutput, params_text: str) -> dict[str, Any]:
    """Returns the columns that a finished request of any kind adds to its row.

    Args:
        output: What the engine returned.
        params_text: The parameters it ran with, as text.

    Returns:
        Column name -> value.
    """
    prompt_token_ids = output.prompt_token_ids or []
    return {
        columns.REQUEST_ID: output.request_id,
        columns.PARAMS: params_text,
        columns.PROMPT: output.prompt,
        columns.PROMPT_TOKEN_IDS: prompt_token_ids,
        columns.NUM_INPUT_TOKENS: len(prompt_token_ids),
        columns.NUM_CACHED_TOKENS: output.num_cached_tokens or 0,
        columns.ATTEMPT: output.metrics.attempt,
        columns.REPLICA_ID: output.metrics.replica_id,
        columns.METRICS: {name: getattr(output.metrics, name) for name in METRICS},
    }
