"""Requests for scores in a batch file: `/score` as vLLM has it, and `/rerank` as Jina, Cohere and vLLM have it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....engine import PoolingParams
from ... import columns
from .embedding import pooling_usage
from .fields import RERANK
from .refusal import Refusal

PAIR_NAMES = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items"), ("queries", "documents"))
"""Names of the two fields with the texts of a `/score` body."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A valid line of a batch file that asks for the scores of pairs of texts.

    Attributes:
        custom_id: The line's `custom_id`.
        model: Model name that the line asks for.
        url: Path of the endpoint.
        first: First texts of the pairs: one, or as many as there are second texts.
        second: Second texts of the pairs, at least one.
        pooling: Pooling parameters of the request.
        top_n: Most documents of a reranking to return; 0 for all.
        returns_documents: Whether the answer to a reranking holds the documents.
    """

    custom_id: str
    model: str
    url: str
    first: Sequence[str]
    second: Sequence[str]
    pooling: PoolingParams
    top_n: int = 0
    returns_documents: bool = True

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that the stages read."""
        return {columns.TEXT_1: self.first, columns.TEXT_2: self.second, columns.POOLING_PARAMS: self.pooling}

    def body(self, row: Mapping[str, Any], created_s: int) -> dict[str, Any]:
        """Returns the body of the answer: scores in the order of the pairs, or documents with the best one first.

        Args:
            row: The row of the request after the engine.
            created_s: Time of the answer, in seconds since 1970.
        """
        scores, usage = row[columns.SCORE], pooling_usage(row)
        if self.url in RERANK:
            return {"id": _new_id("rerank"), "model": self.model, "usage": usage, "results": self._ranked(scores)}
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        head = {"id": _new_id("score"), "object": "list", "created": created_s, "model": self.model}
        return {**head, "data": data, "usage": usage}

    def _ranked(self, scores: Sequence[float]) -> list[dict[str, Any]]:
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top_n or None]
        texts = [{"document": {"text": text}} if self.returns_documents else {} for text in self.second]
        return [{"index": index, **texts[index], "relevance_score": scores[index]} for index in order]


def read_score(custom_id: str, url: str, body: Mapping[str, Any]) -> ScoreRequest:
    """Parses the body of a request for scores or for a ranking, whose fields were checked to have the right types.

    Args:
        custom_id: The `custom_id` of the line.
        url: Path of the endpoint.
        body: The body of the line.

    Raises:
        Refusal: A text is missing, or a value cannot be used.
    """
    first_name, second_name = ("query", "documents") if url in RERANK else _pair_names(body)
    first, second = (_texts(body, name) for name in (first_name, second_name))
    if len(first) not in (1, len(second)):
        message = f"{first_name} must hold one text, or as many as {second_name}; got {len(first)} and {len(second)}"
        raise Refusal("invalid_value", message, first_name)
    top_n = body.get("top_n", 0)
    if top_n < 0:
        raise Refusal("invalid_value", f"top_n must be 0, for all documents, or more; got {top_n}", "top_n")
    pooling = PoolingParams(use_activation=body.get("use_activation"))
    returns_documents = body.get("return_documents", True)
    return ScoreRequest(custom_id, body["model"], url, first, second, pooling, top_n, returns_documents)


def _pair_names(body: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the names of the two fields with texts; raises `Refusal` unless the body has exactly these two."""
    given = {name for names in PAIR_NAMES for name in names if name in body}
    found = next((names for names in PAIR_NAMES if given == set(names)), None)
    if found is None:
        allowed = ", or ".join(" and ".join(names) for names in PAIR_NAMES)
        code = "invalid_value" if len(given) > 1 else "missing_required_parameter"
        raise Refusal(code, f"the texts of pairs are {allowed}; got {', '.join(sorted(given)) or 'none'}", "text_1")
    return found


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    if name not in body:
        raise Refusal("missing_required_parameter", f"{name} is missing", name)
    given = body[name] if isinstance(body[name], list) else [body[name]]
    if not given:
        raise Refusal("invalid_value", f"{name} is empty; it must hold at least one text", name)
    return [_text_of(one, name if one is body[name] else f"{name}[{at}]") for at, one in enumerate(given)]


def _text_of(given: Any, place: str) -> str:
    if isinstance(given, dict) and "content" in given:
        raise Refusal("unsupported_value", f"{place} has content in parts; only text is supported", place)
    text = given.get("text") if isinstance(given, dict) else given
    if not isinstance(text, str):
        raise Refusal("invalid_type", f'{place} must be a string or {{"text": ...}}; got {given!r:.80}', place)
    return text


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
