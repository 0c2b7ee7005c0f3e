"""The stage of an engine: each row becomes a request to the pool of engines, and the output becomes columns of the row.

The stage holds no model. It is a thin client of the pool, so its restart costs nothing. Its subclasses,
`GenerateStage` and `PoolingStage`, differ in their requests and in the columns that they make of an output.
"""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ....engine import EngineOutput, Request
from ....engine.errors import EngineError, UserError
from ....engine.outputs import RequestMetrics
from ....engine.request import longest_first
from ... import columns
from ..adapters import AdapterNames
from ..base import Row, RowError, Stage
from ..prompts import checked_prompt, checked_token_ids
from .duplicates import Arrival, Duplicates, Inbox, request_key

__all__ = ["EngineClient", "EngineStage", "plain_values", "request_columns"]

METRICS = tuple(one.name for one in fields(RequestMetrics) if one.name not in ("attempt", "replica_id"))
"""Names of the metrics in the column `metrics`. The other metrics of a request have columns of their own."""


class EngineClient(Protocol):
    """Interface by which an `EngineStage` sends requests to a pool of engines; `actors.PoolClient` implements it."""

    def generate(self, requests: list[Request]) -> Iterator[EngineOutput]:
        """Runs requests, and yields the output of each one when it finishes, in the order in which they finish."""
        ...


@dataclass(slots=True)
class Asked:
    """A row and the request that it became.

    Attributes:
        row: The row.
        request: The request that the row became.
        params: Parameters of the request as text.
        key: `request_key` of the request, equal for identical requests.
    """

    row: Row
    request: Request
    params: str
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.key = request_key(self.request, self.params)


@dataclass(slots=True)
class _OpenBlock:
    """A block under way: the rows whose requests run, by request id, and the number of rows that wait for others."""

    batch_uuid: str
    start_s: float
    running: dict[str, Asked] = field(default_factory=dict)
    num_waiting: int = 0
    inbox: Inbox = field(default_factory=Inbox)

    @property
    def requests(self) -> list[Request]:
        return [asked.request for asked in self.running.values()]


