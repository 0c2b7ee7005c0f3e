"""`GenerateStage`: generates text for rows, from their prompts and sampling parameters."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ....engine import CompletionOutput, GenerateRequest, RequestOutput, SamplingParams
from ....engine.errors import SamplingParamsError
from ... import columns
from ...seeds import seeded
from .engine import Asked, EngineClient, EngineStage, plain_values, request_columns


class GenerateStage(EngineStage):
    """A stage that generates text for the rows of a block.

    Args:
        client: The pool's client.
        default_params: Sampling parameters of the rows that bring none.
        job_seed: Seed of the job. A row without a seed gets one that is derived from this seed and the prompt; and from
            the identity of the row, if identical requests do not share their output.
        detokenize_later: Whether a later stage decodes the tokens to text. The engine then makes no text for the rows
            for which the later stage gives the same text.
        **settings: Settings of `EngineStage`.
    """

    name = "generate"

    def __init__(
        self,
        client: EngineClient,
        *,
        default_params: SamplingParams,
        job_seed: int = 0,
        detokenize_later: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(client, **settings)
        self._default_params = default_params
        self._job_seed = job_seed
        self._detokenize_later = detokenize_later
        self._numbers = RequestNumbers()

    def make_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> GenerateRequest:
        """Returns the request of a row, with the sampling parameters of the row. See `EngineStage.make_request`."""
        params = self._seeded(self._params(row), prompt, prompt_token_ids, row)
        if prompt is None and isinstance(row.get(columns.PROMPT), str):
            prompt = row[columns.PROMPT]
        return GenerateRequest(request_id, prompt, prompt_token_ids, params)

    def output_columns(self, asked: Asked, output: RequestOutput) -> dict[str, Any]:
        """Returns the columns that an output adds to its row. See `EngineStage.output_columns`."""
        assert isinstance(asked.request, GenerateRequest)
        return output_columns(output, asked.request.sampling_params, asked.params)

    def _seeded(
        self, params: SamplingParams, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> SamplingParams:
        shared = seeded(params, self._job_seed, prompt, prompt_token_ids)
        if self._duplicates is not None or shared is params:
            return shared
        identity = row.get(columns.ROW_ID) or row.get(columns.POSITION)
        if identity is None:  # Equal rows of a dataset without positions are told apart by the order of their arrival.
            assert shared.seed is not None
            identity = self._numbers.next(shared.seed)
        return seeded(params, self._job_seed, prompt, prompt_token_ids, identity)

    def _params(self, row: Mapping[str, Any]) -> SamplingParams:
        given = _read_json(row.get(columns.SAMPLING_PARAMS))
        if given is None:
            params = self._default_params
        elif isinstance(given, SamplingParams):
            params = given
        elif isinstance(given, Mapping):
            params = SamplingParams.from_dict(plain_values(given))
        else:
            raise SamplingParamsError(
                f"column {columns.SAMPLING_PARAMS!r} must be a dict or SamplingParams; "
                f"got {type(given).__name__} {given!r:.80}"
            )
        if self._detokenize_later and params.detokenize and _needs_text_at_the_end_only(params):
            return params.clone(detokenize=False)
        return params


def _read_json(given: Any) -> Any:
    """Returns the value of the column of parameters, parsed if it is JSON text."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise SamplingParamsError(
            f"column {columns.SAMPLING_PARAMS!r} holds text that is no JSON: {error}; got {given!r:.80}"
        ) from None


class RequestNumbers:
    """Numbers requests with the same seed in the order in which they come. Any thread may use it.

    Args:
        max_seeds: Most seeds that are remembered. Of more seeds, those that came first are forgotten.
    """

    def __init__(self, max_seeds: int = 100_000) -> None:
        self._max_seeds = max_seeds
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}

    def next(self, seed: int) -> int:
        """Returns the number of requests with this seed that came before, as far as it is remembered."""
        with self._lock:
            number = self._counts.get(seed, 0)
            self._counts[seed] = number + 1
            if len(self._counts) > self._max_seeds:
                del self._counts[next(iter(self._counts))]
            return number


def _needs_text_at_the_end_only(params: SamplingParams) -> bool:
    """Returns whether decoding the finished tokens once, with the default settings, gives the text of the row."""
    return (
        not params.stop
        and params.logprobs is None
        and params.prompt_logprobs is None
        and params.skip_special_tokens
        and not params.include_stop_str_in_output
    )


def output_columns(output: RequestOutput, params: SamplingParams, params_text: str) -> dict[str, Any]:
    """Returns the columns that a finished request adds to its row.

    Args:
        output: The output of the engine.
        params: The parameters of the request.
        params_text: The parameters as text.

    Returns:
        Column name -> value. Of several sequences, the first fills the columns that hold one sequence.
    """
    first = output.outputs[0]
    return {
        **request_columns(output, params_text),
        columns.GENERATED_TOKENS: first.token_ids,
        columns.GENERATED_TEXT: first.text if params.detokenize else None,
        columns.NUM_GENERATED_TOKENS: sum(len(one.token_ids) for one in output.outputs),
        columns.FINISH_REASON: first.finish_reason,
        columns.STOP_REASON: None if first.stop_reason is None else str(first.stop_reason),
        columns.OUTPUTS: [_sequence(one, params) for one in output.outputs] if len(output.outputs) > 1 else None,
        columns.LOGPROBS: _plain_logprobs(first.logprobs),
        columns.PROMPT_LOGPROBS: _plain_logprobs(output.prompt_logprobs),
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
