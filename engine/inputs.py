"""Reads prompts: `parse_prompt` reads the forms of a prompt, `PromptReader` makes tokens that the model can run."""

from __future__ import annotations

import functools
import numbers
from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from .embeds.prompts import PromptEmbeds
from .embeds.span import EmbeddedSpan
from .errors import (
    ConfigError,
    EmptyPromptError,
    PromptTooLongError,
    PromptTypeError,
    TokenOutOfVocabularyError,
    UserError,
    quote,
    unknown_key_message,
)
from .text.pair_encoder import Side
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class TextPrompt(TypedDict):
    """A prompt as text.

    Attributes:
        prompt: The text.
        cache_salt: Non-empty text. Prompts share cached prefixes only with prompts that have the same salt. With a
            salt for each tenant, no tenant can find out from the duration of its requests what others have asked.
    """

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids.

    Attributes:
        prompt_token_ids: The token ids.
        prompt: Text of the prompt that the output shows; the model does not read it.
        cache_salt: As in `TextPrompt`.
    """

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


class EmbedsPrompt(TypedDict):
    """A prompt as embeddings, for an engine with `enable_prompt_embeds=True`.

    The output's `prompt_token_ids` has a zero for each embedding. The sampling parameters `prompt_logprobs` and
    `repetition_penalty` are refused, because they need the token ids of the prompt.

    Attributes:
        prompt_embeds: `[num_tokens, embedding_size]` of any floating-point dtype. A row is an embedding as the model's
            `embed_tokens` returns it for a token, as in `inputs_embeds` of Hugging Face. It is cast to the model's
            dtype.
        prompt: Text of the prompt that the output shows; the model does not read it.
        cache_salt: As in `TextPrompt`.
    """

    prompt_embeds: Tensor
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | list[int] | TextPrompt | TokensPrompt | EmbedsPrompt
"""The forms in which a caller can give one prompt."""

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt", "prompt_embeds")

PLACEHOLDER = 0
"""The token id that stands at positions whose embeddings are given."""


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One prompt of a call, split into its parts.

    Attributes:
        text: Text of the prompt; None if none was given.
        token_ids: Token ids of the prompt; None if they are not known.
        cache_salt: As in `GenerateRequest`.
        embeddings: `[num_tokens, embedding_size]`, embeddings of the prompt; None if it was given as text or tokens.
        num_first_tokens: Number of tokens of the first text of a pair, which have token type 0; the others have type 1.
            None if all have type 0.
        prefix: Text in front of the text; None for the model's default prompt.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    cache_salt: str | None = None
    embeddings: Tensor | None = None
    num_first_tokens: int | None = None
    prefix: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether the prompt has only a text, which must be tokenised."""
        return self.token_ids is None and self.embeddings is None


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """Splits one prompt into its parts, and checks the types of its text and token ids.

    Args:
        prompt: Text, list of token ids, or one of the prompt dictionaries.

    Returns:
        The parts of the prompt. The salt and the embeddings are not checked yet.

    Raises:
        PromptTypeError: The prompt has none of these forms.
    """
    text, token_ids, cache_salt, embeddings = None, None, None, None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        for key in prompt:
            if key not in PROMPT_KEYS:
                raise PromptTypeError(unknown_key_message("a prompt", key, PROMPT_KEYS))
        text, token_ids, cache_salt, embeddings = map(prompt.get, PROMPT_KEYS)
    elif _is_list(prompt):
        token_ids = prompt
    else:
        raise PromptTypeError(f"Prompt should be a string, list of tokens, or dictionary; got {describe(prompt)}")
    if text is None and token_ids is None and embeddings is None:
        raise PromptTypeError("Prompt should be a string, list of tokens, or dictionary; got a dictionary without any")
    if text is not None and not isinstance(text, str):
        raise PromptTypeError(f"Prompt text should be a string; got {describe(text)}")
    return ParsedPrompt(text, None if token_ids is None else _parse_token_ids(token_ids), cache_salt, embeddings)


def _parse_token_ids(token_ids: Any) -> list[int]:
    if not _is_list(token_ids):
        raise PromptTypeError(f"Token prompt should be a list of integers; got {describe(token_ids)}")
    if set(map(type, token_ids)) == {int}:  # A loop over the tokens would take longer than all other checks.
        return list(token_ids)
    for token_id in token_ids:
        if not isinstance(token_id, numbers.Integral) or isinstance(token_id, bool):
            raise PromptTypeError(f"Token prompt should be a list of integers; it holds {describe(token_id)}")
    return [int(token_id) for token_id in token_ids]


