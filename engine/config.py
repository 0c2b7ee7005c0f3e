"""Settings of one engine: `EngineConfig`, made from the keyword arguments that users of vLLM know.

Sizes that depend on the model (length limit, number of KV blocks) stay None here and are settled when it is loaded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, unknown_key_message
from .pooling.config import PoolerConfig
from .pooling.params import POOLING_TASKS
from .quantization.registry import scheme_names

logger = logging.getLogger(__name__)

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
}
CHOICES: dict[str, dict[Any, Any]] = {
    "dtype": DTYPES,
    "device": {"auto": "auto", "cpu": "cpu", "cuda": "cuda"},
    "generation_config": {"auto": "auto", "vllm": "vllm"},
    "quantization": {None: None, **{name: name for name in scheme_names()}},
    "runner": {"auto": "auto", "generate": "generate", "pooling": "pooling"},
    "task": {
        "auto": "auto",
        "none": "auto",
        "generate": "generate",
        "embedding": "embed",
        **{name: name for name in POOLING_TASKS},
    },
    "kv_cache_dtype": {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8"},
    "load_format": {
        "auto": "auto",
        "safetensors": "auto",
        "pt": "auto",
        "dummy": "dummy",
        "sharded_state": "sharded_state",
    },
}
"""Fields with a few values: what may be given, and what it stands for."""

IGNORED: dict[str, tuple[Any, str]] = {
    "swap_space": (0, "preempted requests are recomputed, never swapped"),
    "disable_log_stats": (True, "statistics are returned as data by stats()"),
    "enable_chunked_prefill": (True, "prompts are always prefilled in chunks when they exceed the token budget"),
    "disable_custom_all_reduce": (True, "GPUs add up with NCCL"),
    "compilation_config": (None, "nothing is compiled ahead of the first step"),
    "optimization_level": (None, "nothing is compiled ahead of the first step"),
    "max_seq_len_to_capture": (None, "graphs serve sequences of any length"),
    "use_v2_block_manager": (True, "there is one block manager"),
    "scheduler_reserve_full_isl": (True, "a request always enters only when its whole prompt fits"),
    "tokenizer_mode": ("auto", "the fast tokenizer is used when there is one"),
    "distributed_executor_backend": (None, "an engine starts its own ranks, a replica on Ray is given them"),
    "async_scheduling": (None, "the overlap of host and device follows the device"),
    "revision": (None, "models are read from a folder, here or behind a URL"),
    "tokenizer_revision": (None, "models are read from a folder, here or behind a URL"),
    "download_dir": (None, "weights are never copied to a disk"),
    "hf_token": (None, "credentials are read from the environment: HF_TOKEN"),
    "limit_mm_per_prompt": (None, "this release takes text only"),
    "trust_remote_code": (False, "code that comes with a model is never run"),
    "served_model_name": (None, "nothing is served"),
    "performance_mode": ("throughput", "batch throughput is what the engine is made for"),
    "disable_log_requests": (True, "requests are never logged"),
    "prefix_caching_hash_algo": (None, "the hash of blocks is not a setting"),
    "watermark": (0.0, "no blocks are held back"),
    "long_prefill_token_threshold": (0, "a long prompt may take a whole step"),
    "allowed_local_media_path": ("", "this release takes text only"),
    "allowed_media_domains": (None, "this release takes text only"),
    "mm_processor_kwargs": (None, "this release takes text only"),
    "mm_processor_cache_gb": (None, "this release takes text only"),
    "structured_outputs_config": (None, "one library follows all grammars; options stand in structured_outputs"),
    "max_loras": (None, "this release has no adapters"),
    "max_lora_rank": (None, "this release has no adapters"),
    "max_cpu_loras": (None, "this release has no adapters"),
}
"""Settings of vLLM that change nothing here: the value that is true anyway, and why another one warns."""

ONLY: dict[str, tuple[Any, ...]] = {
    "data_parallel_size": (1,),
    "enable_lora": (False,),
    "speculative_config": (None,),
    "cpu_offload_gb": (0,),
    "scheduling_policy": ("fcfs", "priority"),
    "model_impl": ("auto",),
    "logprobs_mode": ("raw_logprobs",),
    "logits_processors": (None, []),
    "override_generation_config": (None, {}),
    "enable_sleep_mode": (False,),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "spec_model": (None,),
    "spec_method": (None,),
    "kv_offloading_size": (None,),
}
"""Settings of vLLM of which only some values work in this release."""

OTHER_NAMES = {"convert": "task", "override_pooler_config": "pooler_config"}
"""Names that vLLM has, or once had, for fields of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: Folder of the model in Hugging Face's layout, or ``"bundled:NAME"``.
        tokenizer: Folder of the tokenizer; None for the model's own.
        skip_tokenizer_init: Load no tokenizer: prompts are token ids, outputs have no text.
        chat_template: Jinja text or file that replaces the tokenizer's chat template.
        hf_overrides: Values that replace those of the model's config.json.
        generation_config: ``"auto"`` takes default sampling parameters from generation_config.json, ``"vllm"`` none.
        runner: ``"generate"`` draws tokens, ``"pooling"`` makes a vector of each prompt; ``"auto"`` does what the
            checkpoint was made for.
        task: ``"embed"`` or ``"classify"`` says which vector; ``"auto"`` is the model's own, ``"generate"`` no vector.
        pooler_config: Settings of the pooler, as `PoolerConfig` has them; None for the model's own.
        dtype: ``"auto"`` (as stored, float32 on a CPU without bfloat16), ``"float32"``, ``"float16"``, ``"bfloat16"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        tensor_parallel_size: Ranks that share every matrix of a stage; it must divide the model's heads.
        pipeline_parallel_size: Stages that the layers are cut into. Every rank is a process with a device of its own.
        seed: Seed of the requests that bring none.
        max_model_len: Most tokens of prompt and output together; None for what the model was made for.
        max_num_seqs: Most requests running at once.
        max_num_batched_tokens: Most tokens computed in one step; None for a default of the device.
        block_size: Tokens per KV cache block.
        num_gpu_blocks_override: Number of KV cache blocks, on any device; None to derive it from memory.
        kv_cache_memory_bytes: Memory of the KV cache, of each rank; None to derive it from the device.
        gpu_memory_utilization: Share of a GPU's memory to use.
        enable_prefix_caching: Whether requests share the KV cache of equal prefixes.
        enable_prompt_embeds: Whether prompts may be embeddings (`EmbedsPrompt`).
        max_logprobs: Most log-probabilities a request may ask for per token; -1 for no limit.
        quantization: Scheme by which the matrices of the layers are stored and multiplied, one of those in
            engine/quantization/schemes: ``"fp8"`` (8 bits, GPU), ``"int8"`` (8 bits, CPU); None for the model's dtype.
        kv_cache_dtype: ``"auto"`` (the model's own) or ``"fp8"``, which holds twice the tokens of bfloat16.
        deterministic: Compute every token the same to the bit, whatever else is in the batch. Slower.
        enforce_eager: Run every kernel of every step from Python: no CUDA graphs on a GPU, and no tapes of recorded
            decode steps on a CPU.
        cudagraph_capture_sizes: Batch sizes to capture decode graphs for; None for a ladder up to max_num_seqs.
        load_format: ``"auto"`` reads the checkpoint; ``"dummy"`` makes random weights, for benchmarks;
            ``"sharded_state"`` reads what `LLM.save_sharded_state` wrote for the same numbers of ranks.
        num_threads: Threads of the CPU backend, of each rank; None for OMP_NUM_THREADS, or else the physical cores it
            may use, shared among the ranks of a host.
        overlap_depth: Steps planned ahead of the one whose tokens are read; None for the device's own (CPU 0, CUDA 1).
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    hf_overrides: dict[str, Any] | None = None
    generation_config: str = "auto"
    runner: str = "auto"
    task: str = "auto"
    pooler_config: dict[str, Any] | None = None
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    enable_prompt_embeds: bool = False
    max_logprobs: int = 20
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    deterministic: bool = False
    enforce_eager: bool = False
    cudagraph_capture_sizes: Sequence[int] | None = None
    load_format: str = "auto"
    num_threads: int | None = None
    overlap_depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "chat_template"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, str(value))
        if not self.model:
            raise ConfigError("model is empty; pass the folder of a model in Hugging Face's layout")
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in choices:
                raise _wrong(name, value, f"one of {', '.join(map(str, choices))}")
            object.__setattr__(self, name, choices[value])
        if self.hf_overrides is not None and not isinstance(self.hf_overrides, dict):
            raise _wrong("hf_overrides", self.hf_overrides, "a dict of config.json values")
        self._check_task()
        self._check_sizes()
        self._check_ranks()

    @property
    def num_ranks(self) -> int:
        """Processes that the engine consists of."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Makes a config from the keyword arguments of vLLM's engine.

        Args:
            **kwargs: Fields of this class, and settings of vLLM: those without effect here warn.

        Returns:
            The checked config.

        Raises:
            ConfigError: An unknown name (the message names the nearest known one), a wrong value, or a setting of
                vLLM that this release cannot honour.
        """
        config, warnings = cls._read(kwargs)
        for warning in warnings:
            logger.warning("%s", warning)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> None:
        """Checks what `from_kwargs` would be given, without its warnings.

        Raises:
            ConfigError: As `from_kwargs`.
        """
        cls._read(kwargs)

    @classmethod
    def _read(cls, kwargs: dict[str, Any]) -> tuple[EngineConfig, list[str]]:
        """Makes the config, and the warnings of settings without effect."""
        fields, warnings = {}, []
        names = {field.name for field in dataclasses.fields(cls)}
        for given, value in kwargs.items():
            name = OTHER_NAMES.get(given, given)
            if name in names:
                if value is not None:  # None asks for the default, as it does in vLLM.
                    fields[name] = value
            elif name in IGNORED:
                anyway, why = IGNORED[name]
                if value != anyway and value is not None:
                    warnings.append(f"{name}={value!r} is ignored: {why}")
            elif name in ONLY:
                if value is not None and value not in ONLY[name]:
                    allowed = " or ".join(repr(allowed) for allowed in ONLY[name])
                    raise ConfigError(f"{name}={value!r} is not supported in this release; it can be {allowed}")
            else:
                raise ConfigError(unknown_key_message("the engine", name, names | IGNORED.keys() | ONLY.keys()))
        if "model" not in fields:
            raise ConfigError("model is missing; pass the folder of a model in Hugging Face's layout")
        fields["max_model_len"] = _parse_length(fields.get("max_model_len"))
        return cls(**fields), warnings

    def _check_task(self) -> None:
        generates = self.task == "generate"
        if "auto" not in (self.runner, self.task) and generates != (self.runner == "generate"):
            raise ConfigError(f"runner={self.runner!r} and task={self.task!r} exclude each other; drop one of the two")
        if PoolerConfig.read(self.pooler_config) != PoolerConfig() and (generates or self.runner == "generate"):
            raise ConfigError("pooler_config is for engines that pool; set runner='pooling', or drop it")

    def _check_ranks(self) -> None:
        if self.deterministic and self.tensor_parallel_size > 2:
            raise ConfigError(
                f"deterministic=True with tensor_parallel_size={self.tensor_parallel_size}: a sum of more than "
                "two parts depends on their order; use at most 2, and pipeline_parallel_size for more ranks"
            )
        if self.pipeline_parallel_size > 1 and self.overlap_depth is not None:
            raise ConfigError(
                f"overlap_depth={self.overlap_depth} with pipeline_parallel_size={self.pipeline_parallel_size}: the "
                "steps under way are as many as the stages; leave overlap_depth out"
            )

    def _check_sizes(self) -> None:
        for name in ("max_num_seqs", "block_size", "tensor_parallel_size", "pipeline_parallel_size"):
            _check_at_least_one(name, getattr(self, name))
        for name in OPTIONAL_SIZES:
            if getattr(self, name) is not None:
                _check_at_least_one(name, getattr(self, name))
        if self.overlap_depth not in (None, 0, 1):
            raise _wrong("overlap_depth", self.overlap_depth, "None, 0 or 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise _wrong("gpu_memory_utilization", self.gpu_memory_utilization, "a share above 0, at most 1")
        if isinstance(self.max_logprobs, bool) or not isinstance(self.max_logprobs, int) or self.max_logprobs < -1:
            raise _wrong("max_logprobs", self.max_logprobs, "an integer of at least 0, or -1 for no limit")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        for size in self.cudagraph_capture_sizes or ():
            _check_at_least_one("cudagraph_capture_sizes", size)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise _wrong("seed", self.seed, "an integer")


SWITCHES = ("enable_prefix_caching", "enable_prompt_embeds", "skip_tokenizer_init", "deterministic", "enforce_eager")

OPTIONAL_SIZES = (
    "max_model_len",
    "max_num_batched_tokens",
    "num_gpu_blocks_override",
    "kv_cache_memory_bytes",
    "num_threads",
)


def _check_at_least_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(name, value, "an integer of at least 1")


def _parse_length(value: Any) -> Any:
    """Takes ``-1`` and ``"auto"`` for the model's own limit, and lengths such as ``"32k"``."""
    if value in (-1, "auto"):
        return None
    if isinstance(value, str) and value.lower().endswith("k") and value[:-1].isdigit():
        return int(value[:-1]) * 1024
    return value


def _wrong(name: str, given: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{name} must be {allowed}; got {given!r}")
