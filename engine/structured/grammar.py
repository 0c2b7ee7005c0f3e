"""`Grammars`: compiles grammars and computes token masks; `Grammar`: the state of one sequence in its grammar.

The library llguidance does both. It is imported when the first request asks for a constraint. The token mask of a
sequence applies from its first output token. After the end of the grammar it allows only end-of-sequence tokens.
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
from .tokenizer_text import tokenizer_text
from .trial import find_problem

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

__all__ = ["Grammar", "Grammars"]

MAX_COMPILED = 256
"""Most constraints whose compiled grammars or errors are kept. A job has one or a few, of some megabytes each."""


class Grammar:
    """The state of one sequence in its grammar: which tokens may follow the tokens that it has.

    Args:
        matcher: Matcher of llguidance in the state to start from, which this object advances.

    Attributes:
        matcher: Matcher of llguidance in its state after the accepted tokens.
    """

    __slots__ = ("matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def copy(self) -> Grammar:
        """Returns a copy of the state that advances independently of this one."""
        return Grammar(self.matcher.deep_copy())

    @property
    def is_complete(self) -> bool:
        """Whether the tokens so far are a whole output, which may end here."""
        return self.matcher.is_accepting()

    def accept(self, token_id: int) -> RequestError | None:
        """Advances the state by a token.

        Args:
            token_id: Token id that the token mask allows.

        Returns:
            An error if the grammar exceeds a limit of llguidance and cannot be followed any further; else None.
        """
        if self.matcher.consume_token(token_id):
            return None
        reason = first_line(self.matcher.get_error())
        return RequestError.from_exception(
            SamplingParamsError(f"structured_outputs cannot be followed any further, simplify it: {reason}")
        )


class Grammars:
    """Compiles the grammars of an engine's requests, and computes the token masks of its sequences.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Number of logits that the model computes for a token.
        eos_token_ids: The model's end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._hf = tokenizer.hf
        self._num_tokens = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = eos_token_ids
        self._compiled = lru_cache(MAX_COMPILED)(self._compile)

    def start(self, params: StructuredOutputsParams) -> Grammar:
        """Returns the initial state of a constraint's grammar, which is compiled unless an equal one was before.

        Raises:
            SamplingParamsError: The constraint cannot be compiled, or llguidance cannot use the model's tokenizer.
        """
        found = self._compiled(params)
        if isinstance(found, Grammar):
            return found.copy()
        raise SamplingParamsError(found)

    @property
    def is_used(self) -> bool:
        """Whether any request has asked for a constraint so far."""
        return self._compiled.cache_info().misses > 0

    def masks(self, grammars: Iterable[Grammar | None]) -> TokenMasks | None:
        """Computes the token masks of a step.

        Args:
            grammars: Grammar of each sequence that samples, in order; None for a sequence without one.

        Returns:
            The masks; None if no sequence follows a grammar.
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
        from llguidance import LLTokenizer

        if not self._eos_token_ids:
            raise SamplingParamsError("structured_outputs need a token that ends the output, and the model names none")
        try:
            text = tokenizer_text(self._hf.backend_tokenizer)
            return LLTokenizer(text, n_vocab=self._num_tokens, eos_token=self._eos_token_ids)
        except Exception as error:  # A slow tokenizer has no backend; the library raises ValueError, or a Rust panic.
            raise SamplingParamsError(
                f"structured_outputs cannot work with the tokenizer of this model: {first_line(str(error))}"
            ) from error

    def _compile(self, params: StructuredOutputsParams) -> Grammar | str:
        """Returns the grammar of a constraint, or the message of the error; a failed trial may take a minute."""
        try:
            return self._try_to_compile(params)
        except SamplingParamsError as error:
            return str(error)

    def _try_to_compile(self, params: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher

        text = grammar_text(params)
        if (problem := find_problem(text)) is not None:
            raise cannot_compile(params, problem)
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise cannot_compile(params, matcher.get_error())
        return Grammar(matcher)
