"""Adapters that PEFT wrote change our matrices as PEFT changes those of transformers' model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from checkpoints import tiny_checkpoint
from fallback import fallback_checkpoint
from millrace.engine.config import EngineConfig
from millrace.engine.loading.adapter_base import describe_adapter_base
from millrace.engine.lora.adapter import Adapter
from millrace.engine.lora.base import AdapterBase
from millrace.engine.lora.config import AdapterConfig
from millrace.engine.lora.reader import read_adapter
from millrace.engine.lora.request import LoRARequest
from millrace.engine.models import build_model, load_hf_config, weight_map
from millrace.engine.weights.checkpoint import match_weights
from millrace.engine.weights.model_slots import weight_slots

DENSE = ["llama", "qwen2", "gemma2", "phi3", "gpt-neox", "gpt2", "falcon", "bamba", "codegen", "gpt-bigcode", "qwen3.5"]
WITH_EXPERTS = {
    "deepseek-v2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    "qwen3-next": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
}
"""Families whose experts take no adapters -> targets without them."""


def base_of(folder: Path, dtype: torch.dtype = torch.float32, max_rank: int = 16) -> AdapterBase:
    config = EngineConfig(model=str(folder), enable_lora=True, max_lora_rank=max_rank)
    return describe_adapter_base(config, load_hf_config(folder), "lm_head", dtype)


def read(adapter: Path | str, base: AdapterBase, name: str = "tune") -> Adapter:
    return read_adapter(LoRARequest(name, 1, str(adapter)), base)


def parts_of(folder: Path) -> dict[str, Tensor]:
    """Returns our parts of a checkpoint's matrices, as the loader cuts them."""
    hf_config = load_hf_config(folder)
    slots = weight_slots(build_model(hf_config, torch.float32, "meta"))
    sources = match_weights(slots, folder, weight_map(folder, hf_config, torch.float32))
    return {
        name.removesuffix(".weight"): tensors[0][1] if isinstance(tensors[0][1], Tensor) else tensors[0][1].read()
        for name, tensors in sources.items()
    }


def peft_adapter(folder: Path, model_folder: Path, *, drawn: bool = True, **config: Any) -> Path:
    """Makes PEFT write an adapter, and beside it the model with the adapter merged; returns the adapter's folder."""
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = {"target_modules": "all-linear", "init_lora_weights": not drawn, "task_type": "CAUSAL_LM", **config}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
    tuned.save_pretrained(folder)
    merged = tuned.merge_and_unload()
    beside = folder.with_name(f"{folder.name}-merged")
    shutil.copytree(model_folder, beside)
    state = revert_weight_conversion(merged, merged.state_dict())
    kept = load_file(model_folder / "model.safetensors").keys()
    save_file({name: state[name].clone() for name in kept}, beside / "model.safetensors", metadata={"format": "pt"})
    return folder


def check_equal_to_merged(adapter: Adapter, model_folder: Path, merged: Path) -> None:
    before, after = parts_of(model_folder), parts_of(merged)
    assert adapter.updates
    for name, numbers in before.items():
        update = adapter.updates.get(name)
        ours = numbers if update is None else numbers + update.b @ update.a
        torch.testing.assert_close(
            ours, after[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert update is None or not torch.allclose(numbers, after[name], atol=1e-3)


@pytest.mark.parametrize("family", [*DENSE, *WITH_EXPERTS])
def test_matrices_of_a_family_change_as_peft_changes_them(tmp_path: Path, family: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", family)
    targets = WITH_EXPERTS.get(family, "all-linear")
    adapter = read(peft_adapter(tmp_path / "tune", model, r=5, lora_alpha=7, target_modules=targets), base_of(model))
    if family in DENSE:
        assert adapter.updates.keys() == base_of(model).shapes.keys() - {"embed_tokens", "lm_head"}
    check_equal_to_merged(adapter, model, tmp_path / "tune-merged")


PATTERNS = {
    "rank_pattern": {
        r"^model\.layers\.0\.self_attn\.q_proj": 2,
        "mlp.up_proj": 9,
        r"layers\.1\.self_attn\..*": 6,
        "0.self_attn.k_proj": 3,
    },
    "alpha_pattern": {"q_proj": 11, r".*\.0\.mlp\.(gate|up)_proj": 5.5},
}
"""Patterns of which no two match the same name: PEFT sorts them when it saves them, so their order is lost."""


@pytest.mark.parametrize("config", [{"use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}])
def test_scales_and_ranks_are_those_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama")
    adapter = read(peft_adapter(tmp_path / "tune", model, r=5, lora_alpha=3, **config), base_of(model))
    check_equal_to_merged(adapter, model, tmp_path / "tune-merged")


MODULES = [f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("mlp.up_proj", "self_attn.q_proj", "proj")]
PIECES = [
    "model",
    "layers",
    ".",
    r"\.",
    "1",
    "0",
    "[01]",
    "q_proj",
    "proj",
    "_proj",
    ".*",
    "^",
    "(mlp|self_attn)",
    r"\d",
]
PATTERN_KEYS = (
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(lambda key: key.count("*") < 4)
)
PATTERN_MAPS = st.dictionaries(PATTERN_KEYS, st.integers(1, 99), max_size=4)


@given(PATTERN_MAPS, PATTERN_MAPS, st.booleans())
def test_patterns_match_the_names_that_peft_matches(
    ranks: dict[str, int], alphas: dict[str, int], use_rslora: bool
) -> None:
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": use_rslora}
    config = AdapterConfig.of({**fields, "rank_pattern": ranks, "alpha_pattern": alphas})
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks.keys(), module), 8)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), 16)
        assert config.rank_of(module) == rank
        assert config.scale_of(module) == alpha / (math.sqrt(rank) if use_rslora else rank)


def test_the_output_head_takes_an_adapter(tmp_path: Path) -> None:
    """PEFT then writes copies of the embedding and of the head beside the matrices, which change nothing."""
    model = tiny_checkpoint(tmp_path / "model", "llama")
    tune = peft_adapter(tmp_path / "tune", model, r=4, target_modules=["lm_head", "q_proj"])
    adapter = read(tune, base_of(model))
    assert "lm_head" in adapter.updates
    check_equal_to_merged(adapter, model, tmp_path / "tune-merged")
    assert not adapter.new_rows


def test_a_model_that_runs_as_a_module_of_transformers_takes_adapters(tmp_path: Path) -> None:
    model = fallback_checkpoint(tmp_path / "model", "biogpt")
    adapter = read(peft_adapter(tmp_path / "tune", model, r=3, lora_alpha=5), base_of(model))
    check_equal_to_merged(adapter, model, tmp_path / "tune-merged")
