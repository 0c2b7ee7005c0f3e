"""The engine's side of a row: a prompt becomes a request of the pool, and its output columns of the row.

The stage holds no model: it is a thin client of the engine pool, so a restart of it costs nothing.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from ...engine import CompletionOutput, GenerateRequest, RequestOutput, SamplingParams
from ...engine.errors import ConfigError, EngineError, SamplingParamsError
from .. import columns
from ..seeds import seeded
from .base import Row, RowError, Stage
from .prompts import checked_prompt, checked_token_ids


class GenerateClient(Protocol):
    """What the stage needs of a pool's client; `actors.PoolClient` is one."""

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        """Yields the output of each request once, as they finish."""
        ...


class GenerateStage(Stage):
    """Sends the rows of a block to the engine pool and takes their outputs as they finish.

    Several blocks are under way at once (threads of one actor share a stage), so that a slow row of one holds up
    nothing but its own block.

    Args:
        client: The pool's client.
        default_params: Sampling parameters of the rows that bring none.
        model: The model that runs; a row that names another one is refused.
        job_seed: Seed from which rows that bring none derive theirs.
        detokenize_later: Whether a later stage makes the text of the rows that allow it.
        on_output: Called with each output as it arrives, from the thread of its block.
        stop_on_error: Whether the first failed row stops the job.
    """

    name = "generate"

    def __init__(
        self,
        client: GenerateClient,
        *,
        default_params: SamplingParams,
        model: str,
        job_seed: int = 0,
        detokenize_later: bool = False,
        on_output: Callable[[RequestOutput], None] | None = None,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._client = client
        self._default_params = default_params
        self._model = model
        self._job_seed = job_seed
        self._detokenize_later = detokenize_later
        self._on_output = on_output

    def run(self, rows: Sequence[Row]) -> None:
        """Generates for the rows in place, whatever the order in which they finish.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
            EngineError: The pool ended without an output for a row.
        """
        batch_uuid = uuid.uuid4().hex
        waiting: dict[str, tuple[Row, GenerateRequest]] = {}
        for index, row in enumerate(rows):
            if row.error is None and (request := self._request(f"{batch_uuid}-{index}", row)) is not None:
                waiting[request.request_id] = (row, request)
        start_s = time.monotonic()
        requests = in_good_order(request for _, request in waiting.values())
        for output in self._client.generate(requests) if requests else ():
            row, request = waiting.pop(output.request_id)
            if self._on_output is not None:
                self._on_output(output)
            if output.error is not None:
                self.fail(row, _row_error(output), output.error.to_exception())
                continue
            timing = {columns.BATCH_UUID: batch_uuid, columns.TIME_TAKEN: time.monotonic() - start_s}
            self.merge(row, {**output_columns(output, request.sampling_params), **timing})
        if waiting:
            raise EngineError(f"the engine pool ended without an output for {len(waiting)} of {len(rows)} rows")

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Generates for one row alone."""
        alone = Row.read(dict(row))
        self.run([alone])
        if alone.error is not None:
            raise EngineError(str(alone.error))
        return alone.data

    def _request(self, request_id: str, row: Row) -> GenerateRequest | None:
        """Makes the row's request; None if the row cannot be one and now holds the reason."""
        try:
            return self._checked_request(request_id, row.data)
        except Exception as error:  # noqa: BLE001  # whatever the values of a row break is that row's error
            self.fail(row, RowError.from_exception(self.name, error), error)
            return None

    def _checked_request(self, request_id: str, row: Mapping[str, Any]) -> GenerateRequest:
        if row.get(columns.MODEL) not in (None, self._model):
            raise ConfigError(
                f"column {columns.MODEL!r} asks for {row[columns.MODEL]!r}, but adapters chosen by row are not there "
                f"yet: all rows run on {self._model!r}; let preprocess set the column to None"
            )
        prompt_token_ids = checked_token_ids(row)
        prompt = checked_prompt(row) if prompt_token_ids is None else None
        params = seeded(self._params(row), self._job_seed, prompt, prompt_token_ids)
        if prompt is None and isinstance(row.get(columns.PROMPT), str):
            prompt = row[columns.PROMPT]
        return GenerateRequest(request_id, prompt, prompt_token_ids, params)

    def _params(self, row: Mapping[str, Any]) -> SamplingParams:
        given = row.get(columns.SAMPLING_PARAMS)
        if given is None:
            params = self._default_params
        elif isinstance(given, SamplingParams):
            params = given
        elif isinstance(given, Mapping):
            params = SamplingParams.from_dict(_plain(given))
        else:
            raise SamplingParamsError(
                f"column {columns.SAMPLING_PARAMS!r} must be a dict or SamplingParams; "
                f"got {type(given).__name__} {given!r:.80}"
            )
        if self._detokenize_later and params.detokenize and _needs_text_at_the_end_only(params):
            return params.clone(detokenize=False)
        return params


def in_good_order(requests: Iterable[GenerateRequest]) -> list[GenerateRequest]:
    """Puts long outputs first, as `LLM` does: a block, and the last one of a job above all, ends sooner.

    Args:
        requests: The requests of a block; an output without a limit counts as longest.

    Returns:
        The same requests; those of one length keep their order.
    """
    return sorted(requests, key=lambda request: -(request.sampling_params.max_tokens or sys.maxsize))


def _needs_text_at_the_end_only(params: SamplingParams) -> bool:
    """Whether the default way to make text, used once on the finished tokens, is what the row asks for."""
    return (
        not params.stop
        and params.logprobs is None
        and params.prompt_logprobs is None
        and params.skip_special_tokens
        and not params.include_stop_str_in_output
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns numpy arrays into the lists they were before they went through Arrow."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}


def _row_error(output: RequestOutput) -> RowError:
    assert output.error is not None
    error = output.error
    return RowError(GenerateStage.name, error.kind, error.message, error.retryable, output.metrics.attempt)


def output_columns(output: RequestOutput, params: SamplingParams) -> dict[str, Any]:
    """Returns the columns that a finished request adds to its row.

    Args:
        output: What the engine returned.
        params: The parameters it ran with.

    Returns:
        Column name -> value; the columns of a single sequence are those of the first.
    """
    first = output.outputs[0]
    prompt_token_ids = output.prompt_token_ids or []
    times = asdict(output.metrics)
    return {
        columns.REQUEST_ID: output.request_id,
        columns.PARAMS: repr(params),
        columns.PROMPT: output.prompt,
        columns.PROMPT_TOKEN_IDS: prompt_token_ids,
        columns.NUM_INPUT_TOKENS: len(prompt_token_ids),
        columns.NUM_CACHED_TOKENS: output.num_cached_tokens or 0,
        columns.GENERATED_TOKENS: first.token_ids,
        columns.GENERATED_TEXT: first.text if params.detokenize else None,
        columns.NUM_GENERATED_TOKENS: sum(len(one.token_ids) for one in output.outputs),
        columns.FINISH_REASON: first.finish_reason,
        columns.STOP_REASON: None if first.stop_reason is None else str(first.stop_reason),
        columns.OUTPUTS: [_sequence(one, params) for one in output.outputs] if len(output.outputs) > 1 else None,
        columns.LOGPROBS: _plain_logprobs(first.logprobs),
        columns.PROMPT_LOGPROBS: _plain_logprobs(output.prompt_logprobs),
        columns.ATTEMPT: times.pop("attempt"),
        columns.REPLICA_ID: times.pop("replica_id"),
        columns.METRICS: times,
    }


def _sequence(one: CompletionOutput, params: SamplingParams) -> dict[str, Any]:
    return {
        "index": one.index,
        "text": one.text if params.detokenize else None,
        "token_ids": one.token_ids,
        "finish_reason": one.finish_reason,
        "stop_reason": None if one.stop_reason is None else str(one.stop_reason),
        "cumulative_logprob": one.cumulative_logprob,
        "logprobs": _plain_logprobs(one.logprobs),
    }


def _plain_logprobs(positions: Sequence[Mapping[int, Any] | None] | None) -> list[dict[int, Any] | None] | None:
    """Returns log-probabilities as dicts: per position, token id -> logprob, rank, decoded_token."""
    if positions is None:
        return None
    return [None if one is None else {token_id: asdict(value) for token_id, value in one.items()} for one in positions]
