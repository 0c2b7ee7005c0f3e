"""The engine's side of a row: a prompt becomes a request of the pool, and its output columns of the row.

The stage holds no model: it is a thin client of the engine pool, so a restart of it costs nothing.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from ...engine import CompletionOutput, GenerateRequest, RequestOutput, SamplingParams
from ...engine.errors import ConfigError, EngineError, SamplingParamsError
from ...engine.outputs import RequestMetrics
from .. import columns
from ..seeds import seeded
from .base import Row, RowError, Stage
from .duplicates import Arrival, Duplicates, Inbox, request_key
from .prompts import checked_prompt, checked_token_ids

METRICS = tuple(one.name for one in fields(RequestMetrics) if one.name not in ("attempt", "replica_id"))
"""What of a request's metrics is in the column of that name; the others have columns of their own."""


class GenerateClient(Protocol):
    """What the stage needs of a pool's client; `actors.PoolClient` is one."""

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        """Yields the output of each request once, as they finish."""
        ...


@dataclass(slots=True)
class _Asked:
    """A row and its request; `params` are its parameters as text, `key` is what identical requests share."""

    row: Row
    request: GenerateRequest
    params: str
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.key = request_key(self.request, self.params)


@dataclass(slots=True)
class _Call:
    """The rows of a block under way: those that run, by request id, and how many wait for identical ones."""

    batch_uuid: str
    start_s: float
    running: dict[str, _Asked] = field(default_factory=dict)
    num_waiting: int = 0
    inbox: Inbox = field(default_factory=Inbox)

    @property
    def requests(self) -> list[GenerateRequest]:
        return [asked.request for asked in self.running.values()]


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
        duplicates: Whether identical requests run once.
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
        duplicates: bool = True,
        on_output: Callable[[RequestOutput], None] | None = None,
        stop_on_error: bool = False,
    ) -> None:
        super().__init__(stop_on_error=stop_on_error)
        self._client = client
        self._default_params = default_params
        self._model = model
        self._job_seed = job_seed
        self._detokenize_later = detokenize_later
        self._duplicates = Duplicates() if duplicates else None
        self._on_output = on_output

    def run(self, rows: Sequence[Row]) -> None:
        """Generates for the rows in place, whatever the order in which they finish.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
            EngineError: The pool ended without an output for a row.
        """
        for _ in self.stream(rows):
            pass

    def stream(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Generates for the rows in place and yields each as soon as it is finished, and first those that cannot run.

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
                    self._admit(call, _Asked(row, request, repr(request.sampling_params)))
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

    def _admit(self, call: _Call, asked: _Asked) -> None:
        """Decides whether a request runs or waits for one that is identical."""
        if self._duplicates is not None and not self._duplicates.claim(asked.key, call.inbox, asked):
            call.num_waiting += 1
        else:
            call.running[asked.request.request_id] = asked

    def _finish(self, call: _Call, output: RequestOutput) -> Row:
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

    def _completed(self, call: _Call, asked: _Asked, output: RequestOutput, own: Mapping[str, Any]) -> Row:
        if output.error is not None:
            self.fail(asked.row, _row_error(output), output.error.to_exception())
            return asked.row
        timing = {columns.BATCH_UUID: call.batch_uuid, columns.TIME_TAKEN: time.monotonic() - call.start_s}
        added = output_columns(output, asked.request.sampling_params, asked.params)
        self.merge(asked.row, {**added, **timing, **own})
        return asked.row

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


def _place(request: GenerateRequest) -> tuple[int, list[int], str]:
    prompt = (request.prompt_token_ids, "") if request.prompt_token_ids is not None else ([], request.prompt or "")
    return (-(request.sampling_params.max_tokens or sys.maxsize), *prompt)


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


def output_columns(output: RequestOutput, params: SamplingParams, params_text: str) -> dict[str, Any]:
    """Returns the columns that a finished request adds to its row.

    Args:
        output: What the engine returned.
        params: The parameters it ran with.
        params_text: The same as text.

    Returns:
        Column name -> value; the columns of a single sequence are those of the first.
    """
    first = output.outputs[0]
    prompt_token_ids = output.prompt_token_ids or []
    times = {name: getattr(output.metrics, name) for name in METRICS}
    return {
        columns.REQUEST_ID: output.request_id,
        columns.PARAMS: params_text,
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
        columns.ATTEMPT: output.metrics.attempt,
        columns.REPLICA_ID: output.metrics.replica_id,
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
