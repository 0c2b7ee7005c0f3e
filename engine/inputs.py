"""Checks what a caller hands in and makes it runnable: prompts to tokens, parameters against the model."""

from __future__ import annotations

import numbers
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from .errors import (
    ConfigError,
    EmptyPromptError,
    PoolingParamsError,
    PromptTooLongError,
    PromptTypeError,
    SamplingParamsError,
    TokenOutOfVocabularyError,
    unknown_key_message,
)
from .pooling.params import PoolingParams
from .request import GenerateRequest, PoolingRequest, Request
from .sampling_params import SamplingParams
from .sequence import Sequence
from .text.detokenizer import StopStringMatcher
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .pooling.pooler import Pooler
    from .structured.grammar import Grammar, Grammars


class TextPrompt(TypedDict):
    """A prompt as text.

    Attributes:
        prompt: The text.
        cache_salt: Any text but an empty one. Prompts share cached prefixes only with prompts of the same salt, so that
            no tenant learns from the time of an answer what another one has asked.
    """

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids.

    Attributes:
        prompt_token_ids: The ids.
        prompt: Its text, if the output should show it.
        cache_salt: As in `TextPrompt`.
    """

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | list[int] | TextPrompt | TokensPrompt
"""Whatever stands for one prompt."""

NOTHING_DRAWN = SamplingParams(max_tokens=1, detokenize=False)
"""What stands for the sampling parameters of a request that is pooled."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One prompt of a call, in whatever form it came.

    Attributes:
        text: Its text, None if it came without.
        token_ids: Its tokens, None if the text is yet to be tokenised.
        cache_salt: As in `GenerateRequest`.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    cache_salt: str | None = None


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """Reads one prompt.

    Args:
        prompt: Text, token ids, or one of the prompt dictionaries.

    Returns:
        What the prompt consists of; the engine checks the salt.

    Raises:
        PromptTypeError: It is something else.
        EmptyPromptError: The text is empty.
    """
    text, token_ids, cache_salt = None, None, None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        for key in prompt:
            if key not in PROMPT_KEYS:
                raise PromptTypeError(unknown_key_message("a prompt", str(key), PROMPT_KEYS))
        text, token_ids, cache_salt = map(prompt.get, PROMPT_KEYS)
    elif _is_list(prompt):
        token_ids = prompt
    else:
        raise PromptTypeError(f"Prompt should be a string, list of tokens, or dictionary; got {_describe(prompt)}")
    if text is None and token_ids is None:
        raise PromptTypeError("Prompt should be a string, list of tokens, or dictionary; got a dictionary without any")
    if text is not None and not isinstance(text, str):
        raise PromptTypeError(f"Prompt text should be a string; got {_describe(text)}")
    if text == "" and token_ids is None:
        raise EmptyPromptError("The decoder prompt cannot be empty; give it at least one character")
    return ParsedPrompt(text, None if token_ids is None else _parse_token_ids(token_ids), cache_salt)


def _parse_token_ids(token_ids: Any) -> list[int]:
    if not _is_list(token_ids):
        raise PromptTypeError(f"Token prompt should be a list of integers; got {_describe(token_ids)}")
    for token_id in token_ids:
        if not isinstance(token_id, numbers.Integral) or isinstance(token_id, bool):
            raise PromptTypeError(f"Token prompt should be a list of integers; it holds {_describe(token_id)}")
    return [int(token_id) for token_id in token_ids]


def _hash_salt(cache_salt: Any) -> bytes:
    """Returns what the block hashes of a request begin with; equal salts give equal bytes of one length."""
    if cache_salt is None:
        return b""
    if not isinstance(cache_salt, str) or not cache_salt:
        raise PromptTypeError(f"cache_salt must be a non-empty string, or be left out; got {_describe(cache_salt)}")
    return blake2b(cache_salt.encode(errors="surrogatepass"), digest_size=16).digest()


