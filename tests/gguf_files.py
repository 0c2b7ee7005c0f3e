"""`write_gguf`: GGUF files of tiny checkpoints, changed as llama.cpp changes them, and how transformers reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

__all__ = ["MIXED", "read_with_transformers", "write_gguf"]

Types = Callable[[str, np.ndarray], str]
"""A function from the name and the numbers of a tensor to the name of its type in the file."""

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
BLOCKS = ("Q8_0", "Q4_0", "Q5_1", "F16", "BF16", "Q4_1")


def plain(name: str, numbers: np.ndarray) -> str:
    return "F32"


def MIXED(name: str, numbers: np.ndarray) -> str:
    """Another type for each matrix."""
    return "F32" if numbers.ndim == 1 else BLOCKS[sum(name.encode()) % len(BLOCKS)]


def write_gguf(
    checkpoint: Path,
    file: Path,
    architecture: str,
    types: Types = plain,
    metadata: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
) -> Path:
    """Writes a checkpoint with its tokenizer as a GGUF file.

    Args:
        checkpoint: The folder of the checkpoint.
        file: The file to write.
        architecture: The value of `general.architecture`.
        types: The types of its tensors.
        metadata: Values that replace values of the metadata; None leaves one out.
        edit: Changes the tensors in the last moment.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    writer = GGUFWriter(file, architecture)
    for key, value in {**_metadata(config, checkpoint, architecture), **(metadata or {})}.items():
        if value is not None:
            _add(writer, key, value)
    tensors = _tensors(checkpoint, config, architecture)
    edit(tensors)
    for name, numbers in tensors.items():
        kind = GGMLQuantizationType[types(name, numbers)]
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            writer.add_tensor(name, quantize(numbers, kind))
        else:
            writer.add_tensor(name, quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _metadata(config: dict[str, Any], checkpoint: Path, architecture: str) -> dict[str, Any]:
    own = {key: config[name] for key, name in KEYS.items() if config.get(name) is not None}
    if architecture not in ("gemma2", "gemma3", "phi3"):
        own.pop("attention.sliding_window", None)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    own |= {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": rotated}
    if rope["rope_type"] == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "longrope":
        trained = rope["original_max_position_embeddings"]
        scale = math.sqrt(1 + math.log(config["max_position_embeddings"] / trained) / math.log(trained))
        own |= {"rope.scaling.original_context_length": trained, "rope.scaling.attn_factor": scale}
    return {**{f"{architecture}.{key}": value for key, value in own.items()}, **_tokenizer(checkpoint)}


def _tokenizer(checkpoint: Path) -> dict[str, Any]:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    template = (checkpoint / "chat_template.jinja").read_text()
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": template,
    }


def _tensors(checkpoint: Path, config: dict[str, Any], architecture: str) -> dict[str, np.ndarray]:
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config["num_hidden_layers"])
    rope = config["rope_parameters"]
    factors = {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
        for kind in ("short", "long")
        if f"{kind}_factor" in rope
    }
    return factors | {
        names.get_name(name, try_suffixes=(".weight", ".bias")): _changed(name, numbers, config, architecture)
        for name, numbers in load_file(checkpoint / "model.safetensors").items()
    }


def _changed(name: str, numbers: np.ndarray, config: dict[str, Any], architecture: str) -> np.ndarray:
    if architecture in ("llama", "granite", "smollm3") and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return np.concatenate([_pair_up(head) for head in np.split(numbers, heads)])
    is_offset = architecture.startswith("gemma") and name.endswith("norm.weight")
    return numbers + np.float32(1) if is_offset else numbers


def _pair_up(head: np.ndarray) -> np.ndarray:
    """Puts row i + n/2 of a head of n rows behind row i."""
    first, second = np.split(head, 2)
    return np.stack([first, second], axis=1).reshape(head.shape)


def read_with_transformers(file: Path, config: Any = None) -> Any:
    """Returns the model that transformers reads from a file, in float32.

    `from_pretrained` does the same, and asks for the package accelerate, which it does not use for a model on a CPU.

    Args:
        file: The file.
        config: The config of the model; None for that of the file, in which transformers reads not every field.
    """
    config = config or AutoConfig.for_model(**load_gguf_checkpoint(str(file))["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
