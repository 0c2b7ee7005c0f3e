"""Grammars that outputs follow: compiled once, a place in one for each sequence, and the tokens allowed next.

llguidance does the work; it is imported with the first request that asks for it. A sequence is masked from its first
token on. Once its grammar has ended, only an end-of-sequence token is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError, SamplingParamsError
from ..text.tokenizer import Tokenizer
from .grammar_text import cannot_compile, first_line, grammar_text
from .params import StructuredOutputsParams
from .token_masks import TokenMasks

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

__all__ = ["Grammar", "Grammars"]

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
        reason = first_line(self.matcher.get_error())
        return RequestError.from_exception(
            SamplingParamsError(f"structured_outputs cannot be followed any further, simplify it: {reason}")
        )


class Grammars:
    """The grammars of an engine's sequences.

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

    @property
    def is_used(self) -> bool:
        """Whether any request has asked for a constraint so far."""
        return self._compiled.cache_info().misses > 0

    def masks(self, grammars: Iterable[Grammar | None]) -> TokenMasks | None:
        """Returns the tokens that a step may draw, given the grammar of each sequence that samples.

        The result is None if no sequence follows a grammar.
        """
        found = [(i, grammar.matcher) for i, grammar in enumerate(grammars) if grammar is not None]
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
                f"structured_outputs cannot work with the tokenizer of this model: {first_line(str(error))}"
            ) from error

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar_text(params), log_level=0)
        if matcher.is_error():
            raise cannot_compile(params, matcher.get_error())
        return Grammar(matcher)
