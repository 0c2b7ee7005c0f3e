"""Parses a line of a batch file: `RequestReader` returns the request, or the error of the line. It runs no request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from pydantic_core import from_json

from ....engine import SamplingParams, StructuredOutputsParams
from ....engine.errors import SamplingParamsError, unknown_key_message
from ... import columns
from ...files.storage import Storage
from ...seeds import MAX_SEED
from ...stages.adapters import AdapterNames
from .classification import ClassifyRequest, read_classify
from .constraints import is_forced, read_constraint
from .embedding import EmbeddingRequest, read_embedding
from .fields import (
    COMPLETIONS,
    ENDPOINTS,
    ENDPOINTS_OF,
    FIELDS_OF,
    KINDS,
    LINE_FIELDS,
    RESPONSES,
    BodyField,
)
from .line_error import LineError
from .messages import read_messages, read_template_kwargs, read_tools
from .refusal import Refusal, check_kind
from .responses_body import chat_body, num_top_logprobs
from .scoring import ScoreRequest, read_score

BOM = b"\xef\xbb\xbf"

LEAST_TOP_P = 1e-6
"""Value of `top_p` that keeps only the most probable token. `SamplingParams` does not take 0."""

MAX_LISTED = 10
"""Most names of adapters that an error lists."""

MAX_TOKENS_OF_COMPLETION = 16
"""OpenAI's default of `max_tokens` for completions. Other answers end at the context length by default."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A valid line of a batch file that asks for generated text.

    Attributes:
        custom_id: The `custom_id` of the line.
        url: Path of the endpoint.
        model: Model name that the line asks for.
        prompt: Column name -> value, for the columns that hold the prompt.
        sampling: Sampling parameters of the request.
        echo: Whether the text of the answer begins with the prompt.
        num_top: Number of likely tokens to report beside each token; None for no log-probabilities.
        is_forced: Whether the answer must be a list of tool calls and nothing else.
        max_tool_calls: Most tool calls of an answer; None for any number.
        body: Body of the line without null fields and its input, if the answer repeats fields of it; else empty.
    """

    custom_id: str
    url: str
    model: str
    prompt: Mapping[str, Any]
    sampling: SamplingParams
    echo: bool = False
    num_top: int | None = None
    is_forced: bool = False
    max_tool_calls: int | None = None
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that the stages read: the prompt and the sampling parameters."""
        return {**self.prompt, columns.SAMPLING_PARAMS: self.sampling}