def hash_salt(cache_salt: Any) -> bytes:
    """Returns the 16 bytes that the block hashes of a request begin with, made from its salt; no bytes for None.

    Raises:
        PromptTypeError: The salt is not a non-empty string.
    """
    if cache_salt is None:
        return b""
    if not isinstance(cache_salt, str) or not cache_salt:
        raise PromptTypeError(f"cache_salt must be a non-empty string, or be left out; got {describe(cache_salt)}")
    return blake2b(cache_salt.encode(errors="surrogatepass"), digest_size=16).digest()


def _is_list(value: Any) -> bool:
    """Returns whether a value is a list or an array; rows of a dataset hold arrays."""
    if hasattr(value, "__array__"):
        return getattr(value, "ndim", 1) == 1
    return isinstance(value, abc.Sequence) and not isinstance(value, str | bytes)


def describe(value: Any) -> str:
    """Returns the type of a value and the beginning of its repr, for an error message."""
    return f"{type(value).__name__} {quote(value, 60)}"


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt that the model can run.

    Attributes:
        token_ids: Token ids of the prompt, with `PLACEHOLDER` where embeddings are given.
        spans: Parts of the prompt that are given as embeddings, in order.
        num_first_tokens: As in `ParsedPrompt`.
    """

    token_ids: list[int]
    spans: abc.Sequence[EmbeddedSpan] = ()
    num_first_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Turns prompts into tokens and checks them against the model.

    Attributes:
        tokenizer: The model's tokenizer; None if the engine works with token ids only.
        vocab_size: Number of tokens that the model knows.
        max_model_len: Most tokens of prompt and output together.
        prompt_embeds: Reader of prompts that are given as embeddings; None if `enable_prompt_embeds` is off.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    prompt_embeds: PromptEmbeds | None = None

    def read(
        self, prompt: ParsedPrompt, *, num_new_tokens: int, most: int | None = None, max_tokens: int | None = None
    ) -> ReadPrompt:
        """Tokenises a prompt if needed, and checks its tokens and its length against the model.

        Args:
            prompt: The prompt. Its text is ignored if token ids or embeddings are given.
            num_new_tokens: Number of tokens after the prompt that must also fit into `max_model_len`.
            most: Number of tokens that a longer prompt is cut to; None to cut none.
            max_tokens: Most tokens of a prompt; None for `max_model_len`.

        Returns:
            The token ids of the prompt, and the embeddings if they are given.

        Raises:
            PromptError: The prompt cannot be run.
            ConfigError: The prompt is given as embeddings, and `enable_prompt_embeds` is off.
        """
        if prompt.embeddings is None:
            token_ids = self._tokenize(prompt)
            cut = token_ids if most is None else self._cut(token_ids, most)
            read = ReadPrompt(cut, num_first_tokens=prompt.num_first_tokens)
        else:
            read = self._read_embeddings(prompt, num_new_tokens)
        self._check(read.token_ids, num_new_tokens, max_tokens)
        return read

    def _cut(self, token_ids: list[int], most: int) -> list[int]:
        return token_ids[:most] if self.tokenizer is None else self.tokenizer.cut(token_ids, most)

    def _read_embeddings(self, prompt: ParsedPrompt, num_new_tokens: int) -> ReadPrompt:
        if self.prompt_embeds is None:
            raise ConfigError("this engine takes no prompt_embeds; construct it with enable_prompt_embeds=True")
        if prompt.token_ids is not None:
            raise PromptTypeError("a prompt has prompt_token_ids and prompt_embeds; give one of the two")
        assert prompt.embeddings is not None, "the caller has seen them"
        # The tensor may be a view that is much larger than its memory, so its length is checked before it is copied.
        self._check_length(self.prompt_embeds.check(prompt.embeddings), num_new_tokens)
        span = self.prompt_embeds.read(prompt.embeddings)
        return ReadPrompt([PLACEHOLDER] * span.end, (span,))

    def _tokenize(self, prompt: ParsedPrompt) -> list[int]:
        if prompt.token_ids is not None:
            return _parse_token_ids(prompt.token_ids)
        text = parse_prompt(prompt.text).text
        if self.tokenizer is None:
            raise PromptTypeError("the engine has no tokenizer (skip_tokenizer_init); give prompt_token_ids, not text")
        return encode_text(self.tokenizer, text or "", prefix=prompt.prefix)

    def _check(self, token_ids: list[int], num_new_tokens: int, max_tokens: int | None) -> None:
        if not token_ids:
            raise EmptyPromptError("The decoder prompt cannot be empty; it has no token")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise TokenOutOfVocabularyError(
                f"Token id {quote(wrong, 60)} is out of vocabulary: the model's ids are 0 to {self.vocab_size - 1}"
                + self._origin(wrong)
            )
        self._check_length(len(token_ids), num_new_tokens, max_tokens)

    def _check_length(self, num_tokens: int, num_new_tokens: int, max_tokens: int | None = None) -> None:
        if max_tokens is not None and num_tokens > max_tokens:
            raise PromptTooLongError(
                f"The prompt has {num_tokens} tokens, which is longer than max_embed_len={max_tokens} of "
                "pooler_config; shorten it, cut it with truncate_prompt_tokens, or raise the limit"
            )
        if max_tokens is None and num_tokens + num_new_tokens > self.max_model_len:
            room = " with room for one new token" if num_new_tokens else ""
            raise PromptTooLongError(
                f"The prompt has {num_tokens} tokens, which is longer than the maximum model length of "
                f"{self.max_model_len}{room}. Please reduce the length of the prompt, or "
                "construct the engine with a larger max_model_len if the model allows it"
            )

    def _origin(self, token_id: int) -> str:
        """Returns the end of an error about a token that the tokenizer has and the model does not."""
        if self.tokenizer is None or not 0 <= token_id < self.tokenizer.vocab_size:
            return ""
        text = quote(self.tokenizer.spellings_of_token(token_id)[0], 80)
        return f"; the token is {text} of the tokenizer, which has more tokens than the model"


Encoded = TypeVar("Encoded")

Parsed = ParsedPrompt | UserError
"""A prompt, or the error that says why the prompt cannot be run."""


def attempt(parse: Callable[..., Any], *args: Any) -> Any:
    """Calls `parse` with the arguments and returns its result; a `UserError` is returned too, and not raised."""
    try:
        return parse(*args)
    except UserError as error:
        return error


def encode_text(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool = True, prefix: str | None = None
) -> list[int]:
    """Returns the token ids of one text, with `prefix` in front of it as `Tokenizer.encode_batch` takes it.

    Raises:
        PromptTypeError: The tokenizer cannot read the text, e.g. because it holds half of a surrogate pair.
    """
    return _encode(lambda: tokenizer.encode_batch([text], add_special_tokens, prefix)[0])


def encode_pairs(
    tokenizer: Tokenizer, pairs: abc.Sequence[tuple[Side, Side]], max_tokens: int | None = None
) -> list[Parsed]:
    """Returns one prompt of each pair of texts, with the separators that the model expects in a pair.

    Args:
        tokenizer: The model's tokenizer.
        pairs: The pairs; a side is a text, or its token ids without special tokens.
        max_tokens: Number of tokens that longer pairs are cut to; None for no cut.

    Returns:
        A prompt for each pair, or the error that says why the tokenizer cannot read it.
    """
    encode = functools.partial(_encode_pairs, tokenizer, max_tokens=max_tokens)
    try:
        return [*encode(pairs)]
    except PromptTypeError:  # One unreadable text fails all pairs, so each is tried alone.
        return [attempt(lambda one: encode([one])[0], pair) for pair in pairs]


def _encode_pairs(
    tokenizer: Tokenizer, pairs: abc.Sequence[tuple[Side, Side]], max_tokens: int | None
) -> list[ParsedPrompt]:
    encoded = _encode(lambda: tokenizer.pairs.encode(pairs, max_tokens))
    return [ParsedPrompt(token_ids=one.token_ids, num_first_tokens=one.num_first_tokens) for one in encoded]


def _encode(encode: Callable[[], Encoded]) -> Encoded:
    try:
        return encode()
    except PromptTypeError:
        raise
    except Exception as error:  # The Rust tokenizer raises plain TypeError or UnicodeError for text it cannot read.
        raise PromptTypeError(
            f"Prompt text should be valid Unicode; the tokenizer refuses it: {error!s:.200}"
        ) from error
