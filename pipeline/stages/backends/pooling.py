"""`PoolingStage`: computes a vector for the prompt of each row, and `ScoreStage`, which scores the pairs of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....engine import PoolingParams, PoolingRequest
from ....engine.errors import PoolingParamsError
from ... import columns
from ...pooling.answers import Answers
from ...pooling.pairs import Pairs
from .engine import Asked, EngineClient, EngineStage, plain_values, request_columns

if TYPE_CHECKING:
    from ....engine.inputs import Parsed, ParsedPrompt
    from ....engine.pooling.scoring import Scoring


class PoolingStage(EngineStage):
    """A stage that computes a vector for each prompt of a block.

    Args:
        client: The pool's client.
        answers: Makes the columns of an answer.
        params: Pooling parameters of the rows that bring none.
        task_params: Fields of the pooling parameters that the task sets, unless a row does.
        has_fixed_size: Whether the vectors of all rows have one length, so that no row may choose another.
        **settings: Settings of `EngineStage`.
    """

    name = "pooling"

    def __init__(
        self,
        client: EngineClient,
        *,
        answers: Answers,
        params: PoolingParams,
        task_params: Mapping[str, Any],
        has_fixed_size: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(client, **settings)
        self._answers = answers
        self._default_params = params
        self._task_params = task_params
        self._has_fixed_size = has_fixed_size

    def make_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> PoolingRequest:
        """Returns the request of a row, with the pooling parameters of the row. See `EngineStage.make_request`."""
        if prompt is None and isinstance(row.get(columns.PROMPT), str):
            prompt = row[columns.PROMPT]
        more = row.get(columns.MORE_PROMPTS) or ()
        return PoolingRequest(request_id, prompt, prompt_token_ids, self._params(row), more_prompts=more)

    def output_columns(self, asked: Asked, output: Any) -> dict[str, Any]:
        """Returns the columns that an output adds to its row. See `EngineStage.output_columns`."""
        return {
            **request_columns(output, asked.params),
            **self._answers.of(output, asked.row.data),
            columns.FINISH_REASON: "stop",
        }

    def _params(self, row: Mapping[str, Any]) -> PoolingParams:
        given = row.get(columns.POOLING_PARAMS)
        if given is None:
            return self._default_params
        params = self._read_params(given)
        if self._has_fixed_size and params.dimensions not in (None, self._default_params.dimensions):
            raise PoolingParamsError(
                f"dimensions={params.dimensions}, but the vectors of all rows have one length here; set dimensions in "
                "the pooling_params of the processor"
            )
        return params if params.dimensions else replace(params, dimensions=self._default_params.dimensions)

    def _read_params(self, given: Any) -> PoolingParams:
        if isinstance(given, PoolingParams):
            task = self._task_params.get("task")
            return replace(given, task=task) if given.task is None else given
        if isinstance(given, Mapping):
            return PoolingParams.from_dict({**self._task_params, **plain_values(given)})
        raise PoolingParamsError(
            f"column {columns.POOLING_PARAMS!r} must be a dict or PoolingParams; got {type(given).__name__} "
            f"{given!r:.80}"
        )


class ScoreStage(PoolingStage):
    """A stage that scores the pairs of texts of each row.

    Args:
        client: The pool's client.
        scoring: Makes prompts of pairs.
        names: Columns of the first and of the second texts; None for the usual ones.
        **settings: Settings of `PoolingStage`.
    """

    def __init__(
        self, client: EngineClient, *, scoring: Scoring, names: tuple[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(client, **settings)
        self._scoring = scoring
        self._names = names

    def read_prompt(self, row: Mapping[str, Any]) -> tuple[str | None, list[int] | None]:
        """Returns nothing: the prompts are made of pairs. See `EngineStage.read_prompt`."""
        return None, None

    def make_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> PoolingRequest:
        """Returns one request with the prompts of all pairs of a row. See `EngineStage.make_request`."""
        pairs = Pairs.of(row, self._names)
        first, *more = map(_prompt_of, self._scoring.prompts(pairs.texts))
        return PoolingRequest(
            request_id,
            first.text,
            first.token_ids,
            self._params(row),
            more_prompts=more,
            num_first_tokens=first.num_first_tokens,
        )


def _prompt_of(parsed: Parsed) -> ParsedPrompt:
    """Returns a prompt; raises the error of one that cannot be run."""
    if isinstance(parsed, Exception):
        raise parsed
    return parsed
