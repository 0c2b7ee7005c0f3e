"""`PoolingStage`: computes a vector for the prompt of each row, an embedding or the scores of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....engine import PoolingParams, PoolingRequest
from ....engine.errors import PoolingParamsError
from ... import columns
from .engine import Asked, EngineStage, plain_values, request_columns


class PoolingStage(EngineStage):
    """A stage that computes a vector for each prompt of a block. Its arguments are those of `EngineStage`."""

    name = "pooling"

    def make_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int] | None, row: Mapping[str, Any]
    ) -> PoolingRequest:
        """Returns the request of a row, with the pooling parameters of the row. See `EngineStage.make_request`."""
        if prompt is None and isinstance(row.get(columns.PROMPT), str):
            prompt = row[columns.PROMPT]
        more = row.get(columns.MORE_PROMPTS) or ()
        return PoolingRequest(request_id, prompt, prompt_token_ids, _params(row), more_prompts=more)

    def output_columns(self, asked: Asked, output: Any) -> dict[str, Any]:
        """Returns the columns that an output adds to its row. See `EngineStage.output_columns`."""
        return {
            **request_columns(output, asked.params),
            columns.EMBEDDINGS: output.outputs.data.tolist(),
            columns.FINISH_REASON: "stop",
        }


def _params(row: Mapping[str, Any]) -> PoolingParams:
    given = row.get(columns.POOLING_PARAMS)
    if given is None or isinstance(given, PoolingParams):
        return given or PoolingParams()
    if isinstance(given, Mapping):
        return PoolingParams.from_dict(plain_values(given))
    raise PoolingParamsError(
        f"column {columns.POOLING_PARAMS!r} must be a dict or PoolingParams; got {type(given).__name__} {given!r:.80}"
    )
