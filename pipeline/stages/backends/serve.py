"""`ServeDeploymentStage`: calls a deployment of Ray Serve with the columns `method` and `request_kwargs`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.exceptions import RayTaskError

from ....engine.errors import PromptTypeError, UserError, unknown_key_message
from ... import columns
from ...errors import DeploymentError
from ..base import RowError
from .request import RequestId, RequestStage

ROW_ERRORS = (ValueError, TypeError, ValidationError, TimeoutError)
"""Errors that a deployment raises for a bad request. For any other error, no row is at fault."""


class ServeDeploymentStage(RequestStage):
    """A stage that calls a method of a Ray Serve deployment for each row and merges the answer into the row.

    An answer is a dict or a pydantic model; a stream answers with its first item. A request that the deployment
    refuses, or that takes too long, fails its row. A deployment that died, is overloaded or cannot be reached ends the
    job.

    Args:
        handle: The deployment's handle.
        dtype_mapping: Value of the column `dtype` -> class of the request; rows without this column send a dict.
        stream: Whether the method answers with a stream, as the methods of Ray Serve LLM do.
        request_timeout_s: Most seconds until the answer; None for no limit.
        max_concurrent_requests: Most requests under way at once.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "serve_deployment"

    def __init__(
        self,
        handle: Any,
        *,
        dtype_mapping: Mapping[str, type[Any]] | None = None,
        stream: bool = True,
        request_timeout_s: float | None = None,
        max_concurrent_requests: int = 256,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(max_concurrent_requests, stop_on_error=stop_on_error)
        self._handle = handle.options(stream=stream)
        self._types = dict(dtype_mapping or {})
        self._stream = stream
        self._timeout_s = request_timeout_s

    async def request(self, request_id: RequestId, row: Mapping[str, Any]) -> dict[str, Any]:
        """Calls the deployment for one row, and returns its answer as columns."""
        method, request = self._request(request_id, row)
        start_s = time.monotonic()
        response = getattr(self._handle, method).remote(request)
        try:
            answer = await asyncio.wait_for(self._first(response), self._timeout_s)
        except TimeoutError:
            raise TimeoutError(f"{method} did not answer within {self._timeout_s} s") from None
        finally:
            # This frees the replica if the request was interrupted, and does nothing after an answer.
            response.cancel()
        added = {
            columns.REQUEST_ID: str(request_id),
            columns.BATCH_UUID: request_id.batch_uuid,
            columns.SERVE_TIME_TAKEN: time.monotonic() - start_s,
        }
        return {**_answer_columns(method, answer), **added}

    def describe(self, error: Exception) -> RowError:
        """Returns the error of a row, if the row is at fault.

        Raises:
            DeploymentError: The deployment failed, and no row is at fault.
        """
        cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else error
        if not isinstance(cause, ROW_ERRORS):
            raise DeploymentError(f"the deployment failed with {type(error).__name__}: {error}") from error
        return super().describe(cause)

    async def _first(self, response: Any) -> Any:
        if not self._stream:
            return await response
        try:
            return await anext(response)
        except StopAsyncIteration:
            raise UserError("the deployment's stream ended before its first item") from None

    def _request(self, request_id: RequestId, row: Mapping[str, Any]) -> tuple[str, Any]:
        method, kwargs, name = (row.get(key) for key in (columns.METHOD, columns.REQUEST_KWARGS, columns.DTYPE))
        if not isinstance(method, str):
            raise PromptTypeError(f"column {columns.METHOD!r} must name a method of the deployment; got {method!r:.80}")
        if not isinstance(kwargs, Mapping):
            raise PromptTypeError(
                f"column {columns.REQUEST_KWARGS!r} must be a dict; got {type(kwargs).__name__} {kwargs!r:.80}"
            )
        request = {"request_id": str(request_id), "idx_in_batch": request_id.index, **kwargs}
        if name is None:
            return method, request
        if name not in self._types:
            raise PromptTypeError(unknown_key_message("dtype_mapping", name, self._types))
        return method, self._types[name](**request)


def connect(deployment_name: str, app_name: str) -> Any:
    """Returns the handle with which a process calls a Ray Serve deployment.

    Args:
        deployment_name: Name of the deployment.
        app_name: Name of its application.
    """
    from ray import serve

    return serve.get_deployment_handle(deployment_name, app_name)


def _answer_columns(method: str, answer: Any) -> Mapping[str, Any]:
    columns = answer.model_dump() if isinstance(answer, BaseModel) else answer
    if not isinstance(columns, Mapping):
        raise UserError(f"{method} must answer with a dict or a pydantic model; got {type(answer).__name__}")
    return columns
