"""`FIELDS`: the table of the fields that a request body may hold. Each is used, ignored, or refused with a reason.

A line with a field that is not in the table is an error. A test compares docs/openai_batch.md with the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
RERANK = ("/v1/rerank", "/v2/rerank", "/rerank")
SCORE = ("/v1/score", "/score")
CLASSIFY = ("/v1/classify", "/classify")
TEXT_ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES)
"""The endpoints that answer with generated text."""

ENDPOINTS_OF: Mapping[str, tuple[str, ...]] = {
    "generate": TEXT_ENDPOINTS,
    "embed": (EMBEDDINGS,),
    "score": (*RERANK, *SCORE),
    "classify": CLASSIFY,
}
"""Task of an engine -> the endpoints that it answers. All lines of a file are for endpoints of one task."""

ENDPOINTS = tuple(url for urls in ENDPOINTS_OF.values() for url in urls)

KINDS = {
    "generate": "chats, completions and responses",
    "embed": "embeddings",
    "score": "scores and rerankings",
    "classify": "classifications",
}
"""Task of an engine -> the requests that it answers, for messages."""


def task_of(url: str) -> str:
    """Returns the task of the engine that answers an endpoint."""
    return next(task for task, urls in ENDPOINTS_OF.items() if url in urls)


Use = Literal["sampling", "request", "ignored", "refused"]
"""Use of a field: it sets a sampling parameter or another part of the request, has no effect, or is an error."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of JSON value.

    Attributes:
        words: Description of the type for error messages.
        matches: Function that returns whether a value is of the type.
    """

    words: str
    matches: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class BodyField:
    """A field of a request's body.

    Attributes:
        name: Name of the field.
        use: Use of the field, as in `Use`.
        kind: Type that the value must have; null is allowed for every field and means that the field is left out.
        note: Explanation for the docs and for errors: the target of the field, the reason that it is ignored or
            refused, or what to do instead.
        target: Name of the field of `SamplingParams` that this field sets.
        off: Values of a refused field that are accepted, because they ask for nothing.
        endpoints: Paths of the endpoints whose bodies may hold the field.
    """

    name: str
    use: Use
    kind: Kind
    note: str
    target: str = ""
    off: tuple[Any, ...] = ()
    endpoints: tuple[str, ...] = TEXT_ENDPOINTS


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite float, or an integer between -2**64 and 2**64; JSON has larger numbers."""
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_integer(value) and abs(value) < 2**64


def _is_list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(is_one(one) for one in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or _is_list_of(_is_text)(value)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(one) for one in value.values())


ANY = Kind("any value", lambda _: True)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("an integer", _is_integer)
NUMBER = Kind("a number", _is_number)
TEXT = Kind("a string", _is_text)
OBJECT = Kind("an object", _is_object)
OBJECTS = Kind("a list of objects", _is_list_of(_is_object))
TEXTS = Kind("a list of strings", _is_list_of(_is_text))
STOP = Kind("a string or a list of strings", _is_stop)
TOKEN_IDS = Kind("a list of token ids", _is_list_of(_is_integer))
STRINGS_BY_NAME = Kind(
    "an object of strings", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))
)
BIAS = Kind("an object of token ids and numbers", _is_bias)
PROMPT = Kind("a string, a list of strings or a list of token ids", lambda value: isinstance(value, str | list))
ITEM = Kind("a string or an object with a text", lambda value: isinstance(value, str | dict))
TEXT_ITEMS = Kind(
    "a string, an object with a text, or a list of these", lambda value: isinstance(value, str | dict | list)
)
CONTENT = Kind("a string or a list of parts", lambda value: isinstance(value, str | list))
ITEMS = Kind("a string or a list of items", lambda value: _is_text(value) or _is_list_of(_is_object)(value))

_LOCAL = "only OpenAI's service needs it"
_STRUCTURED = "it is an older name; use structured_outputs"
_SOUND = "the only output is text"
_STATELESS = "nothing is kept from one line to another; put the whole conversation into input"
_OLD_NAME = "use max_output_tokens"


