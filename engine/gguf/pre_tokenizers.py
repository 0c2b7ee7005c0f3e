"""`pre_tokenizer`: the ways in which byte-level vocabularies of GGUF files cut a text into words before they merge.

A file names the way (`tokenizer.ggml.pre`) and does not describe it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError, quote

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "find_pre_tokenizer"]

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_ONE_DIGIT = rf"{_WORDS}|\p{{N}}|{_REST}"
_THREE_DIGITS = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH_REST = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)


def _cased(ending: str) -> str:
    """Returns the words that change from lower to upper case nowhere inside, and what may follow them."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way.

    Attributes:
        pattern: Regular expression of a word; empty for that of GPT-2, which the library has built in.
        splits_digits: Whether every digit is a word.
        ignore_merges: Whether a word that is a token is not merged, but taken as it is.
        nfc: Whether the text is normalised first.
        adds_bos: Whether a text begins with a beginning-of-sequence token if the file does not say.
    """

    pattern: str = ""
    splits_digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False

    def make(self) -> Any:
        """Returns the object of the library tokenizers."""
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

        if self.pattern:
            words = Split(Regex(self.pattern), "isolated")
            return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
        by_bytes = ByteLevel(add_prefix_space=False, use_regex=True)
        return Sequence([Digits(individual_digits=True), by_bytes]) if self.splits_digits else by_bytes


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(splits_digits=True)
_LLAMA3 = PreTokenizer(_THREE_DIGITS, ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer(_ONE_DIGIT, nfc=True)

PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "stablelm2": PreTokenizer(_ONE_DIGIT),
    "dbrx": PreTokenizer(_THREE_DIGITS),
    "tekken": PreTokenizer(rf"{_cased('')}|\p{{N}}|{_SLASH_REST}", ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer(rf"{_cased(f'{_ENDINGS}?')}|\p{{N}}{{1,3}}|{_SLASH_REST}"),
}
"""Value of `tokenizer.ggml.pre` -> the way."""


def find_pre_tokenizer(name: Any) -> PreTokenizer:
    """Returns the way of a name.

    Raises:
        UnsupportedModelError: The name is unknown; a guess would give other tokens than the model was trained with.
    """
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre is {quote(name)}; these are implemented: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]
