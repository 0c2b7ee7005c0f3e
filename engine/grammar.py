"""Grammars that outputs follow: compiled once, a place in one for each sequence, and the tokens allowed next.

The work is done by llguidance, which is imported with the first request that asks for it. A sequence is masked from its
first token on; once its grammar has ended, only an end-of-sequence token is left.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RequestError, SamplingParamsError
from .scheduler import StepPlan
from .structured_outputs import CONSTRAINTS, StructuredOutputsParams
from .token_masks import TokenMasks
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

__all__ = ["Grammar", "Grammars"]

SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords of JSON Schema whose values are schemas by names that anybody chose."""

VALUES = ("const", "enum", "default", "examples")
"""Keywords of JSON Schema whose values are no schemas."""

MAX_COMPILED = 256
"""Grammars that are kept compiled: a job has one or a few, and one takes up to some megabytes."""


class Grammar:
    """How far one sequence has come in its grammar.

    Args:
        matcher: At the beginning; from now on this grammar's own.

    Attributes:
        matcher: The same.
    """

    __slots__ = ("matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def copy(self) -> Grammar:
        """Returns another one at the same place."""
        return Grammar(self.matcher.deep_copy())

    def accept(self, token_id: int) -> RequestError | None:
        """Goes on by a token.

        Args:
            token_id: Drawn under the mask; after the end, an end-of-sequence token.

        Returns:
            Why the grammar cannot be followed any further: it takes more than its limits allow. None while it can.
        """
        if self.matcher.consume_token(token_id):
            return None
        reason = _first_line(self.matcher.get_error())
        return RequestError.from_exception(
            SamplingParamsError(f"structured_outputs cannot be followed any further, simplify it: {reason}")
        )


class Grammars:
    """The grammars of an engine's requests.

    Args:
        tokenizer: The model's.
        vocab_size: Rows of the model's logits.
        eos_token_ids: What ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._hf = tokenizer.hf
        self._num_tokens = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = eos_token_ids
        self._compiled = lru_cache(MAX_COMPILED)(self._compile)

    def start(self, params: StructuredOutputsParams) -> Grammar:
        """Returns the beginning of a grammar.

        Raises:
            SamplingParamsError: It cannot be compiled, or the model's tokenizer cannot be used for it.
        """
        return self._compiled(params).copy()

    def masks(self, plan: StepPlan) -> TokenMasks | None:
        """Returns the tokens that a step may draw; None if nothing that it samples follows a grammar."""
        if not self._compiled.cache_info().misses:
            return None
        sampled = [request.grammar for request, samples in zip(plan.requests, plan.samples, strict=True) if samples]
        found = [(i, grammar.matcher) for i, grammar in enumerate(sampled) if grammar is not None]
        if not found:
            return None
        words = np.empty((len(found), -(-self._num_tokens // 32)), dtype=np.int32)
        places = [(matcher, line) for line, (_, matcher) in enumerate(found)]
        self._executor.unsafe_compute_mask_ptr(places, words.ctypes.data, words.strides[0], len(words))
        return TokenMasks([i for i, _ in found], words.view(np.uint8))

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        if not self._eos_token_ids:
            raise SamplingParamsError("structured_outputs need a token that ends the output, and the model names none")
        try:
            return from_tokenizer(self._hf, n_vocab=self._num_tokens, eos_token=self._eos_token_ids)
        except Exception as error:  # The library raises plain ValueError or a panic's type for what it cannot read.
            raise SamplingParamsError(
                f"structured_outputs cannot work with the tokenizer of this model: {_first_line(str(error))}"
            ) from error

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher

        field = next(name for name in CONSTRAINTS if getattr(params, name) is not None)
        try:
            matcher = LLMatcher(self._tokenizer, _grammar_text(params), log_level=0)
            reason = matcher.get_error()
        except (ValueError, RecursionError) as error:  # A grammar that is not even one.
            reason = str(error)
        if reason:
            given = getattr(params, field)
            raise SamplingParamsError(
                f"structured_outputs.{field} cannot be compiled: {_first_line(reason)}; got {given!r:.200}"
            )
        return Grammar(matcher)


def _grammar_text(params: StructuredOutputsParams) -> str:
    """Returns a grammar in the library's own form."""
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return grammar_from("regex", params.regex)
    if params.grammar is not None:
        return grammar_from("grammar", params.grammar)
    if params.choice is not None:
        return grammar_from("choice", json.dumps(params.choice))
    schema = {"type": "object"} if params.json is None else json.loads(params.json)
    if params.disable_additional_properties:
        _close_objects(schema)
    overrides: Any = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        overrides["whitespace_pattern"] = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides)


def _close_objects(schema: Any) -> None:
    """Forbids further properties, in place, in every part of a schema that names some and does not speak of others."""
    if isinstance(schema, list):
        for part in schema:
            _close_objects(part)
    if not isinstance(schema, dict):
        return
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    for name, part in schema.items():
        if name in SCHEMAS_BY_NAME and isinstance(part, dict):
            _close_objects(list(part.values()))
        elif name not in VALUES:
            _close_objects(part)


def _first_line(text: str) -> str:
    """Returns the line of an error that says what is wrong: those of the library draw a picture around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or ["no reason given"])[0]