def _same_name(name: str, kind: Kind, endpoints: tuple[str, ...] = TEXT_ENDPOINTS) -> BodyField:
    return BodyField(name, "sampling", kind, f"`SamplingParams.{name}`", name, endpoints=endpoints)


def _ignored(name: str, endpoints: tuple[str, ...] = TEXT_ENDPOINTS, note: str = _LOCAL) -> BodyField:
    return BodyField(name, "ignored", ANY, note, endpoints=endpoints)


def _refused(
    name: str, note: str, *off: Any, kind: Kind = ANY, endpoints: tuple[str, ...] = TEXT_ENDPOINTS
) -> BodyField:
    return BodyField(name, "refused", kind, note, off=off, endpoints=endpoints)


_EMBEDDINGS = (EMBEDDINGS,)
_CHAT = (CHAT,)
_COMPLETIONS = (COMPLETIONS,)
_RESPONSES = (RESPONSES,)
_TALKS = (CHAT, RESPONSES)
_OLDER = (CHAT, COMPLETIONS)
_SCORED = (*RERANK, *SCORE)
_POOLED = (EMBEDDINGS, *_SCORED, *CLASSIFY)

FIELDS = (
    # The request itself.
    BodyField("model", "request", TEXT, "a served model name; the answer repeats it", endpoints=ENDPOINTS),
    BodyField("messages", "request", OBJECTS, "the conversation, text only", endpoints=_CHAT),
    BodyField("prompt", "request", PROMPT, "one text, or the token ids of one", endpoints=_COMPLETIONS),
    BodyField("input", "request", PROMPT, "texts, or the token ids of texts, one or several", endpoints=_EMBEDDINGS),
    BodyField("input", "request", PROMPT, "texts, or the token ids of texts, one or several", endpoints=CLASSIFY),
    BodyField("query", "request", ITEM, "the text that documents are compared with", endpoints=RERANK),
    BodyField("documents", "request", TEXT_ITEMS, 'the texts to rank, or `{"text": ...}`', endpoints=RERANK),
    BodyField("top_n", "request", INTEGER, "number of the best documents to return; 0 for all", endpoints=RERANK),
    BodyField("return_documents", "request", BOOLEAN, "false leaves the documents out", endpoints=RERANK),
    *(
        BodyField(name, "request", TEXT_ITEMS, note, endpoints=SCORE)
        for name, note in (
            ("text_1", "the first texts of the pairs: one, or as many as there are second texts"),
            ("text_2", "the second texts"),
            ("data_1", "another name of `text_1`"),
            ("data_2", "another name of `text_2`"),
            ("queries", "another name of `text_1`, with `items` or `documents`"),
            ("items", "another name of `text_2`"),
            ("documents", "another name of `text_2`"),
        )
    ),
    BodyField("use_activation", "request", BOOLEAN, "`PoolingParams.use_activation`", endpoints=_POOLED),
    BodyField(
        "input", "request", ITEMS, "the conversation, text only: a text, or a list of items", endpoints=_RESPONSES
    ),
    BodyField("instructions", "request", TEXT, "a system message before the conversation", endpoints=_RESPONSES),
    BodyField("dimensions", "request", INTEGER, "`PoolingParams.dimensions`", endpoints=_EMBEDDINGS),
    BodyField("encoding_format", "request", TEXT, '"float", or "base64" of 32-bit floats', endpoints=_EMBEDDINGS),
    BodyField("tools", "request", OBJECTS, "the tools that the chat template shows to the model", endpoints=_TALKS),
    BodyField(
        "tool_choice",
        "request",
        ANY,
        '"auto", "none" to hide the tools from the template, "required" or a function to force tool calls',
        endpoints=_TALKS,
    ),
    BodyField(
        "parallel_tool_calls", "request", BOOLEAN, "false keeps only the first tool call of an answer", endpoints=_TALKS
    ),
    BodyField("chat_template_kwargs", "request", OBJECT, "variables of the chat template", endpoints=_TALKS),
    BodyField(
        "reasoning",
        "request",
        OBJECT,
        "`effort` is a variable of the chat template; there are no summaries",
        endpoints=_RESPONSES,
    ),
    BodyField("reasoning_effort", "request", TEXT, "a variable of the chat template", endpoints=_CHAT),
    BodyField("add_generation_prompt", "request", BOOLEAN, "whether the template starts the answer", endpoints=_CHAT),
    BodyField(
        "continue_final_message", "request", BOOLEAN, "whether the last message is the answer's start", endpoints=_CHAT
    ),
    # Sampling parameters.
    _same_name("max_tokens", INTEGER, _OLDER),
    BodyField(
        "max_completion_tokens", "sampling", INTEGER, "the newer name of `max_tokens`", "max_tokens", endpoints=_CHAT
    ),
    BodyField(
        "max_output_tokens", "sampling", INTEGER, "`SamplingParams.max_tokens`", "max_tokens", endpoints=_RESPONSES
    ),
    _same_name("temperature", NUMBER),
    _same_name("top_p", NUMBER),
    _same_name("n", INTEGER, _OLDER),
    _same_name("stop", STOP),
    _same_name("seed", INTEGER),
    _same_name("presence_penalty", NUMBER),
    _same_name("frequency_penalty", NUMBER),
    _same_name("logit_bias", BIAS),
    _same_name("top_k", INTEGER),
    _same_name("min_p", NUMBER),
    _same_name("repetition_penalty", NUMBER),
    _same_name("min_tokens", INTEGER),
    _same_name("ignore_eos", BOOLEAN),
    _same_name("stop_token_ids", TOKEN_IDS),
    _same_name("allowed_token_ids", TOKEN_IDS),
    _same_name("bad_words", TEXTS),
    _same_name("include_stop_str_in_output", BOOLEAN),
    _same_name("skip_special_tokens", BOOLEAN),
    # Constraints on the form of the answer.
    BodyField(
        "response_format",
        "request",
        OBJECT,
        "`text`, `json_object`, or `json_schema`, which is always strict",
        endpoints=_OLDER,
    ),
    BodyField("text", "request", OBJECT, "`format` is as `response_format` elsewhere", endpoints=_RESPONSES),
    BodyField("structured_outputs", "request", OBJECT, "`SamplingParams.structured_outputs`"),
    # Additions to the answer.
    BodyField("logprobs", "request", BOOLEAN, "log-probabilities of the answer's tokens", endpoints=_CHAT),
    BodyField(
        "top_logprobs", "request", INTEGER, "number of likely tokens to report; needs `logprobs`", endpoints=_CHAT
    ),
    BodyField(
        "logprobs", "request", INTEGER, "log-probabilities, with this number of likely tokens", endpoints=_COMPLETIONS
    ),
    BodyField("top_logprobs", "request", INTEGER, "log-probabilities, with this number", endpoints=_RESPONSES),
    BodyField(
        "include", "request", TEXTS, "`message.output_text.logprobs` adds log-probabilities", endpoints=_RESPONSES
    ),
    BodyField("metadata", "request", STRINGS_BY_NAME, "the answer repeats it", endpoints=_RESPONSES),
    BodyField("echo", "request", BOOLEAN, "repeats the prompt; not with `logprobs`", endpoints=_COMPLETIONS),
    # Settings that only a service needs.
    _ignored("user", endpoints=ENDPOINTS),
    _ignored("priority", _POOLED),
    _ignored("safety_identifier"),
    _ignored("metadata", _CHAT),
    _ignored("store", _TALKS),
    _ignored("service_tier"),
    _ignored("prompt_cache_key"),
    _ignored("prompt_cache_options"),
    _ignored("prompt_cache_retention"),
    _ignored("priority"),
    _ignored("background", _RESPONSES),
    _ignored("background_options", _RESPONSES),
    _ignored("access_programs", _RESPONSES),
    _ignored("max_tool_calls", _RESPONSES, "it counts calls of OpenAI's own tools"),
    # Fields that are not supported.
    _refused("stream", "answers of a batch are not streamed", False, kind=BOOLEAN),
    _refused("stream_options", "answers of a batch are not streamed"),
    _refused("guided_json", _STRUCTURED),
    _refused("guided_regex", _STRUCTURED),
    _refused("guided_choice", _STRUCTURED),
    _refused("guided_grammar", _STRUCTURED),
    _refused("max_tokens", _OLD_NAME, endpoints=_RESPONSES),
    _refused("max_completion_tokens", _OLD_NAME, endpoints=_RESPONSES),
    _refused("n", "a response has one answer; repeat the line with another custom_id", 1, endpoints=_RESPONSES),
    _refused("response_format", "use text.format", endpoints=_RESPONSES),
    _refused("messages", "use input", endpoints=_RESPONSES),
    _refused("reasoning_effort", "use reasoning.effort", endpoints=_RESPONSES),
    _refused("previous_response_id", _STATELESS, endpoints=_RESPONSES),
    _refused("conversation", _STATELESS, endpoints=_RESPONSES),
    _refused("prompt", "there are no stored prompts; use instructions and input", endpoints=_RESPONSES),
    _refused("truncation", "prompts are not truncated; shorten this one", "disabled", endpoints=_RESPONSES),
    _refused("context_management", "conversations are not shortened; shorten this one", [], endpoints=_RESPONSES),
    _refused("image", _SOUND, endpoints=_RESPONSES),
    _refused("best_of", "no best answer is chosen; use n for several answers", 1, endpoints=_OLDER),
    _refused("use_beam_search", "there is no beam search", False),
    _refused("length_penalty", "it belongs to beam search, which is not supported", 1.0),
    _refused("suffix", "text is not generated between a prompt and a suffix", "", endpoints=_COMPLETIONS),
    _refused("prompt_logprobs", "the answer has no field for log-probabilities of the prompt"),
    _refused("truncate_prompt_tokens", "prompts are not truncated; shorten this one", endpoints=ENDPOINTS),
    _refused("functions", "use tools", endpoints=_CHAT),
    _refused("function_call", "use tool_choice", "none", "auto", endpoints=_CHAT),
    _refused("audio", _SOUND, endpoints=_CHAT),
    _refused("modalities", _SOUND, ["text"], endpoints=_CHAT),
    _refused("prediction", "predicted outputs are not supported", endpoints=_CHAT),
    _refused("moderation", "answers are not moderated", endpoints=_TALKS),
    _refused("verbosity", 'ask for it in the prompt; only "medium" is accepted', "medium", endpoints=_CHAT),
    _refused("web_search_options", "there is no web search", endpoints=_CHAT),
    _refused("chat_template", "a run has one template, the model's", endpoints=_TALKS),
    _refused("documents", "put them into the messages", endpoints=_CHAT),
)
"""The fields of all endpoints, in the order of the table in the docs."""

FIELDS_OF: Mapping[str, Mapping[str, BodyField]] = {
    url: {field.name: field for field in FIELDS if url in field.endpoints} for url in ENDPOINTS
}
"""Path of an endpoint -> name of a field -> the field."""

LINE_FIELDS = {"custom_id": TEXT, "method": TEXT, "url": TEXT, "body": OBJECT}
"""The fields of a line, all of them required, with their types."""

ROLES = ("system", "developer", "user", "assistant", "tool")

MESSAGE_FIELDS = {
    "role": TEXT,
    "content": CONTENT,
    "name": TEXT,
    "tool_calls": OBJECTS,
    "tool_call_id": TEXT,
    "refusal": TEXT,
    "reasoning": TEXT,
    "reasoning_content": TEXT,
    "annotations": OBJECTS,
}
"""The fields that a message of a conversation may hold, with their types."""

NOT_SHOWN = ("annotations",)
"""Fields that an answer of OpenAI's service has when it is sent back in a conversation, and that no template reads."""

REFUSED_IN_MESSAGES = {"function_call": "use tool_calls", "audio": "only text is supported"}
"""Fields of an answer of OpenAI's service that may only be null, and what to do instead."""
