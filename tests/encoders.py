"""Tiny random encoders, and what transformers computes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MT5EncoderModel,
    T5EncoderModel,
)

from checkpoints import tiny_tokenizer
from millrace.engine.batch import ForwardBatch
from millrace.engine.models.options import ModelOptions
from millrace.engine.models.registry import describe_model, load_hf_config, load_model

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
    "data2vec-text": {"type_vocab_size": 1},
    "ernie": {"use_task_id": True, "task_type_vocab_size": 3},
    "distilbert": {"hidden_dim": 96, "intermediate_size": None},
    "electra": {"embedding_size": 32},
    "rembert": {"input_embedding_size": 32},
    "albert": {"embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2},
    "mpnet": {},
    "deberta-v2": {
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 12,
        "max_relative_positions": 40,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "t5": {
        "d_ff": 96,
        "d_kv": 24,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 30,
        "max_position_embeddings": None,
        "intermediate_size": None,
    },
    "mt5": {"d_ff": 96, "d_kv": 8, "max_position_embeddings": None, "intermediate_size": None},
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

ENCODER_PARTS = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}
"""`model_type` of models that have a decoder too -> the class of the encoder. Classifiers of texts are no encoders."""


def model_class(config: Any, head: str) -> Any:
    """Returns the class of transformers for a config and a key of `HEADS`."""
    found = HEADS[head]._model_mapping[type(config)]
    return found if head else ENCODER_PARTS.get(config.model_type, found)


def tiny_config(model_type: str, head: str = "", **overrides: Any) -> Any:
    """Returns the config of a tiny encoder; the arguments are those of `tiny_encoder`."""
    fields = {name: value for name, value in (SIZES | ENCODERS[model_type] | overrides).items() if value is not None}
    config = AutoConfig.for_model(model_type, **fields)
    config.architectures = [model_class(config, head).__name__]
    return config


def encoder_name(model_type: str) -> str:
    """Returns the architecture without a head of a key of `ENCODERS`."""
    return tiny_config(model_type).architectures[0]


POOLING: dict[str, Callable[[Tensor], Tensor]] = {
    "CLS": lambda hidden: hidden[0],
    "LAST": lambda hidden: hidden[-1],
    "MEAN": lambda hidden: hidden.mean(0),
}
"""The pooling before the head of a classifier -> what it makes of the hidden states of a text."""


def has_head(model_type: str, head: str) -> bool:
    """Returns whether transformers has a head of this kind for an encoder, and not for one with a decoder."""
    is_known = type(AutoConfig.for_model(model_type)) in HEADS[head]._model_mapping
    return is_known and not (head == "classes" and model_type in ENCODER_PARTS)


def tiny_encoder(folder: Path, model_type: str, head: str = "", *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a tiny random encoder with a tokenizer to a folder, and returns the folder.

    Args:
        folder: Folder of the checkpoint; made if absent.
        model_type: A key of `ENCODERS`.
        head: A key of `HEADS`.
        seed: Seed of the weights.
        **overrides: Config fields.
    """
    config = tiny_config(model_type, head, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config, head)(config)
        # Scores without a scale would be so large that the float32 noise of both sides is more than the tolerance.
        draw(model, 0.1 if model_type in ENCODER_PARTS else 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def draw(model: torch.nn.Module, spread: float = 0.15) -> None:
    """Draws every parameter, so that no bias is 0 and no scale 1."""
    for parameter in model.parameters():
        is_scale = parameter.dim() == 1 and bool((parameter == 1).all())
        parameter.normal_(1.0 if is_scale else 0.0, spread)


@torch.no_grad()
def reference(folder: Path, prompts: Sequence[list[int]], head: str = "", **inputs: Any) -> list[Tensor]:
    """Returns what transformers computes of each prompt alone: hidden states, or the logits of a classifier.

    Args:
        folder: The checkpoint.
        prompts: Token ids.
        head: A key of `HEADS`.
        **inputs: For each prompt, further inputs of the module, such as `token_type_ids`.
    """
    model = model_class(AutoConfig.from_pretrained(folder), head).from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        more = {name: torch.tensor([values[index]]) for name, values in inputs.items()}
        output = model(ids, attention_mask=torch.ones_like(ids), **more)
        results.append((output.logits if head else output.last_hidden_state)[0])
    return results


@torch.no_grad()
def run_step(
    folder: Path,
    prompts: Sequence[list[int]],
    head: str = "",
    token_types: Sequence[list[int]] | None = None,
    **overrides: Any,
) -> list[Tensor]:
    """Returns what our model computes of prompts in one step: hidden states, or the logits of a classifier.

    Args:
        folder: The checkpoint.
        prompts: Token ids.
        head: A key of `HEADS`.
        token_types: For each prompt, the types of its tokens; None for type 0.
        **overrides: Config fields, as `hf_overrides`.
    """
    config, options = load_hf_config(folder, overrides), ModelOptions(head="score" if head else None)
    model = load_model(folder, config, torch.float32, "cpu", options)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    batch = ForwardBatch(
        token_ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.cat([torch.arange(len(prompt)) for prompt in prompts]),
        slot_mappings=(),
        query_start_loc=F.pad(lengths.cumsum(0), (1, 0)).int(),
        seq_lens=lengths.int(),
        block_tables=(),
        rows=torch.arange(len(prompts), dtype=torch.int32),
        longest_prompt=int(lengths.max()),
        token_types=None if token_types is None else torch.tensor([each for types in token_types for each in types]),
    )
    hidden = model(batch, [(torch.empty(0), torch.empty(0))])
    if head != "classes":
        return list((model.compute_class_logits(hidden) if head else hidden).split(lengths.tolist()))
    pool = POOLING[describe_model(config).class_pooling]
    return list(model.compute_class_logits(torch.stack([pool(text) for text in hidden.split(lengths.tolist())])))