def _is_list(value: Any) -> bool:
    """Takes arrays too: they are what a dataset's rows hold."""
    is_sequence = isinstance(value, abc.Sequence) or hasattr(value, "__array__")
    return is_sequence and not isinstance(value, str | bytes)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """Turns a `GenerateRequest` into the requests the scheduler runs.

    Attributes:
        tokenizer: The model's; None if the engine works with token ids only.
        vocab_size: Rows of the model's logits.
        max_model_len: Most tokens of prompt and output.
        max_logprobs: Most log-probabilities per token.
        eos_token_ids: The model's end-of-sequence tokens, the tokenizer's own first.
        seed: Of requests that bring none.
        grammars: What outputs are to follow; None without a tokenizer.
        pooler: How prompts are pooled; None where tokens are generated.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: list[int]
    seed: int
    grammars: Grammars | None = None
    pooler: Pooler | None = None

    def process(self, request: Request) -> list[Sequence]:
        """Checks a request and splits it into its n sequences.

        Args:
            request: What the caller handed in.

        Returns:
            One request for each sequence.

        Raises:
            PromptError: The prompt cannot be run.
            SamplingParamsError: The parameters do not fit the model.
            PoolingParamsError: The same, of parameters of pooling.
            ConfigError: The engine generates and the request is to be pooled, or the other way round.
        """
        if not isinstance(request.priority, numbers.Integral):
            raise ConfigError(f"priority must be an integer, lower first; got {_describe(request.priority)}")
        if isinstance(request, PoolingRequest):
            return self._pooled(request)
        if self.pooler is not None:
            raise ConfigError(
                f"this engine does {self.pooler.task!r} and generates no text; use embed, classify or encode, or "
                "construct it with runner='generate' where the model can"
            )
        return self._generated(request)

    def _pooled(self, request: PoolingRequest) -> list[Sequence]:
        params = request.pooling_params
        if self.pooler is None:
            raise ConfigError("this engine generates text; construct it with runner='pooling' to embed or classify")
        if not isinstance(params, PoolingParams):
            raise PoolingParamsError(f"pooling_params must be PoolingParams; got {_describe(params)}")
        self.pooler.check(params)
        prompts = [self._tokenize(request.prompt, request.prompt_token_ids)]
        more = map(parse_prompt, request.more_prompts)
        prompts += [self._tokenize(prompt.text, prompt.token_ids) for prompt in more]
        cache_salt = _hash_salt(request.cache_salt)
        for token_ids in prompts:
            self._check_prompt(token_ids, num_new_tokens=0)
        return [
            Sequence(
                request_id=request.request_id,
                index=index,
                params=NOTHING_DRAWN,
                seed=0,
                token_ids=token_ids,
                num_prompt_tokens=len(token_ids),
                # With its vector on the way it is as long as it can get: no later step takes it.
                max_tokens_total=len(token_ids) + 1,
                stop_token_ids={},
                priority=request.priority,
                cache_salt=cache_salt,
                pooling=replace(params, skip_reading_prefix_cache=True) if self.pooler.takes_mean else params,
            )
            for index, token_ids in enumerate(prompts)
        ]

    def _generated(self, request: GenerateRequest) -> list[Sequence]:
        params = request.sampling_params
        if not isinstance(params, SamplingParams):
            raise SamplingParamsError(f"sampling_params must be SamplingParams; got {_describe(params)}")
        prompt_token_ids = self._tokenize(request.prompt, request.prompt_token_ids)
        self._check_prompt(prompt_token_ids, num_new_tokens=1)
        params.check_against_model(self.vocab_size, self.max_logprobs)
        self._check_text_features(params)
        max_tokens_total = self._max_tokens_total(params, len(prompt_token_ids))
        seed = params.seed if params.seed is not None else derive_seed(self.seed, request.request_id)
        bad_word_ids = self._bad_word_ids(params)
        grammar = self._grammar(params)
        cache_salt = _hash_salt(request.cache_salt)
        return [
            Sequence(
                request_id=request.request_id,
                index=index,
                # The prompt is scored once; the other sequences may take it from the prefix cache.
                params=params if index == 0 else params.clone(prompt_logprobs=None),
                seed=_wrap_int64(seed + index),
                token_ids=list(prompt_token_ids),
                num_prompt_tokens=len(prompt_token_ids),
                max_tokens_total=max_tokens_total,
                stop_token_ids=self._stop_token_ids(params),
                priority=request.priority,
                cache_salt=cache_salt,
                matcher=self._matcher(params, prompt_token_ids),
                bad_word_ids=bad_word_ids,
                grammar=grammar and grammar.copy(),
            )
            for index in range(params.n)
        ]

    def _tokenize(self, prompt: Any, prompt_token_ids: Any) -> list[int]:
        if prompt_token_ids is not None:
            return _parse_token_ids(prompt_token_ids)
        text = parse_prompt(prompt).text
        if self.tokenizer is None:
            raise PromptTypeError("the engine has no tokenizer (skip_tokenizer_init); give prompt_token_ids, not text")
        return encode_text(self.tokenizer, text or "")

    def _check_prompt(self, token_ids: list[int], num_new_tokens: int) -> None:
        if not token_ids:
            raise EmptyPromptError("The decoder prompt cannot be empty; it has no token")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise TokenOutOfVocabularyError(
                f"Token id {wrong} is out of vocabulary: the model's ids are 0 to {self.vocab_size - 1}"
            )
        if len(token_ids) + num_new_tokens > self.max_model_len:
            room = " with room for one new token" if num_new_tokens else ""
            raise PromptTooLongError(
                f"The prompt has {len(token_ids)} tokens, which is longer than the maximum model length of "
                f"{self.max_model_len}{room}. Please reduce the length of the prompt, or "
                "construct the engine with a larger max_model_len if the model allows it"
            )

    def _max_tokens_total(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        if params.max_tokens is None:
            room = self.max_model_len - num_prompt_tokens
            if params.min_tokens > room:
                raise SamplingParamsError(
                    f"min_tokens={params.min_tokens}, but a prompt of {num_prompt_tokens} tokens leaves room for {room}"
                )
            return self.max_model_len
        return min(self.max_model_len, num_prompt_tokens + params.max_tokens)

    def _check_text_features(self, params: SamplingParams) -> None:
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise SamplingParamsError(
                "stop strings and bad_words need text, and the engine has no tokenizer (skip_tokenizer_init); "
                "use stop_token_ids or logit_bias"
            )

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if params.structured_outputs is None:
            return None
        if self.grammars is None:
            raise SamplingParamsError(
                "structured_outputs need to know the text of tokens, and the engine has no tokenizer "
                "(skip_tokenizer_init); construct it with one"
            )
        return self.grammars.start(params.structured_outputs)

    def _stop_token_ids(self, params: SamplingParams) -> dict[int, int | None]:
        """Token that ends a sequence -> the stop reason to report; None for the tokenizer's own end of sequence."""
        stops: dict[int, int | None] = {token_id: token_id for token_id in params.stop_token_ids or ()}
        if not params.ignore_eos:
            stops.update({token_id: token_id for token_id in self.eos_token_ids})
            stops.update(dict.fromkeys(self.eos_token_ids[:1]))
        return stops

    def _matcher(self, params: SamplingParams, prompt_token_ids: list[int]) -> StopStringMatcher | None:
        if self.tokenizer is None or not params.stop:
            return None
        return StopStringMatcher(
            self.tokenizer,
            prompt_token_ids,
            params.stop_strings,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
        )

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        if self.tokenizer is None or not params.bad_words:
            return []
        return [ids for word in params.bad_words for ids in self.tokenizer.bad_word_ids(word)]


def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Tokenises one text.

    Raises:
        PromptTypeError: The tokenizer cannot read it, e.g. because it holds half of a surrogate pair.
    """
    try:
        return tokenizer.encode_batch([text], add_special_tokens)[0]
    except Exception as error:  # The Rust tokenizer raises plain TypeError or UnicodeError for text it cannot read.
        raise PromptTypeError(f"Prompt text should be valid Unicode; the tokenizer refuses it: {error}") from error


def derive_seed(seed: int, name: str) -> int:
    """Returns a 64-bit seed that depends on both arguments and nothing else."""
    digest = blake2b(f"{seed}:{name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def read_eos_token_ids(tokenizer: Tokenizer | None, *configs: Mapping[str, Any]) -> list[int]:
    """Collects the end-of-sequence tokens, the tokenizer's own first.

    Args:
        tokenizer: The model's tokenizer, if there is one.
        *configs: generation_config.json and config.json, which may name one or several.

    Raises:
        ConfigError: A config names something that is not a token id.
    """
    found = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for config in configs:
        value = config.get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) for token_id in values):
            raise ConfigError(f"eos_token_id must be a token id or a list of them; the model's config says {value!r}")
        found += values
    return list(dict.fromkeys(found))
