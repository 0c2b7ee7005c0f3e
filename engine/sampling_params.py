"""`SamplingParams`: how a request's tokens are chosen and when generation stops.

Names, defaults and ranges are the same as in vLLM. The constructor checks all values that can be checked without a
model. `SamplingParams.check_against_model` checks token ids and log-probabilities when a request is added.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RequestError, SamplingParamsError, quote, unknown_key_message
from .structured.params import StructuredOutputsParams

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
"""At lower temperatures the most probable token is always chosen."""

LOWEST_TEMPERATURE = 0.01
"""Lower temperatures that are not greedy are raised to this value, because float32 logits would overflow."""

MAX_N = 16384

NAN_LOGITS, ALL_FORBIDDEN = -1, -2
"""Numbers in place of a token id if no token can be drawn: the logits hold NaN, or the parameters allow no token."""

NO_TOKEN = {
    NAN_LOGITS: RequestError(
        "NumericalError",
        "the model's logits for this request hold NaN; check the checkpoint, or try dtype='float32'",
        True,
    ),
    ALL_FORBIDDEN: RequestError(
        "SamplingParamsError",
        "the sampling parameters forbid every token: structured_outputs, allowed_token_ids, bad_words, logit_bias and "
        "min_tokens (which forbids the stop tokens) leave none; relax one of them",
        False,
    ),
}
"""Number in place of a token id -> the error that the request fails with."""


@dataclass(slots=True)
class SamplingParams:
    """How the tokens of one request are drawn, when generation stops, and what its output holds.

    Attributes:
        n: Number of sequences to generate from the prompt. Sequence i uses the seed `seed + i`.
        presence_penalty: Number subtracted from the logit of every token that the output contains, in [-2, 2].
        frequency_penalty: Number subtracted from the logit of a token once for each time that the output contains the
            token, in [-2, 2].
        repetition_penalty: Number that divides positive and multiplies negative logits of all tokens that the prompt or
            the output contains, > 0.
        temperature: Number that divides the logits, in [0, 2]; 0 is greedy.
        top_p: Sum of probabilities, in (0, 1]. Tokens are drawn from the smallest set of most probable tokens whose
            probabilities reach the sum.
        top_k: Number of most probable tokens that tokens are drawn from; 0 or -1 for all tokens.
        min_p: Lowest probability of a token that can be drawn, as a share of the highest probability, in [0, 1].
        seed: Seed of the random draws; None lets the engine derive a seed.
        stop: String or strings that end the text.
        stop_token_ids: Token ids that end the sequence, besides the model's end-of-sequence tokens.
        ignore_eos: Whether generation goes on after the model's end-of-sequence tokens.
        max_tokens: Most tokens to generate; None for as many as fit.
        min_tokens: Number of tokens that are generated before a stop token or a stop string ends the sequence. A
            sequence to which its constraint lets nothing be added ends before.
        logprobs: Number of most probable tokens to report for each generated token; -1 for all; None for no report.
        prompt_logprobs: Number of most probable tokens to report for each prompt token; -1 for all; None for no report.
        detokenize: Whether the output has text.
        skip_special_tokens: Whether special tokens are left out of the text.
        include_stop_str_in_output: Whether the text includes the stop string that ended it.
        logit_bias: Token id -> number that is added to its logit.
        allowed_token_ids: Token ids that can be generated; None for all.
        bad_words: Words that must not be generated, of at most 1,000 characters each. A word is found in any spelling,
            but not where it begins in the middle of a token with other letters before it.
        structured_outputs: Constraint that the output must satisfy: a schema, an expression, a choice or a grammar;
            None for no constraint. It may be given as a mapping of the fields of `StructuredOutputsParams`.

    Raises:
        SamplingParamsError: A value is wrong, or two values exclude each other.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_lists()
        if self.is_greedy:
            self._make_greedy()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Makes parameters from a mapping, such as a cell of a dataset. A value of None means the field's default.

        `max_tokens` is the exception: None means no limit.

        Args:
            values: Field name -> value.

        Returns:
            The parameters.

        Raises:
            SamplingParamsError: A field is unknown (the message gives the nearest known one), or a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise SamplingParamsError(
                f"sampling_params must be a mapping of field names to values, got {type(values).__name__}"
            )
        for key in values:
            if key in FORMER_NAMES:
                raise SamplingParamsError(f"{key} is the name of older releases of vLLM; use {FORMER_NAMES[key]}")
            if key not in FIELD_NAMES:
                raise SamplingParamsError(unknown_key_message("SamplingParams", key, FIELD_NAMES))
        return cls(**{key: value for key, value in values.items() if value is not None or key == "max_tokens"})

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list; empty if there are none."""
        return self.stop or []  # type: ignore[return-value]  # normalised to a list at construction

    def clone(self, **changes: Any) -> SamplingParams:
        """Returns a copy in which the given fields have other values."""
        return dataclasses.replace(self, **changes)

    def check_against_model(self, vocab_size: int, max_logprobs: int) -> None:
        """Checks the token ids and the numbers of log-probabilities against the limits of a model.

        Args:
            vocab_size: Number of logits that the model computes for a token.
            max_logprobs: Most log-probabilities that a request may ask for, for each token; -1 for no limit.

        Raises:
            SamplingParamsError: A token id does not exist, or the request asks for too many log-probabilities.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if not 0 <= token_id < vocab_size:
                    raise SamplingParamsError(
                        f"{name} holds token id {quote(token_id, 60)}, which is out of vocabulary: ids are 0 to "
                        f"{vocab_size - 1}"
                    )
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is None or max_logprobs == -1:
                continue
            if (vocab_size if asked == -1 else asked) > max_logprobs:
                raise SamplingParamsError(
                    f"{name}={asked} is more than max_logprobs={max_logprobs}; "
                    "ask for fewer, or construct the engine with a larger max_logprobs"
                )

    def _normalise(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if _is_number(self.seed, int) and self.seed == -1:
            self.seed = None
        if _is_number(self.top_k, int) and self.top_k == -1:
            self.top_k = 0
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                setattr(self, name, 1)
            elif getattr(self, name) is False:
                setattr(self, name, None)
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _without_repeats(name, value))
        if self.logit_bias is not None:
            self.logit_bias = _normalise_bias(self.logit_bias)
        self.structured_outputs = _read_structured_outputs(self.structured_outputs)

    def _check_numbers(self) -> None:
        for name, (kind, low, high, allowed) in NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL_NUMBERS:
                continue
            if not _is_number(value, kind) or not low <= value <= high:
                raise _wrong(name, value, allowed)
            setattr(self, name, kind(value))
        if self.top_p == 0:
            raise _wrong("top_p", self.top_p, NUMBERS["top_p"][3])
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        if GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            logger.warning("temperature=%s is raised to %s; use 0 for greedy", self.temperature, LOWEST_TEMPERATURE)
            self.temperature = LOWEST_TEMPERATURE

    def _check_lists(self) -> None:
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        for name in ("stop", "bad_words"):
            words = getattr(self, name) or []
            if not all(isinstance(word, str) and word and is_unicode(word) for word in words):
                raise _wrong(name, words, "non-empty strings of valid Unicode")
        if any(len(word) > MAX_WORD_CHARS for word in self.bad_words or ()):
            raise _wrong("bad_words", self.bad_words, f"words of at most {MAX_WORD_CHARS} characters")
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name) or []
            if not all(_is_number(token_id, int) for token_id in ids):
                raise _wrong(name, ids, "a list of token ids (integers)")
            if ids:
                setattr(self, name, [int(token_id) for token_id in ids])
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _wrong("allowed_token_ids", [], "at least one token id, or None for all")
        if self.stop and not self.detokenize:
            raise SamplingParamsError(
                "stop strings are matched on text, which detokenize=False does not produce; "
                "use stop_token_ids, or leave detokenize on"
            )

    def _make_greedy(self) -> None:
        if self.n > 1:
            raise SamplingParamsError(
                f"n={self.n} with temperature=0 would give {self.n} equal sequences; use n=1 or a temperature above 0"
            )
        self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0