PooledRequest: TypeAlias = EmbeddingRequest | ClassifyRequest | ScoreRequest
"""A valid line of a batch file that asks for no text."""


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Parses the lines of one batch file.

    Attributes:
        models: Names of the model itself that lines may ask for.
        defaults: Name -> value of the sampling parameters that apply where a body leaves them out.
        seed: Seed of the batch. A line that samples and gives no seed gets one that is derived from this seed and the
            `custom_id`. Equal bodies therefore draw different answers, as with OpenAI, and a rerun repeats each answer.
        task: Task of the engine, `"generate"`, `"embed"`, `"score"` or `"classify"`. Lines for endpoints of another
            task are errors.
        adapters: The adapters that lines may ask for beside the model itself.
    """

    models: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    task: str = "generate"
    adapters: AdapterNames = field(default_factory=lambda: AdapterNames(("",)))

    def read(self, line: bytes) -> BatchRequest | PooledRequest | LineError:
        """Parses a line.

        Args:
            line: Bytes of the line, as in the file.

        Returns:
            The request, or the error of a line that is not a valid request.
        """
        custom_id = None
        try:
            values = parse_object(line)
            custom_id = custom_id_of(values)
            body = _checked_line(values)
        except Refusal as refusal:
            return replace(refusal.error, custom_id=custom_id, status=None)
        try:
            return self._any_request(values["custom_id"], values["url"], body)
        except Refusal as refusal:
            return replace(refusal.error, custom_id=custom_id)

    def adapter_of(self, model: str) -> str | None:
        """Returns the name of the adapter that a valid line asks for; None for the model itself.

        Args:
            model: Model name that the line asks for.
        """
        return None if model in self.models else model

    def _any_request(self, custom_id: str, url: str, body: dict[str, Any]) -> BatchRequest | PooledRequest:
        if url not in ENDPOINTS_OF[self.task]:
            message = (
                f"this file is one of {KINDS[self.task]}, as its first request says; move this line to another file"
            )
            raise Refusal("unsupported_endpoint", message, "url")
        known = FIELDS_OF[url]
        given = {name: value for name, value in body.items() if value is not None}
        for name, value in given.items():
            _check_field(known, name, value)
        self._check_model(given)
        if self.task == "embed":
            return read_embedding(custom_id, given)
        if self.task == "score":
            return read_score(custom_id, url, given)
        if self.task == "classify":
            return read_classify(custom_id, url, given)
        return self._request(custom_id, url, given)

    def _request(self, custom_id: str, url: str, given: dict[str, Any]) -> BatchRequest:
        asked = chat_body(given) if url == RESPONSES else given
        prompt = _completion_columns(given) if url == COMPLETIONS else _chat_columns(asked)
        num_top = _num_top(url, given)
        return BatchRequest(
            custom_id,
            url,
            given["model"],
            prompt,
            self._seeded(self._sampling(url, given, num_top, read_constraint(asked)), custom_id),
            echo=_checked_echo(given, num_top),
            num_top=num_top,
            is_forced=is_forced(given),
            max_tool_calls=None if given.get("parallel_tool_calls", True) else 1,
            body={name: value for name, value in given.items() if name != "input"} if url == RESPONSES else {},
        )

    def _check_model(self, body: Mapping[str, Any]) -> None:
        model = _required(body, "model")
        if model not in self.models and not self.adapters.has(model):
            served = ", ".join(map(repr, [*self.models, *list(self.adapters.modules)[:MAX_LISTED]]))
            message = f"model {model!r} is not served here, but {served}; name it with --served-model-name if it is"
            raise Refusal("model_not_found", message, "model", status=404)

    def _sampling(
        self, url: str, body: Mapping[str, Any], num_top: int | None, constraint: StructuredOutputsParams | None
    ) -> SamplingParams:
        known = FIELDS_OF[url]
        given = {name: value for name, value in body.items() if known[name].use == "sampling"}
        if len({given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}) > 1:
            message = "max_tokens and max_completion_tokens differ; they are two names of one limit, keep one"
            raise Refusal("invalid_value", message, "max_completion_tokens")
        defaults = {"max_tokens": MAX_TOKENS_OF_COMPLETION if url == COMPLETIONS else None, **self.defaults}
        values = {known[name].target: value for name, value in given.items()}
        if values.get("top_p") == 0:  # OpenAI's service takes 0 too: the most probable token is always drawn.
            values["top_p"] = LEAST_TOP_P
        try:
            return SamplingParams(**{**defaults, **values, "logprobs": num_top, "structured_outputs": constraint})
        except SamplingParamsError as error:
            raise Refusal("invalid_value", str(error), _culprit(known, given)) from None

    def _seeded(self, sampling: SamplingParams, custom_id: str) -> SamplingParams:
        if sampling.is_greedy or sampling.seed is not None:
            return sampling
        digest = hashlib.blake2b(f"{self.seed}:{custom_id}".encode(), digest_size=8).digest()
        return sampling.clone(seed=int.from_bytes(digest, "big") & MAX_SEED)


def first_endpoint(file: Storage) -> str | None:
    """Returns the endpoint, e.g. ``"/v1/embeddings"``, of the first line with a supported one; None if no line has one.

    Args:
        file: The batch file.
    """
    with file.open_input() as lines:
        for line in lines:
            with suppress(Refusal):
                url = parse_object(line).get("url")
                if url in ENDPOINTS:
                    return url
    return None


def parse_object(line: bytes) -> dict[str, Any]:
    """Parses a line as a JSON object.

    Args:
        line: Bytes of the line, as in the file.

    Raises:
        Refusal: The line is not a JSON object.
    """
    try:
        values = from_json(line.removeprefix(BOM), allow_inf_nan=False)
    except ValueError as error:
        raise Refusal("invalid_json_line", _describe_json(line, error)) from None
    if not isinstance(values, dict):
        raise Refusal("invalid_json_line", f"the line holds a JSON {type(values).__name__}, not an object")
    return values


def custom_id_of(values: Mapping[str, Any]) -> str | None:
    """Returns the `custom_id` of a line; None if it is missing, empty or not a string."""
    custom_id = values.get("custom_id")
    return custom_id if isinstance(custom_id, str) and custom_id else None


def _describe_json(line: bytes, error: ValueError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as broken:
        return f"the line is not UTF-8: byte {line[broken.start]:#04x} at {broken.start}"
    return f"the line is not JSON: {error}"


def _checked_line(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the body of a line, unchecked; raises `Refusal` if another field of the line is missing or invalid."""
    for name in values:
        if name not in LINE_FIELDS:
            raise Refusal("unknown_parameter", unknown_key_message("the line", name, LINE_FIELDS), name)
    for name, kind in LINE_FIELDS.items():
        check_kind(_required(values, name), kind, name)
    if not values["custom_id"]:
        raise Refusal("invalid_value", "custom_id is empty; answers are found by it", "custom_id")
    if values["method"] != "POST":
        raise Refusal("invalid_method", f"method must be 'POST'; got {values['method']!r:.80}", "method")
    if values["url"] not in ENDPOINTS:
        raise Refusal("invalid_url", f"url must be {' or '.join(ENDPOINTS)}; got {values['url']!r:.80}", "url")
    return values["body"]


