"""Requests for classes in a batch file, as vLLM's `/classify` takes and answers them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....engine import PoolingParams
from ... import columns
from .embedding import input_columns, pooling_usage, read_inputs
from .refusal import Refusal


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """A valid line of a batch file that asks for the classes of texts.

    Attributes:
        custom_id: The line's `custom_id`.
        model: Model name that the line asks for.
        url: Path of the endpoint.
        inputs: Texts or lists of token ids to classify, at least one.
        pooling: Pooling parameters of the request.
    """

    custom_id: str
    model: str
    url: str
    inputs: Sequence[str | list[int]]
    pooling: PoolingParams

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that the stages read."""
        return input_columns(self.inputs, self.pooling)

    def body(self, row: Mapping[str, Any], created_s: int) -> dict[str, Any]:
        """Returns the body of the answer: the probabilities of the classes of each text, and the best label.

        Args:
            row: The row of the request after the engine.
            created_s: Time of the answer, in seconds since 1970.
        """
        probs = np.atleast_2d(np.array(row[columns.PROBS], np.float32)).tolist()
        labels = row[columns.LABEL] if isinstance(row[columns.LABEL], list) else [row[columns.LABEL]]
        data = [
            {"index": index, "label": label, "probs": one, "num_classes": len(one)}
            for index, (label, one) in enumerate(zip(labels, probs, strict=True))
        ]
        head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": created_s, "model": self.model}
        return {**head, "data": data, "usage": pooling_usage(row)}


def read_classify(custom_id: str, url: str, body: Mapping[str, Any]) -> ClassifyRequest:
    """Parses the body of a request for classes, whose fields were checked to have the right types.

    Args:
        custom_id: The `custom_id` of the line.
        url: Path of the endpoint.
        body: The body of the line.

    Raises:
        Refusal: The body has no input, or a value that cannot be used.
    """
    if "input" not in body:
        raise Refusal("missing_required_parameter", "input is missing", "input")
    pooling = PoolingParams("classify", use_activation=body.get("use_activation"))
    return ClassifyRequest(custom_id, body["model"], url, read_inputs(body["input"]), pooling)