class EngineStage(Stage):
    """A stage that sends the rows of a block to the engine pool and takes their outputs as they finish.

    Several blocks are under way at once (threads of one actor share a stage), so that a slow row delays only its own
    block.

    Args:
        client: The pool's client.
        adapters: The names of the model that runs, and the adapters that rows may name; other names are refused.
        duplicates: Whether identical requests run once.
        on_output: Function that the thread of a block calls with each output as it arrives.
        stop_on_error: Whether the first failed row stops the job.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        adapters: AdapterNames,
        duplicates: bool = True,
        on_output: Callable[[EngineOutput], None] | None = None,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._client = client
        self._adapters = adapters
        self._duplicates = Duplicates() if duplicates else None
        self._on_output = on_output

    def read_prompt(self, row: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
        """Returns the prompt of a row as text or as token ids; the other one of the two is None.

        Raises:
            PromptTypeError: The row has no prompt, or one of another type.
        """
        prompt_token_ids = checked_token_ids(row)
        return (checked_prompt(row), None) if prompt_token_ids is None else (None, prompt_token_ids)

    @abstractmethod
    def make_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> Request:
        """Returns the request of a row.

        Args:
            request_id: Id of the request.
            prompt: Text of the prompt; None if only its tokens are known.
            prompt_token_ids: Tokens of the prompt; None if only its text is known.
            row: Columns of the row.
        """

    @abstractmethod
    def output_columns(self, asked: Asked, output: Any) -> dict[str, Any]:
        """Returns the columns that an output adds to its row.

        Args:
            asked: The row and its request.
            output: The output, which has no error.
        """

    def run(self, rows: Sequence[Row]) -> None:
        """Runs the rows, adds the output or the error to each in place, and returns when all are finished.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
            EngineError: The pool ended without an output for a row.
        """
        for _ in self.stream(rows):
            pass

    def stream(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Runs the rows in place and yields each as soon as it is finished. Rows that cannot run come first.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
            EngineError: The pool ended without an output for a row.
        """
        block = _OpenBlock(uuid.uuid4().hex, time.monotonic())
        try:
            for index, row in enumerate(rows):
                request = None if row.error is not None else self._request(f"{block.batch_uuid}-{index}", row)
                if request is None:
                    yield row
                else:
                    self._admit(block, Asked(row, request, repr(request.params)))
            for output in self._client.generate(longest_first(block.requests)) if block.running else ():
                yield self._finish(block, output)
                yield from self._arrived(block)
            if block.running:
                raise EngineError(
                    f"the engine pool ended without an output for {len(block.running)} of {len(rows)} rows"
                )
            while block.num_waiting:
                yield self._take(block, block.inbox.get())
        finally:
            if self._duplicates is not None:
                for asked in block.running.values():
                    self._duplicates.abandon(asked.key, EngineError("the identical request of another row did not end"))

    def _admit(self, block: _OpenBlock, asked: Asked) -> None:
        """Adds a request to the requests to run, or makes its row wait for the output of an identical request."""
        if self._duplicates is not None and not self._duplicates.claim(asked.key, block.inbox, asked):
            block.num_waiting += 1
        else:
            block.running[asked.request.request_id] = asked

    def _finish(self, block: _OpenBlock, output: EngineOutput) -> Row:
        asked = block.running.pop(output.request_id)
        if self._duplicates is not None:
            self._duplicates.finish(asked.key, output)
        if self._on_output is not None:
            self._on_output(output)
        return self._completed(block, asked, output, {})

    def _arrived(self, block: _OpenBlock) -> Iterator[Row]:
        """Yields the rows that have got the output of an identical request since the last call."""
        while not block.inbox.empty():
            yield self._take(block, block.inbox.get())

    def _take(self, block: _OpenBlock, arrival: Arrival) -> Row:
        block.num_waiting -= 1
        if arrival.output is None:
            raise arrival.error or EngineError("the identical request of another row did not end")
        own = {columns.REQUEST_ID: arrival.item.request.request_id, columns.IS_DUPLICATE: True}
        return self._completed(block, arrival.item, arrival.output, own)

    def _completed(self, block: _OpenBlock, asked: Asked, output: EngineOutput, own: Mapping[str, Any]) -> Row:
        if output.error is not None:
            self.fail(asked.row, self._row_error(output), output.error.to_exception())
            return asked.row
        timing = {columns.BATCH_UUID: block.batch_uuid, columns.TIME_TAKEN: time.monotonic() - block.start_s}
        try:
            added = self.output_columns(asked, output)
        except UserError as error:
            self.fail(asked.row, RowError.from_exception(self.name, error), error)
            return asked.row
        named = asked.request.lora_request
        mark = {} if named is None else {columns.ADAPTER: named.lora_name}
        self.merge(asked.row, {**added, **timing, **mark, **own})
        return asked.row

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Runs one row alone and returns all its columns, the columns of the output included."""
        alone = Row.read(dict(row))
        self.run([alone])
        if alone.error is not None:
            raise EngineError(str(alone.error))
        return alone.data

    def _request(self, request_id: str, row: Row) -> Request | None:
        """Returns the request of a row, or None if the row is at fault; the row then holds the error."""
        try:
            return self._checked_request(request_id, row.data)
        except Exception as error:  # noqa: BLE001  # any exception from a row's values is the error of that row
            self.fail(row, RowError.from_exception(self.name, error), error)
            return None

    def _checked_request(self, request_id: str, row: Mapping[str, Any]) -> Request:
        lora_request = self._adapters.find(row.get(columns.MODEL))
        request = self.make_request(request_id, *self.read_prompt(row), row)
        request.lora_request = lora_request
        return request

    def _row_error(self, output: EngineOutput) -> RowError:
        assert output.error is not None
        error = output.error
        return RowError(self.name, error.kind, error.message, error.retryable, output.metrics.attempt)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values with lists in place of the numpy arrays that Arrow made of them."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}


def request_columns(output: EngineOutput, params_text: str) -> dict[str, Any]:
    """Returns the columns that a finished request of any kind adds to its row.

    Args:
        output: The output of the engine.
        params_text: The parameters of the request, as text.

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
