"""`tokenizer_files`: tokenizer.json and tokenizer_config.json, made from the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..errors import CheckpointError, UnsupportedModelError, quote
from ..text.tokenizer import INSTEAD
from .architectures import find_architecture
from .header import GgufHeader
from .pre_tokenizers import find_pre_tokenizer

__all__ = ["tokenizer_files"]

CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are found in a text as they are; texts of outputs leave the control tokens out."""

WHOLE_TEXT = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens of a whole text, not of a turn in it; see `Architecture.strips_after`."""

SPACE = "\u2581"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(header: GgufHeader) -> dict[str, str]:
    """Returns the names and the contents of the files of a tokenizer.

    Args:
        header: The header of the file, or of the first one if the model is split.

    Raises:
        CheckpointError: The metadata holds no tokenizer, or a damaged one.
        UnsupportedModelError: The kind of tokenizer is not implemented.
    """
    values = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in header.metadata.items()
        if key.startswith("tokenizer.")
    }
    tokens = values.get("tokens")
    if not _is_list(tokens, str) or len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{header.file} holds no list of different tokens in tokenizer.ggml.tokens; {INSTEAD}")
    try:
        special = {name: tokens[at] for name, key in SPECIAL.items() if (at := _special_id(values, key)) is not None}
        architecture = find_architecture(header)
        tokenizer, adds_bos = _build(values, tokens, architecture.merges_by_id)
        strips_after = architecture.strips_after and "scores" in values
        _add_tokens(tokenizer, tokens, values.get("token_type", ()), strips_after=strips_after)
        _add_template(tokenizer, tokens, special, values, adds_bos)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{header.file}: {error}; {INSTEAD}") from error
    except Exception as error:  # The library raises plain Exception.
        raise CheckpointError(
            f"{header.file}: no tokenizer can be made from its metadata: {error!s:.300}; {INSTEAD}"
        ) from error
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps({**config, **_chat_templates(values)}),
    }


def _build(values: Mapping[str, Any], tokens: Sequence[str], merges_by_id: bool) -> tuple[Any, bool]:
    """Returns a tokenizer, and whether a text begins with a beginning-of-sequence token if the file does not say."""
    kind = values.get("model")
    if kind == "gpt2":
        return _byte_level(values, tokens)
    if kind == "llama":
        return _with_scores(values, tokens, merges_by_id), True
    raise UnsupportedModelError(f"tokenizer.ggml.model is {quote(kind)}; gpt2 and llama are implemented")


def _is_list(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _special_id(values: Mapping[str, Any], name: str) -> int | None:
    """Returns the id of a special token; None if there is none."""
    token_id = values.get(f"{name}_token_id")
    if token_id is not None and not (type(token_id) is int and 0 <= token_id < len(values["tokens"])):
        raise UnsupportedModelError(f"tokenizer.ggml.{name}_token_id is {quote(token_id)}, which is no token")
    return token_id


def _byte_level(values: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Any, bool]:
    """Returns a tokenizer that merges bytes; see `_build`."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = values.get("merges")
    if not _is_list(merges, str):
        raise UnsupportedModelError("tokenizer.ggml.merges is missing")
    way = find_pre_tokenizer(values.get("pre"))
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(_ids(tokens), pairs, ignore_merges=way.ignore_merges))
    tokenizer.pre_tokenizer = way.make()
    tokenizer.decoder = decoders.ByteLevel()
    if way.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, way.adds_bos


def _with_scores(values: Mapping[str, Any], tokens: Sequence[str], merges_by_id: bool) -> Any:
    """Returns a tokenizer of SentencePiece, which merges characters into tokens, those of high scores first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = values.get("scores")
    if not _is_list(scores, float) or len(scores) != len(tokens):
        raise UnsupportedModelError("tokenizer.ggml.scores is not a number for each token")
    prefixed = values.get("add_space_prefix", True)
    # Gemma's files spell tokens of several spaces with real spaces.
    vocab = _ids([SPACE * len(token) if token and not token.strip(" ") else token for token in tokens])
    if len(vocab) < len(tokens):
        raise UnsupportedModelError("tokenizer.ggml.tokens has a token of spaces twice")
    order = [-float(token_id) for token_id in range(len(tokens))] if merges_by_id else scores
    unknown = tokens[values.get("unknown_token_id", 0)]
    bpe = models.BPE(vocab, _merges(vocab, order), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(tokens)}


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns all pairs of tokens that make a token, those of the highest score first."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(vocab, key=lambda token: -scores[vocab[token]])
        for cut in sorted(range(1, len(token)), key=lambda cut: vocab.get(token[:cut], 0))
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def _add_tokens(tokenizer: Any, tokens: Sequence[str], types: Sequence[int], *, strips_after: bool) -> None:
    """Adds the tokens that are found in a text as they are; they have their ids already."""
    from tokenizers import AddedToken

    kinds = list(zip(tokens, types, strict=False))
    control = [token for token, kind in kinds if kind == CONTROL and token]
    given = [token for token, kind in kinds if kind == USER_DEFINED and token.strip(" ")]

    def made(token: str, *, special: bool) -> Any:
        strips = strips_after and token not in WHOLE_TEXT
        return AddedToken(token, special=special, normalized=False, rstrip=strips)

    tokenizer.add_special_tokens([made(token, special=True) for token in control])
    tokenizer.add_tokens([made(token, special=False) for token in given])


def _add_template(
    tokenizer: Any, tokens: Sequence[str], special: Mapping[str, str], values: Mapping[str, Any], adds_bos: bool
) -> None:
    """Makes the tokenizer put the special tokens around a text that the model expects there."""
    from tokenizers.processors import TemplateProcessing

    begin = [special["bos_token"]] if values.get("add_bos_token", adds_bos) and "bos_token" in special else []
    end = [special["eos_token"]] if values.get("add_eos_token", False) and "eos_token" in special else []
    if begin or end:
        ids = _ids(tokens)
        tokenizer.post_processor = TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
            special_tokens=[(token, ids[token]) for token in dict.fromkeys([*begin, *end])],
        )


def _chat_templates(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the field `chat_template` with the template, or with all named ones if there are several."""
    names = values.get("chat_templates") or []
    default = {"default": values["chat_template"]} if "chat_template" in values else {}
    named = {name: values[f"chat_template.{name}"] for name in names if f"chat_template.{name}" in values}
    if not named:
        return {"chat_template": default["default"]} if default else {}
    return {"chat_template": [{"name": name, "template": text} for name, text in {**default, **named}.items()]}
