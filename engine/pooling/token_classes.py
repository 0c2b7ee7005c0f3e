"""`TokenClasses`: the classes of a classifier that is made of a model which generates, by rows of its output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, quote

__all__ = ["TOKEN_CLASS_FIELDS", "TokenClasses", "read_token_classes"]

TWO_WAY, AS_THEY_ARE = "from_2_way_softmax", "no_post_processing"

TOKEN_CLASS_FIELDS = ("classifier_from_token", "method", "is_original_qwen3_reranker", "use_sep_token")
"""Fields of vLLM about such classifiers, which no config class of transformers has."""


@dataclass(frozen=True, slots=True)
class TokenClasses:
    """The tokens whose rows of the output head are the classes of a classifier.

    Attributes:
        tokens: Names or ids of the tokens.
        subtracts: Whether there is one class, whose logit is that of the second token minus that of the first. Its
            sigmoid is the probability of the second token among the two. Otherwise each token is a class.
    """

    tokens: tuple[str | int, ...]
    subtracts: bool

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return 1 if self.subtracts else len(self.tokens)


def read_token_classes(hf_config: Any) -> TokenClasses | None:
    """Returns the classes that the fields `classifier_from_token` and `method` of a config describe; None for none.

    Args:
        hf_config: A transformers config. With `is_original_qwen3_reranker`, the method may be left out.

    Raises:
        ConfigError: A field has a wrong value, or the architecture is not that of a classifier.
    """
    tokens = getattr(hf_config, "classifier_from_token", None)
    if tokens is None:
        return None
    if not isinstance(tokens, list | tuple) or not tokens or not all(type(one) in (str, int) for one in tokens):
        raise ConfigError(f"config field 'classifier_from_token' must be a list of tokens; got {quote(tokens)}")
    method = getattr(hf_config, "method", None)
    if method is None and getattr(hf_config, "is_original_qwen3_reranker", None) is True:
        method = TWO_WAY
    if method not in (TWO_WAY, AS_THEY_ARE):
        raise ConfigError(
            f"config field 'classifier_from_token' is set, and 'method' is {quote(method)}; it can be {TWO_WAY!r} for "
            f"one class of two tokens, or {AS_THEY_ARE!r} for one class of each token"
        )
    if method == TWO_WAY and len(tokens) != 2:
        raise ConfigError(f"config field 'classifier_from_token' is {quote(tokens)}; {TWO_WAY!r} takes two tokens")
    name = hf_config.architectures[0]
    if not name.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"config field 'classifier_from_token' is set, and architectures names {quote(name)}, which is no "
            "classifier; name it with hf_overrides, e.g. {'architectures': ['Qwen3ForSequenceClassification']}"
        )
    return TokenClasses(tuple(tokens), method == TWO_WAY)