FIELD_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))

FORMER_NAMES = {
    "guided_decoding": "structured_outputs, with the same fields",
    "guided_json": "structured_outputs={'json': ...}",
    "guided_regex": "structured_outputs={'regex': ...}",
    "guided_choice": "structured_outputs={'choice': ...}",
    "guided_grammar": "structured_outputs={'grammar': ...}",
}
"""Fields of older releases of vLLM -> the field that replaces each, for the error message."""

NUMBERS: dict[str, tuple[type, float, float, str]] = {
    "n": (int, 1, MAX_N, f"an integer from 1 to {MAX_N}"),
    "presence_penalty": (float, -2, 2, "a number from -2 to 2"),
    "frequency_penalty": (float, -2, 2, "a number from -2 to 2"),
    "repetition_penalty": (float, 1e-6, 1e6, "a number from 1e-6 to 1e6"),
    "temperature": (float, 0, 2, "a number from 0 to 2 (0 is greedy)"),
    "top_p": (float, 0, 1, "a number above 0, at most 1"),
    "top_k": (int, 0, 2**31 - 1, "an integer of at least 0 (0 or -1 for all tokens)"),
    "min_p": (float, 0, 1, "a number from 0 to 1"),
    "seed": (int, -(2**63), 2**63 - 1, "an integer of at most 64 bits, or None"),
    "max_tokens": (int, 1, 2**31 - 1, "an integer of at least 1, or None for as many as fit"),
    "min_tokens": (int, 0, 2**31 - 1, "an integer of at least 0"),
    "logprobs": (int, -1, 2**31 - 1, "an integer of at least 0, -1 for the whole vocabulary, or None"),
    "prompt_logprobs": (int, -1, 2**31 - 1, "an integer of at least 0, -1 for the whole vocabulary, or None"),
}
"""Field -> (type, lowest value, highest value, allowed values in words)."""

