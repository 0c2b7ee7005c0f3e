"""Requests for embeddings in a batch file: `read_embedding` parses a body, `embedding_body` makes the answer."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....engine import PoolingParams
from ....engine.errors import PoolingParamsError
from ... import columns
from .fields import EMBEDDINGS
from .refusal import Refusal

FORMATS = ("float", "base64")


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A valid line of a batch file that asks for embeddings.

    Attributes:
        custom_id: The line's `custom_id`.
        model: Model name that the line asks for.
        inputs: Texts or lists of token ids to embed, at least one.
        pooling: Pooling parameters of the request.
        is_base64: Whether vectors are written as the base64 of their 32-bit floats, little-endian.
        url: Path of the endpoint.
    """

    custom_id: str
    model: str
    inputs: Sequence[str | list[int]]
    pooling: PoolingParams
    is_base64: bool = False
    url: str = EMBEDDINGS

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that the stages read: the first input as the prompt of the row, and the other inputs as a list."""
        return input_columns(self.inputs, self.pooling)

    def body(self, row: Mapping[str, Any], created_s: int) -> dict[str, Any]:
        """Returns the body of the answer, see `embedding_body`; it has no time."""
        return embedding_body(self, row)


def input_columns(inputs: Sequence[str | list[int]], pooling: PoolingParams) -> dict[str, Any]:
    """Returns the columns of a row with several prompts: the first as its prompt, and the others as a list."""
    first, *more = inputs
    name = columns.PROMPT if isinstance(first, str) else columns.TOKENIZED_PROMPT
    return {name: first, columns.MORE_PROMPTS: more, columns.POOLING_PARAMS: pooling}


def read_embedding(custom_id: str, body: Mapping[str, Any]) -> EmbeddingRequest:
    """Parses the body of a request for embeddings, whose fields were checked to have the right types.

    Args:
        custom_id: The `custom_id` of the line.
        body: The body of the line.

    Raises:
        Refusal: The body has no input, or a value that cannot be used.
    """
    if "input" not in body:
        raise Refusal("missing_required_parameter", "input is missing", "input")
    form = body.get("encoding_format", "float")
    if form not in FORMATS:
        allowed = " or ".join(map(repr, FORMATS))
        raise Refusal("invalid_value", f"encoding_format must be {allowed}; got {form!r:.80}", "encoding_format")
    try:
        pooling = PoolingParams("embed", body.get("dimensions"), body.get("use_activation"))
    except PoolingParamsError as error:
        raise Refusal("invalid_value", str(error), "dimensions") from None
    return EmbeddingRequest(custom_id, body["model"], read_inputs(body["input"]), pooling, form == "base64")


def read_inputs(given: str | list[Any]) -> list[str | list[int]]:
    """Returns the texts, or the token ids of texts, that the field `input` of a body holds.

    Raises:
        Refusal: The field holds nothing, or something else.
    """
    if given in ("", []):
        raise Refusal("invalid_value", "input is empty; it must hold at least one text", "input")
    if isinstance(given, str):
        return [given]
    if all(isinstance(one, str) for one in given):
        return given
    lists = given if isinstance(given[0], list) else [given]
    if not all(isinstance(one, list) and all(type(token_id) is int for token_id in one) for one in lists):
        message = f"input must be a text, a list of texts, token ids or lists of token ids; got {given!r:.80}"
        raise Refusal("invalid_type", message, "input")
    return lists


def embedding_body(request: EmbeddingRequest, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the body of the answer to a request: the API's `CreateEmbeddingResponse`.

    Args:
        request: The request.
        row: The row of the request after the engine, with its vectors and counts of tokens.
    """
    vectors = np.atleast_2d(np.array(row[columns.EMBEDDINGS], "<f4"))
    data = (
        [base64.b64encode(vector.tobytes()).decode() for vector in vectors] if request.is_base64 else vectors.tolist()
    )
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(data)],
        "model": request.model,
        "usage": pooling_usage(row),
    }


def pooling_usage(row: Mapping[str, Any]) -> dict[str, int]:
    """Returns the counts of tokens of a row that generates none."""
    num_tokens = row[columns.NUM_INPUT_TOKENS]
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
