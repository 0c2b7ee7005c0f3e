"""`RequestStage`: the base of stages that send requests to a server, with a coroutine per row on one event loop."""

from __future__ import annotations

import asyncio
import threading
import uuid
from abc import abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..base import Row, RowError, Stage, checked_columns

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RequestId:
    """The id of a request.

    Attributes:
        batch_uuid: Id of the block that the row came with.
        index: Index of the row in the block.
    """

    batch_uuid: str
    index: int

    def __str__(self) -> str:
        return f"{self.batch_uuid}-{self.index}"


class DescribedError(Exception):
    """An exception that carries a `RowError`, with more details than the exception that was caught.

    Attributes:
        error: The row's error.
    """

    def __init__(self, error: RowError) -> None:
        super().__init__(str(error))
        self.error = error


class RequestStage(Stage):
    """A stage that sends a request for each row, and waits for many answers at once.

    Threads of one actor share the stage, with a block each. The rows of all blocks share one event loop and one limit
    on the requests under way: a row is sent as soon as the limit allows, whichever block it came from.

    Args:
        max_concurrent_requests: Most requests under way at once, including requests that wait to be sent again.
        stop_on_error: Whether the first failed row stops the job.
    """

    def __init__(self, max_concurrent_requests: int, *, stop_on_error: bool = False) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._places = asyncio.Semaphore(max_concurrent_requests)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True)
        self._thread.start()

    @abstractmethod
    async def request(self, request_id: RequestId, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Sends the request of one row and returns the columns to merge into it; an exception goes to `describe`."""

    def describe(self, error: Exception) -> RowError:
        """Returns the error of a row. A subclass raises instead if no row is at fault, which ends the job.

        Args:
            error: The exception that `request` raised.
        """
        return error.error if isinstance(error, DescribedError) else RowError.from_exception(self.name, error)

    def run_batch(self, rows: Sequence[Row]) -> None:
        """Sends the requests of all rows at once and returns when the last has its answer.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
        """
        self.wait(self._ask_all(rows))

    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Sends the request of one row alone and returns the columns to merge into the row."""
        return self.wait(self.request(RequestId(uuid.uuid4().hex, 0), row))

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine on the event loop of the stage, and waits for its result in the calling thread.

        Args:
            work: The coroutine.

        Returns:
            The result of the coroutine.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Ends the event loop. The caller makes sure that no request is under way."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask_all(self, rows: Sequence[Row]) -> None:
        batch_uuid = uuid.uuid4().hex
        tasks = [asyncio.ensure_future(self._ask(RequestId(batch_uuid, index), row)) for index, row in enumerate(rows)]
        try:
            await asyncio.gather(*tasks)
        finally:
            # Unfinished tasks exist only if a row has stopped the job.
            for task in tasks:
                task.cancel()

    async def _ask(self, request_id: RequestId, row: Row) -> None:
        async with self._places:
            try:
                columns = checked_columns(self.name, await self.request(request_id, row.data))
            except Exception as error:  # noqa: BLE001  # any exception of a request is the error of its row
                self.fail(row, self.describe(error), error)
            else:
                self.merge(row, columns)