MAX_WORD_CHARS = 1000
"""Most characters of a bad word."""

MAX_ID_DIGITS = 18
"""Most digits of a token id that is given as text."""

SWITCHES = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")

OPTIONAL_NUMBERS = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs"})


def _is_number(value: Any, kind: type) -> bool:
    """Returns whether a value is a finite number of a kind; numpy's scalars, which rows of datasets hold, count too."""
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # An integer or a fraction is larger than any float.
        return False


def _normalise_bias(bias: Any) -> dict[int, float]:
    """Returns the biases with integer keys, which JSON turns into strings, and limits each to [-100, 100]."""
    try:
        given = dict(bias)
    except (TypeError, ValueError) as error:
        raise _wrong("logit_bias", bias, "a mapping of token ids to numbers") from error
    pairs: dict[int, float] = {}
    for key, value in given.items():
        is_text = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= MAX_ID_DIGITS
        if not (is_text or _is_number(key, int)) or not _is_number(value, float):
            raise _wrong("logit_bias", {key: value}, "a mapping of token ids to finite numbers")
        pairs[int(key)] = min(100.0, max(-100.0, float(value)))
    return pairs


def is_unicode(text: str) -> bool:
    """Returns whether a text can be encoded: it holds no half of a surrogate pair, which no tokenizer reads."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _without_repeats(name: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise _wrong(name, values, "a list")
    try:
        return list(dict.fromkeys(values))
    except TypeError as error:  # An element cannot be hashed, e.g. a list.
        raise _wrong(name, values, "a list of strings or of token ids") from error


def _read_structured_outputs(value: Any) -> StructuredOutputsParams | None:
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if isinstance(value, Mapping):
        return StructuredOutputsParams.from_dict(value)
    raise _wrong("structured_outputs", value, "StructuredOutputsParams, or a mapping of its fields")


def _wrong(name: str, given: Any, allowed: str) -> SamplingParamsError:
    return SamplingParamsError(f"{name} must be {allowed}; got {quote(given)}")
