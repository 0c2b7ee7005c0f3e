"""Tiny random encoders, and what transformers computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from checkpoints import tiny_tokenizer

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "pad_token_id": 1,
}
"""Sizes of a tiny encoder, by the names that most configs have."""

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "modernbert": {"local_attention": 8, "attention_bias": True, "classifier_pooling": "mean", "norm_bias": True},
    "nomic_bert": {"hidden_act": "silu"},
    "gte": {},
    "jina_embeddings_v3": {},
    "eurobert": {"num_key_value_heads": 2, "classifier_pooling": "bos"},
    "llama": {"num_key_value_heads": 2, "is_causal": False},
    "qwen2": {"num_key_value_heads": 2, "is_causal": False},
    "mistral": {"num_key_value_heads": 2, "is_causal": False, "sliding_window": 8},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "use_bidirectional_attention": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""`model_type` -> the fields of its config that replace those of `SIZES` or come to them; None takes one away."""

HEADS = {
    "": AutoModel,
    "classes": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "words": AutoModelForMaskedLM,
}
"""The head of a checkpoint -> the class of transformers that loads it."""


TOKEN_CLASSIFIERS = [name for name in ENCODERS if name != "gemma3_text"]
"""The encoders for which transformers has a head that classifies tokens."""


def tiny_encoder(folder: Path, model_type: str, head: str = "", *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a tiny random encoder with a tokenizer to a folder, and returns the folder.

    Args:
        folder: Folder of the checkpoint; made if absent.
        model_type: A key of `ENCODERS`.
        head: A key of `HEADS`.
        seed: Seed of the weights.
        **overrides: Config fields.
    """
    fields = {name: value for name, value in (SIZES | ENCODERS[model_type] | overrides).items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HEADS[head].from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32)
        draw(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Draws every parameter, so that no bias is 0 and no scale 1."""
    for parameter in model.parameters():
        is_scale = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.normal_(1.0 if is_scale else 0.0, 0.15)


@torch.no_grad()
def reference(folder: Path, prompts: Sequence[list[int]], head: str = "", **inputs: Any) -> list[Tensor]:
    """Returns what transformers computes of each prompt alone: hidden states, or the logits of a classifier.

    Args:
        folder: The checkpoint.
        prompts: Token ids.
        head: A key of `HEADS`.
        **inputs: For each prompt, further inputs of the module, such as `token_type_ids`.
    """
    model = HEADS[head].from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        more = {name: torch.tensor([values[index]]) for name, values in inputs.items()}
        output = model(ids, attention_mask=torch.ones_like(ids), **more)
        results.append((output.logits if head else output.last_hidden_state)[0])
    return results
