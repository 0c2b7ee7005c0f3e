"""Tiny random checkpoints of every family, with a real tokenizer, made on the spot by transformers.

The weights are drawn so that logits differ clearly: greedy decoding has one answer, and every parameter matters to it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

__all__ = ["FAMILIES", "tiny_checkpoint", "tiny_classifier", "tiny_config", "tiny_tokenizer"]

VOCAB_SIZE = 384
# Qwen2Tokenizer adds <|endoftext|> to any vocabulary without it.
PAD, BOS, EOS = "<|endoftext|>", "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CORPUS = (
    "The mill wheel turns as long as water comes down the race.",
    "Rows stream in, engines stay full, and results stream out.",
    "Pack my box with five dozen liquor jugs, then count them: 0 1 2 3 4 5 6 7 8 9.",
    "Größe, naïve, 水車, emoji 🙂 and\ttabs are only bytes.",
)

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_SWIGLU = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {**_SWIGLU, "intermediate_size": 40, "num_experts_per_tok": 2}
_HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 5.0, 9.0, 20.0],
}
_GROUPS = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_GRANITE = {
    "tie_word_embeddings": True,
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LATENTS = {
    **_SWIGLU,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 13,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 5,
}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
_DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 24,
    "linear_key_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
_OPT = {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}

# family -> (model_type, architecture, config fields)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {**_SWIGLU}),
    "llama3-rope": ("llama", "LlamaForCausalLM", {**_SWIGLU, "rope_parameters": _LLAMA3_ROPE, "attention_bias": True}),
    "mistral": ("mistral", "MistralForCausalLM", {**_SWIGLU, "sliding_window": 6, "head_dim": 32}),
    "qwen2": (
        "qwen2",
        "Qwen2ForCausalLM",
        {**_SWIGLU, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**_SWIGLU, "head_dim": 32, "tie_word_embeddings": True}),
    "ministral": (
        "ministral",
        "MinistralForCausalLM",
        {**_SWIGLU, "head_dim": 16, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "ministral3": (
        "ministral3",
        "Ministral3ForCausalLM",
        {
            **_SWIGLU,
            "head_dim": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 7,
                "llama_4_scaling_beta": 0.4,
            },
        },
    ),
    "starcoder2": (
        "starcoder2",
        "Starcoder2ForCausalLM",
        {**_SWIGLU, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "gemma": ("gemma", "GemmaForCausalLM", {**_SWIGLU, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **_SWIGLU,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **_SWIGLU,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        "GraniteForCausalLM",
        {**_SWIGLU, **_GRANITE},
    ),
    "smollm3": (
        "smollm3",
        "SmolLM3ForCausalLM",
        {
            **_SWIGLU,
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "mlp_bias": True,
        },
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**_EXPERTS, "num_local_experts": 5, "sliding_window": 6}),
    "olmo": ("olmo", "OlmoForCausalLM", {**_SWIGLU, "clip_qkv": 1.0}),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", {**_SWIGLU, "attention_bias": True}),
    "olmo3": (
        "olmo3",
        "Olmo3ForCausalLM",
        {
            **_SWIGLU,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 1e4,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "bamba": (
        "bamba",
        "BambaForCausalLM",
        {**_SWIGLU, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    ),
    "glm": ("glm", "GlmForCausalLM", {**_SWIGLU, "head_dim": 24, "rope_parameters": _HALF_ROPE}),
    "glm4": ("glm4", "Glm4ForCausalLM", {**_SWIGLU, "head_dim": 16, "attention_bias": False}),
    "arcee": ("arcee", "ArceeForCausalLM", {**_SWIGLU, "attention_bias": True, "mlp_bias": True}),
    "cwm": (
        "cwm",
        "CwmForCausalLM",
        {
            **_SWIGLU,
            "head_dim": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 6,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "ernie": ("ernie4_5", "Ernie4_5ForCausalLM", {**_SWIGLU, "head_dim": 24, "use_bias": True}),
    "exaone4": (
        "exaone4",
        "Exaone4ForCausalLM",
        {**_SWIGLU, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    ),
    "helium": ("helium", "HeliumForCausalLM", {**_SWIGLU, "head_dim": 16, "attention_bias": True}),
    "nemotron": ("nemotron", "NemotronForCausalLM", {**_SWIGLU, "attention_bias": True}),
    "seed-oss": ("seed_oss", "SeedOssForCausalLM", {**_SWIGLU, "head_dim": 24}),
    "vaultgemma": (
        "vaultgemma",
        "VaultGemmaForCausalLM",
        {**_SWIGLU, "head_dim": 32, "sliding_window": 6, "attn_logit_softcapping": 4.0, "tie_word_embeddings": True},
    ),
    "stablelm": (
        "stablelm",
        "StableLmForCausalLM",
        {**_SWIGLU, "rope_parameters": _HALF_ROPE, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    "phi3": (
        "phi3",
        "Phi3ForCausalLM",
        {**_SWIGLU, "sliding_window": 7, "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.5}},
    ),
    "deepseek-v2": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **_LATENTS,
            **_GROUPS,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_shared_experts": 2,
            "mlp_bias": True,
        },
    ),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3ForCausalLM", {**_LATENTS, **_GROUPS, "n_shared_experts": 1}),
    "glm4-moe-lite": (
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {**_LATENTS, **_GROUPS, "n_shared_experts": 1, "v_head_dim": 14, "mlp_layer_types": ["sparse", "dense"]},
    ),
    "youtu": (
        "youtu",
        "YoutuForCausalLM",
        # transformers sets the embedding of the padding to zero when it loads this model, whatever the checkpoint has.
        {**_LATENTS, "pad_token_id": None, "rope_interleave": False, "attention_bias": True},
    ),
    "minicpm3": (
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {**_LATENTS, "q_lora_rank": None, "scale_emb": 3, "scale_depth": 0.9, "dim_model_base": 40, "mlp_bias": True},
    ),
    "granite-hybrid": (
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **_SWIGLU,
            **_MAMBA,
            "mamba_n_groups": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "qwen3.5": ("qwen3_5_text", "Qwen3_5ForCausalLM", {**_SWIGLU, **_DELTA, "attention_bias": True}),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {
            **_SWIGLU,
            **_DELTA,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
    ),
    "qwen3-next": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_SWIGLU,
            **_DELTA,
            "mlp_only_layers": [1],
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "nemotron-h": (
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            **_SWIGLU,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            "head_dim": 24,
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "n_groups": 2,
            "ssm_state_size": 13,
            "chunk_size": 5,
            # transformers would limit the step sizes of prompts by it, and not those of single tokens.
            "time_step_min": 1e-30,
            "n_routed_experts": 6,
            "n_group": 2,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 28,
            "routed_scaling_factor": 1.5,
        },
    ),
    "opt": ("opt", "OPTForCausalLM", {**_OPT}),
    "bloom": (
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 256},
    ),
    "cohere": ("cohere", "CohereForCausalLM", {**_SWIGLU, "use_qk_norm": True, "logit_scale": 0.3}),
    "cohere2": (
        "cohere2",
        "Cohere2ForCausalLM",
        {**_SWIGLU, "num_hidden_layers": 3, "sliding_window": 6, "sliding_window_pattern": 3, "logit_scale": 0.3},
    ),
    "falcon": (
        "falcon",
        "FalconForCausalLM",
        {**_SMALL, "ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    ),
    "gpt-neox": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            **_SMALL,
            "intermediate_size": 96,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "gptj": (
        "gptj",
        "GPTJForCausalLM",
        {**_SMALL, "n_inner": 96, "rotary_dim": 10},
    ),
    "codegen": ("codegen", "CodeGenForCausalLM", {**_SMALL, "n_inner": 96, "num_attention_heads": 8, "rotary_dim": 6}),
    "mpt": (
        "mpt",
        "MptForCausalLM",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 96,
            "n_heads": 6,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 0.6, "softmax_scale": 0.5},
        },
    ),
    "phi": ("phi", "PhiForCausalLM", {**_SWIGLU, "rope_parameters": _HALF_ROPE, "qk_layernorm": True}),
    "gpt-bigcode": ("gpt_bigcode", "GPTBigCodeForCausalLM", {**_SMALL, "n_inner": 96, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {**_SMALL, "n_inner": 96, "tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "opt-350m": ("opt", "OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 48, "do_layer_norm_before": False}),
    "qwen2-moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 3,
            "num_experts": 7,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **_EXPERTS,
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **_EXPERTS,
            **_GROUPS,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_shared_experts": 2,
        },
    ),
    "dots1": (
        "dots1",
        "Dots1ForCausalLM",
        {
            **_EXPERTS,
            **_GROUPS,
            "num_hidden_layers": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 0.6,
            "n_shared_experts": 1,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "ernie4_5-moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {
            **_SWIGLU,
            "num_hidden_layers": 3,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 20,
            "moe_norm_min": 0.6,
            "moe_layer_interval": 2,
            "tie_word_embeddings": True,
        },
    ),
    "granite-moe": (
        "granitemoe",
        "GraniteMoeForCausalLM",
        {**_EXPERTS, **_GRANITE, "num_local_experts": 5},
    ),
    "granite-moe-shared": (
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        {**_EXPERTS, **_GRANITE, "num_local_experts": 5, "shared_intermediate_size": 28},
    ),
    "olmoe": ("olmoe", "OlmoeForCausalLM", {**_EXPERTS, "num_experts": 6, "num_experts_per_tok": 3}),
    "mellum": (
        "mellum",
        "MellumForCausalLM",
        {
            **_EXPERTS,
            "head_dim": 16,
            "num_experts": 5,
            "moe_intermediate_size": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "mlp_layer_types": ["sparse", "dense"],
            "norm_topk_prob": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "flex-olmo": (
        "flex_olmo",
        "FlexOlmoForCausalLM",
        {**_EXPERTS, "num_experts": 5, "norm_topk_prob": True},
    ),
    "minimax-m2": (
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {**_EXPERTS, "head_dim": 24, "rotary_dim": 12, "num_local_experts": 6, "num_experts_per_tok": 3},
    ),
    "gpt-oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_EXPERTS,
            "num_hidden_layers": 3,
            "head_dim": 32,
            "num_local_experts": 5,
            "sliding_window": 6,
            "rope_parameters": _GPT_OSS_ROPE,
        },
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: every string encodes and decodes to itself. Ids 0, 1, 2 are pad, bos, eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, chat_template=CHAT_TEMPLATE
    )


def tiny_config(family: str, **overrides: Any) -> Any:
    """Returns the config of a tiny model; `overrides` are fields of it."""
    model_type, architecture, fields = FAMILIES[family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{**special, **fields, "architectures": [architecture], **overrides})


def tiny_checkpoint(
    folder: str | Path, family: str, *, seed: int = 0, weights: str = "safetensors", shards: int = 1, **overrides: Any
) -> Path:
    """Writes a tiny random model with its tokenizer to a folder.

    Args:
        folder: Folder of the checkpoint; made if absent.
        family: A key of `FAMILIES`.
        seed: Seed of the weights.
        weights: `"safetensors"`, or `"bin"` for a pickle.
        shards: Number of weight files; several files have an index.
        **overrides: Config fields.

    Returns:
        The folder. `AutoModelForCausalLM` and `AutoTokenizer` load it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _draw(model)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    state = revert_weight_conversion(model, model.state_dict())  # The names that `save_pretrained` writes.
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    _save(state, folder, weights, shards)
    return folder


