"""Engine settings: wrong ones are refused by name, those of vLLM that change nothing warn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.device import Device
from millrace.engine.errors import ConfigError
from millrace.engine.llm import LLM
from millrace.engine.loading.capacity import plan_capacity
from millrace.engine.loading.hub import HubSettings
from millrace.engine.loading.model_source import resolve_model

CPU = Device(torch.device("cpu"), max_num_batched_tokens=100, overlap_depth=0)

WRONG = [
    ({"max_num_seq": 3}, "did you mean 'max_num_seqs'"),
    ({"dtype": "float8"}, "dtype must be one of"),
    ({"device": "tpu"}, "device must be one of"),
    ({"max_num_seqs": 0}, "max_num_seqs must be"),
    ({"block_size": 1.5}, "block_size must be"),
    ({"max_model_len": "long"}, "max_model_len must be"),
    ({"gpu_memory_utilization": 2}, "gpu_memory_utilization must be"),
    ({"overlap_depth": 2}, "overlap_depth must be"),
    ({"data_parallel_size": 2}, "not supported in this release"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1"),
    ({"pipeline_parallel_size": "2"}, "pipeline_parallel_size must be an integer of at least 1"),
    ({"pipeline_parallel_size": 2, "overlap_depth": 1}, "leave overlap_depth out"),
    ({"tensor_parallel_size": 4, "deterministic": True}, "use at most 2"),
    ({"quantization": "awk"}, "quantization must be one of None, fp8, int4, int8,"),
    ({"task": "draft"}, "task must be one of auto, none, generate, embed"),
    ({"task": "embed", "convert": "classify"}, "task and convert are two names of one setting"),
    ({"seed": "x"}, "seed must be"),
    ({"max_logprobs": -2}, "max_logprobs must be"),
    ({"num_threads": 10**9}, "num_threads must be an integer of at least 1, at most 1024"),
    ({"tensor_parallel_size": 10**9}, "tensor_parallel_size must be"),
    ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be"),
    ({"cudagraph_capture_sizes": 4}, "cudagraph_capture_sizes must be a list"),
    ({"cpu_offload_gb": np.zeros(2)}, "cpu_offload_gb=array"),
    ({"overlap_depth": np.zeros(2)}, "overlap_depth must be"),
    ({"max_model_len": "²k"}, "max_model_len must be"),
    ({"hf_overrides": 3}, "hf_overrides must be a dict of config.json values, or a function"),
    ({"hf_overrides": lambda config: config, "tensor_parallel_size": 2}, "cannot be sent to 2 ranks"),
    ({"tokenizer": 3}, "tokenizer must be a path or a text without a zero byte; got 3"),
    ({"chat_template": ["{{ x }}"]}, "chat_template must be a path or a text without a zero byte"),
    ({"tokenizer": "a\0b"}, "tokenizer must be a path or a text without a zero byte"),
    ({"tokenizer": 10**5000}, "tokenizer must be a path or a text without a zero byte; got <int>"),
    ({"dtype": 10**5000}, "dtype must be one of"),
    ({"seed": 10**5000}, "seed must be an integer of at most 64 bits"),
    ({"max_logprobs": 10**5000}, "max_logprobs must be"),
    ({"max_model_len": True}, "max_model_len must be"),
    ({"block_size": 0}, "block_size must be"),
    ({"pooler_config": {"pooling_type": 10**5000}}, "pooling_type=<int> is not there"),
    ({"pooler_config": {10**5000: 1}}, "pooler_config has no field"),
    ({"enable_lora": "yes"}, "enable_lora must be True or False"),
    ({"max_loras": 0}, "max_loras must be an integer of at least 1, at most 1024"),
    ({"max_lora_rank": 0}, "max_lora_rank must be an integer of at least 1, at most 512"),
    ({"max_lora_rank": 1024}, "max_lora_rank must be an integer of at least 1, at most 512"),
    ({"max_cpu_loras": 1.5}, "max_cpu_loras must be an integer of at least 1"),
    ({"max_cpu_loras": 3, "max_loras": 4, "enable_lora": True}, "max_cpu_loras=3 is less than max_loras=4"),
    ({"lora_target_modules": ["q_proj"]}, "lora_target_modules=.* is not supported"),
    ({"enable_lora_bias": True}, "enable_lora_bias=True is not supported"),
    ({"long_lora_scaling_factors": (4.0,)}, "long_lora_scaling_factors=.* is not supported"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[next(iter(values)) for values, _ in WRONG])
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_kwargs(model="m", **values)


def test_settings_of_vllm_without_effect_warn(caplog):
    config = EngineConfig.from_kwargs(
        model="m",
        swap_space=4,
        enforce_eager=True,
        watermark=0.5,
        tensor_parallel_size=1,
        max_model_len="2k",
        dtype="half",
    )
    assert (config.max_model_len, config.dtype) == (2048, "float16")
    assert "swap_space" in caplog.text and "watermark" in caplog.text
    assert EngineConfig.from_kwargs(model="m", revision="v2", download_dir="there").hub == HubSettings("v2", "there")
    assert "enforce_eager" not in caplog.text, "it asks for what is done anyway"
    assert EngineConfig.from_kwargs(model="m", max_model_len=-1).max_model_len is None


def test_settings_for_adapters_are_heeded_or_named_in_a_warning(caplog):
    adapted = EngineConfig.from_kwargs(
        model="m", enable_lora=True, max_loras=4, max_lora_rank=24, max_cpu_loras=4, lora_dtype="auto"
    )
    assert (adapted.max_loras, adapted.max_lora_rank, adapted.max_cpu_loras) == (4, 24, 4)
    assert not caplog.text
    EngineConfig.from_kwargs(
        model="m", enable_lora=True, lora_extra_vocab_size=256, lora_dtype=torch.float16, fully_sharded_loras=True
    )
    assert "lora_extra_vocab_size=256 is ignored: an adapter cannot add tokens" in caplog.text
    assert "lora_dtype=torch.float16 is ignored" in caplog.text and "fully_sharded_loras=True" in caplog.text
    caplog.clear()
    EngineConfig.from_kwargs(model="m", max_loras=4, max_cpu_loras=2)
    assert "max_loras=4 is ignored: enable_lora is off" in caplog.text
    assert "max_cpu_loras=2 is ignored" in caplog.text


def test_the_length_limit_fits_model_and_cache(caplog):
    def plan(**values):
        return plan_capacity(EngineConfig(model="m", max_num_seqs=4, **values), CPU, 512, block_bytes=1000)

    assert plan().max_model_len == 512 and plan().num_blocks == 4 * 32
    assert plan(kv_cache_memory_bytes=50_500).num_blocks == 50
    assert plan(num_gpu_blocks_override=10).max_model_len == 160
    assert "lowered" in caplog.text
    with pytest.raises(ConfigError, match="positions the model was made for"):
        plan(max_model_len=513)
    with pytest.raises(ConfigError, match="does not fit the KV cache"):
        plan(max_model_len=512, num_gpu_blocks_override=10)
    with pytest.raises(ConfigError, match="no room for a KV cache"):
        plan(kv_cache_memory_bytes=500)


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="not a local folder"):
        LLM(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="no bundled model"):
        resolve_model("bundled:absent")


def test_auto_dtype_keeps_what_the_cpu_can_compute():
    assert CPU.resolve_dtype("auto", torch.float16) == torch.float32
    assert CPU.resolve_dtype("auto", None) == torch.float32
    assert CPU.resolve_dtype("auto", torch.bfloat16) in (torch.bfloat16, torch.float32)
    assert CPU.resolve_dtype("float16", torch.float32) == torch.float16


@pytest.mark.parametrize(
    "setting",
    [{"config_format": "mistral"}, {"hf_config_path": "x"}, {"code_revision": "main"}, {"enable_eplb": True}],
)
def test_a_setting_of_vllm_for_models_that_cannot_be_honoured_is_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.* is not supported in this release"):
        EngineConfig.from_kwargs(model="m", **setting)
