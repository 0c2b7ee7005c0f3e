"""`config_fields`: the fields of a config.json, made from the metadata of a GGUF file."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError, quote
from .architectures import Architecture, find_architecture
from .header import GgufHeader
from .rope import LONG, ROPE_KEYS, rope_parameters

__all__ = ["config_fields", "generation_fields"]

REQUIRED = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Keys that every file has, without the architecture -> fields of config.json."""

READ = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size", *ROPE_KEYS)
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "use_parallel_residual": False}
"""Keys that change the model -> the value that changes nothing, which alone is read."""

SPECIAL_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

END_TOKENS = ("eos", "eot", "eom")
"""Tokens that end an output: the end of the text, of the turn and of the message."""

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys of `general.sampling` -> fields of generation_config.json."""

TRAINED = "original_max_position_embeddings"
DTYPES = {"F32": "float32", "F16": "float16"}


def config_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the fields of config.json that describe the model of a file.

    Args:
        header: The header of the file, or of the first one if the model is split.

    Raises:
        CheckpointError: The metadata lacks a field.
        UnsupportedModelError: The architecture, or a field of its metadata, is not implemented.
    """
    architecture = find_architecture(header)
    _check_keys(header, architecture)
    fields = {theirs: header.own(key) for key, theirs in {**REQUIRED, **architecture.fields}.items()}
    present = {theirs: value for key, theirs in architecture.optional.items() if (value := header.own(key)) is not None}
    head_dim = _head_dim(header)
    rope = rope_parameters(header, head_dim, architecture.window_theta)
    # transformers reads the length that the model was trained with from a field of its own.
    trained = {name: rope[name] for name in (TRAINED,) if name in rope and rope["rope_type"] == "longrope"}
    types = Counter(tensor.type_name for tensor in header.tensors if len(tensor.shape) > 1)
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.name],
        **fields,
        **present,
        "num_key_value_heads": header.own("attention.head_count_kv", fields["num_attention_heads"]),
        "head_dim": head_dim,
        "rope_parameters": rope,
        **trained,
        "vocab_size": header.own("vocab_size", len(header.metadata.get("tokenizer.ggml.tokens", ()))),
        "tie_word_embeddings": not header.has("output.weight"),
        # Numbers in blocks are exact in no type; bfloat16 has the range of all of them.
        "dtype": DTYPES.get(types.most_common(1)[0][0] if types else "", "bfloat16"),
        **{field: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for field, name in SPECIAL_TOKENS.items()},
        **_query_scale(architecture, fields, head_dim),
    }


def generation_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the fields of generation_config.json: the tokens that end an output, and recommended parameters."""
    ends = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in END_TOKENS]
    advice = {theirs: header.metadata.get(f"general.sampling.{key}") for key, theirs in SAMPLING.items()}
    found = {name: value for name, value in advice.items() if value is not None}
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)), **found}


def _check_keys(header: GgufHeader, architecture: Architecture) -> None:
    """Raises if a key of the architecture is missing, or is there and not implemented."""
    prefix = f"{header.architecture}."
    known = {*REQUIRED, *READ, *architecture.fields, *architecture.optional}
    if architecture.window_theta:
        known.add("rope.freq_base_swa")
    if header.has(f"{LONG}.weight"):
        known.add("rope.scaling.attn_factor")
    for key in (key.removeprefix(prefix) for key in header.metadata if key.startswith(prefix)):
        if key not in known and (key not in NEUTRAL or header.own(key) != NEUTRAL[key]):
            raise UnsupportedModelError(
                f"{header.file}: {prefix}{key} is {quote(header.own(key))}, which is not implemented for {prefix[:-1]}"
            )
    for key in {**REQUIRED, **architecture.fields}:
        if header.own(key) is None:
            raise CheckpointError(f"{header.file} lacks {prefix}{key}; convert the model again")


def _head_dim(header: GgufHeader) -> int:
    """Returns the size of a head, which keys and values must share."""
    width, num_heads = header.own("embedding_length"), header.own("attention.head_count")
    if type(num_heads) is not int or num_heads < 1 or type(width) is not int:
        raise UnsupportedModelError(
            f"{header.file}: embedding_length is {quote(width)}, attention.head_count {quote(num_heads)}; integers are "
            "implemented, the same for all layers"
        )
    head_dim = header.own("attention.key_length", width // num_heads)
    values = header.own("attention.value_length", head_dim)
    if type(head_dim) is not int or head_dim < 1 or values != head_dim:
        raise UnsupportedModelError(
            f"{header.file}: attention.key_length is {quote(head_dim)}, attention.value_length {quote(values)}; they "
            "must be equal"
        )
    return head_dim


def _query_scale(architecture: Architecture, fields: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Returns the field of Gemma whose value no file holds; llama.cpp too knows the largest model by its layers."""
    if not architecture.num_largest_layers:
        return {}
    is_largest = fields["num_hidden_layers"] == architecture.num_largest_layers
    scalar = fields["hidden_size"] // fields["num_attention_heads"] if is_largest else head_dim
    return {"query_pre_attn_scalar": scalar}
