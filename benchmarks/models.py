"""Random models with the shapes of published ones: config.json, checkpoints, and their bytes and operations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2 << 30
"""Most bytes of a file of a checkpoint, about as in published ones; several files can be read at once."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a dense decoder with grouped-query attention and a gated MLP.

    Attributes:
        model_type: Its family in transformers: "qwen3" (norms on query and key heads) or "llama".
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of a head.
        vocab_size: Rows of the embedding.
        is_tied: Whether the output head is the embedding.
        rope: Rotary parameters, as config.json has them.
        max_position_embeddings: Longest sequence.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6})
    max_position_embeddings: int = 40_960

    @property
    def num_layer_params(self) -> int:
        """Numbers in the matrices of all layers; the norms are left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_head_params(self) -> int:
        """Numbers in the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_kv_numbers(self) -> int:
        """Numbers that the KV cache holds per token, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_attention_flops(self) -> int:
        """Operations of one query token with one visible key, in all layers: a score, and a weighted sum."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """Returns the fields of config.json."""
        architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]
        return {
            "architectures": [architecture],
            "model_type": self.model_type,
            "dtype": "bfloat16",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.is_tied,
            "rope_parameters": dict(self.rope),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields name and shape of every tensor of a checkpoint."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in (f"model.layers.{i}" for i in range(self.num_layers)):
            yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
            if self.model_type == "qwen3":
                yield f"{layer}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{layer}.self_attn.k_norm.weight", (self.head_dim,)
            yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        if not self.is_tied:
            yield "lm_head.weight", (self.vocab_size, hidden)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "tiny": ModelShape("qwen3", 2, 64, 96, 4, 2, 32, 512, is_tied=True, max_position_embeddings=512),
        "qwen3-0.6b": ModelShape("qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, is_tied=True),
        "qwen3-8b": ModelShape("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_936, is_tied=False),
        "qwen3-14b": ModelShape("qwen3", 40, 5120, 17_408, 40, 8, 128, 151_936, is_tied=False),
        "llama-3.1-8b": ModelShape(
            "llama", 32, 4096, 14_336, 32, 8, 128, 128_256, False, _LLAMA3_ROPE, max_position_embeddings=131_072
        ),
    }
)
"""Shapes under the names of published models; "tiny" is for a CPU."""


def write_config(folder: Path, shape: ModelShape) -> None:
    """Writes config.json alone: the model is then made with random weights (`load_format="dummy"`)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def write_checkpoint(folder: Path, shape: ModelShape) -> int:
    """Writes config.json and random weights in bfloat16, in shards with an index.

    Args:
        folder: Folder of the checkpoint; made if absent.
        shape: The model.

    Returns:
        The bytes of the weights.
    """
    write_config(folder, shape)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in shape.tensors():
        if sum(_num_bytes(other) for other in shards[-1].values()) + _num_bytes(size) > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    # One draw serves all tensors, because the time to read them does not depend on the numbers.
    noise = torch.randn(max(_num_bytes(size) // 2 for _, size in shape.tensors())).to(torch.bfloat16) * 0.02
    for file, shard in zip(files, shards, strict=True):
        save_file({name: _take(noise, size) for name, size in shard.items()}, folder / file)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(_num_bytes(size) for _, size in shape.tensors())


def write_adapter(folder: Path, shape: ModelShape, rank: int) -> None:
    """Writes a random LoRA adapter of all linear layers, in PEFT's layout and in bfloat16.

    Args:
        folder: Folder of the adapter; made if absent.
        shape: The model.
        rank: Rank of the matrices.
    """
    matrices = {name.removesuffix(".weight"): size for name, size in shape.tensors() if "_proj." in name}
    targets = sorted({name.rpartition(".")[2] for name in matrices})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    tensors = {}
    for name, (rows, columns) in matrices.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns).to(torch.bfloat16) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank).to(torch.bfloat16) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors")


def _num_bytes(size: tuple[int, ...]) -> int:
    return 2 * torch.Size(size).numel()


def _take(noise: Tensor, size: tuple[int, ...]) -> Tensor:
    return noise[: torch.Size(size).numel()].view(size).clone()
