"""Tiny random models of architectures without a family of ours, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from own_code import CONFIGURATION, MODELING

__all__ = ["FALLBACKS", "WITH_FAMILY", "fallback_checkpoint", "fallback_config", "own_code_checkpoint", "save_drawn"]

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 56,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 150,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
_MHA = {"num_key_value_heads": 4}

FALLBACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": (
        "AfmoeForCausalLM",
        {**_WINDOW, **_EXPERTS, "num_experts": 5, "num_shared_experts": 1, "num_dense_layers": 1},
    ),
    "apertus": ("ApertusForCausalLM", {}),
    "aria_text": ("AriaTextForCausalLM", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "biogpt": ("BioGptForCausalLM", {**_MHA, "scale_embedding": True}),
    "bitnet": ("BitNetForCausalLM", {"hidden_size": 48}),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {**_WINDOW, **_EXPERTS, "num_experts": 5}),
    "exaone_moe": (
        "ExaoneMoeForCausalLM",
        {**_WINDOW, **_EXPERTS, "num_experts": 5, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {
            **_WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "laurel_rank": 6,
            "altup_num_inputs": 2,
            "hidden_size_per_layer_input": 9,
            "vocab_size_per_layer_input": 99,
            "intermediate_size": [44] * 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {
            **_WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 20,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 9,
            "vocab_size_per_layer_input": 99,
            "final_logit_softcapping": 5.0,
        },
    ),
    "granite_swa": ("GraniteSWAForCausalLM", {**_WINDOW}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**_EXPERTS, "num_experts": 5, "moe_topk": 2}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", {}),
    "jais2": ("Jais2ForCausalLM", {}),
    "mimo_v2_flash": (
        "MiMoV2FlashForCausalLM",
        {**_WINDOW, **_EXPERTS, "n_routed_experts": 6, "v_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "nanochat": ("NanoChatForCausalLM", {"final_logit_softcapping": 4.0}),
    "persimmon": ("PersimmonForCausalLM", {**_MHA, "hidden_size": 48}),
    "phimoe": ("PhimoeForCausalLM", {**_EXPERTS, "num_local_experts": 5}),
    "solar_open": ("SolarOpenForCausalLM", {**_EXPERTS, "n_routed_experts": 6, "n_shared_experts": 1}),
}
"""Architectures without a family of ours: model_type -> (architecture, config fields)."""

WITH_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("ArceeForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", {**_WINDOW}),
    "minicpm3": ("MiniCPM3ForCausalLM", {**_MHA, **_LATENT, "head_dim": 8}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**_EXPERTS, "num_local_experts": 5, "intermediate_size": 20}),
}
"""Architectures of our families that run as modules of transformers by `model_impl`, in the same form."""


def fallback_config(model_type: str, architecture: str, **fields: Any) -> Any:
    """Returns the config of a tiny model of any architecture of transformers; `fields` replace fields of it."""
    return AutoConfig.for_model(model_type, **{**_SMALL, **fields, "architectures": [architecture]})


def fallback_checkpoint(folder: Path, model_type: str) -> Path:
    """Writes a tiny random model of either table to a folder, without a tokenizer."""
    architecture, fields = {**FALLBACKS, **WITH_FAMILY}[model_type]
    config = fallback_config(model_type, architecture, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_drawn(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder)
    return folder


@torch.no_grad()
def save_drawn(model: Any, folder: Path) -> Any:
    """Draws every parameter anew, so that no bias is 0 and no scale 1; saves the model in its published layout."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dim() < 2:
            tensor.add_(torch.randn_like(tensor) * 0.2)
        else:
            tensor.normal_(0.0, 0.3 if "embed" in name or "lm_head" in name else 1.3 * tensor.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def own_code_checkpoint(folder: Path, **fields: Any) -> Path:
    """Writes a tiny random model whose code is in its folder; `fields` are fields of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configuration_wheel.py").write_text(CONFIGURATION)
    (folder / "modeling_wheel.py").write_text(MODELING)
    auto_map = {
        "AutoConfig": "configuration_wheel.WheelConfig",
        "AutoModelForCausalLM": "modeling_wheel.WheelForCausalLM",
    }
    config = {"model_type": "wheel", "architectures": ["WheelForCausalLM"], "auto_map": auto_map, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        save_drawn(AutoModelForCausalLM.from_config(loaded, trust_remote_code=True), folder / "saved")
    (folder / "saved" / "model.safetensors").rename(folder / "model.safetensors")
    return folder
