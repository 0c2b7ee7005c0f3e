"""`find_head_rows`: finds the rows of the output head that `classifier_from_token` makes classes of."""

from __future__ import annotations

from typing import Any

from ..config import EngineConfig
from ..errors import ConfigError, UnsupportedModelError, quote
from ..models import describe_model
from ..models.model_code import model_code
from ..pooling.token_classes import read_token_classes
from ..text.tokenizer import Tokenizer
from ..weights.head_rows import HeadRows
from .model_source import resolve_tokenizer

__all__ = ["find_head_rows"]


def find_head_rows(config: EngineConfig, hf_config: Any) -> HeadRows | None:
    """Returns the rows of the output head that are the classes of a model; None if it has a head for classes.

    Args:
        config: Settings of the engine, which say where the tokenizer is; it is read if tokens are given by name.
        hf_config: The transformers config of the model.

    Raises:
        ConfigError: The tokenizer has no such token.
        UnsupportedModelError: The logits of the model's tokens are not a product of hidden states and rows alone.
    """
    classes = read_token_classes(hf_config)
    if classes is None:
        return None
    spec = describe_model(hf_config)
    for field, value in (("final_logit_softcapping", spec.logit_softcap), ("lm_head.bias", spec.head_bias)):
        if value:
            raise UnsupportedModelError(
                f"the model has {field}, which changes the logits of tokens; 'classifier_from_token' takes only models "
                "whose logits are a product of hidden states and rows of the output head"
            )
    token_ids = _token_ids(config, classes.tokens)
    for token, token_id in zip(classes.tokens, token_ids, strict=True):
        if not 0 <= token_id < spec.vocab_size:
            raise ConfigError(f"classifier_from_token: {quote(token)} is no token of the model's {spec.vocab_size}")
    # The spec of a module of transformers does not say whether its head is tied.
    says = spec if model_code(hf_config).fallback is None else hf_config.get_text_config()
    source = "embed_tokens.weight" if says.tie_word_embeddings else "lm_head.weight"
    return HeadRows(source, token_ids, classes.subtracts, spec.logit_scale)


def _token_ids(config: EngineConfig, tokens: tuple[str | int, ...]) -> tuple[int, ...]:
    if all(isinstance(token, int) for token in tokens):
        return tuple(token for token in tokens if isinstance(token, int))
    what = "model" if config.tokenizer is None else "tokenizer"
    folder = resolve_tokenizer(config.tokenizer or config.model, config.tokenizer_hub, what)
    tokenizer = Tokenizer(folder, trust_remote_code=config.trust_remote_code)
    return tuple(token if isinstance(token, int) else _id_of(tokenizer, token) for token in tokens)


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.id_of(token)
    if token_id is None:
        raise ConfigError(
            f"classifier_from_token: the tokenizer has no token {quote(token)}; give a token as the vocabulary spells "
            "it, or its id"
        )
    return token_id