def tiny_classifier(folder: str | Path, family: str, *, num_labels: int, seed: int = 0, **overrides: Any) -> Path:
    """Writes a tiny random classifier of a family, as `tiny_checkpoint` writes a model that generates."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", FAMILIES[family][1])
    config = tiny_config(family, architectures=[name], num_labels=num_labels, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        _draw(model)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    _save(revert_weight_conversion(model, model.state_dict()), folder, "safetensors", 1)
    return folder


@torch.no_grad()
def _draw(model: torch.nn.Module) -> None:
    """Draws every parameter from the global generator: matrices keep the variance; no bias is 0, and no scale 1."""
    is_offset = model.config.model_type.startswith(("gemma", "qwen3_5", "qwen3_next"))  # Norms scale by 1 + weight.
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ("embed" in name or "lm_head" in name):
            parameter.normal_(0.0, 0.3)
        elif name.endswith(("mlp.gate.weight", "mixer.gate.weight", "router.weight")):
            # The scores lie so far apart that no rounding chooses another expert.
            parameter.normal_(0.0, 4.0 * parameter.shape[1] ** -0.5)
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, 1.5 * parameter.shape[0 if name in transposed else -1] ** -0.5)
        else:
            is_scale = name.endswith("weight") and (not is_offset or "linear_attn" in name)
            parameter.normal_(1.0 if is_scale else 0.0, 0.2)
    for name, buffer in model.named_buffers():
        if "correction" in name:
            buffer.normal_(0.0, 0.2)


def _save(state: dict[str, torch.Tensor], folder: Path, weights: str, shards: int) -> None:
    from safetensors.torch import save_file

    stem, suffix = ("model", "safetensors") if weights == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}.{suffix}"]
    if shards > 1:
        files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    parts: dict[str, dict[str, torch.Tensor]] = {file: {} for file in files}
    for i, (name, tensor) in enumerate(state.items()):
        parts[files[i % shards]][name] = tensor.contiguous()
    for file, part in parts.items():
        if weights == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