def _required(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise Refusal("missing_required_parameter", f"{name} is missing", name)
    return values[name]


def _check_field(known: Mapping[str, BodyField], name: str, value: Any) -> None:
    if name not in known:
        raise Refusal("unknown_parameter", unknown_key_message("the body", name, known), name)
    field = known[name]
    check_kind(value, field.kind, name)
    if field.use == "refused" and value not in field.off:
        raise Refusal("unsupported_value", f"{name}={value!r:.80} is not supported: {field.note}", name)


def _chat_columns(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        columns.MESSAGES: read_messages(_required(body, "messages")),
        columns.TOOLS: read_tools(body),
        columns.CHAT_TEMPLATE_KWARGS: read_template_kwargs(body),
    }


def _completion_columns(body: Mapping[str, Any]) -> dict[str, Any]:
    prompt = _required(body, "prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return {columns.PROMPT: prompt}
    if any(isinstance(one, str | list) for one in prompt):
        raise Refusal("unsupported_value", f"prompt holds {len(prompt)} prompts; give each a line of its own", "prompt")
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in prompt):
        raise Refusal("invalid_type", f"a list as prompt holds token ids; got {prompt!r:.80}", "prompt")
    return {columns.TOKENIZED_PROMPT: prompt}


def _num_top(url: str, body: Mapping[str, Any]) -> int | None:
    if url == RESPONSES:
        return num_top_logprobs(body)
    if url == COMPLETIONS:
        return body.get("logprobs")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise Refusal("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
    return body.get("top_logprobs", 0) if body.get("logprobs") else None


def _checked_echo(body: Mapping[str, Any], num_top: int | None) -> bool:
    echo = bool(body.get("echo"))
    if echo and (num_top is not None or not isinstance(body["prompt"], str)):
        message = "echo is there for a prompt given as text, without logprobs; the prompt's tokens are not reported"
        raise Refusal("unsupported_value", message, "echo")
    return echo


def _culprit(known: Mapping[str, BodyField], given: Mapping[str, Any]) -> str | None:
    """Returns the first of the given fields that `SamplingParams` refuses alone; None if it refuses only several."""
    for name, value in given.items():
        try:
            SamplingParams(**{known[name].target: value})
        except SamplingParamsError:
            return name
    return None
