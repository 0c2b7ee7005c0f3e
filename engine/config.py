"""`EngineConfig`: the settings of one engine, with the names and defaults of vLLM's keyword arguments.

Sizes that depend on the model, such as the length limit and the number of KV cache blocks, may be None here. They are
computed when the model is loaded.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .errors import ConfigError, quote, unknown_key_message
from .loading.hub import HubSettings
from .pooling.config import PoolerConfig
from .pooling.params import POOLING_TASKS
from .quantization.registry import quantization_names
from .shown import without_secrets

logger = logging.getLogger(__name__)

DEFAULT_MAX_NUM_SEQS, LARGE_MAX_NUM_SEQS = 256, 1024
"""Default of `max_num_seqs`: in general, and the most on a large GPU."""

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
    "quantization": {None: None, **quantization_names()},
    "runner": {"auto": "auto", "generate": "generate", "pooling": "pooling"},
    "task": {
        "auto": "auto",
        "none": "auto",
        "generate": "generate",
        "embedding": "embed",
        **{name: name for name in (*POOLING_TASKS, "score", "reward")},
    },
    "model_impl": {
        **{name: name for name in ("auto", "millrace", "transformers")},
        "vllm": "millrace",
    },
    "kv_cache_dtype": {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8", "int8": "int8"},
    "load_format": {
        "auto": "auto",
        "safetensors": "auto",
        "pt": "auto",
        "gguf": "auto",
        "dummy": "dummy",
        "sharded_state": "sharded_state",
    },
}
"""Fields that take one of a few values: field -> (value that may be given -> value that the field then holds)."""

IGNORED: dict[str, tuple[Any, str]] = {
    "swap_space": (0, "preempted requests are recomputed, never swapped"),
    "disable_log_stats": (True, "statistics are returned as data by stats()"),
    "enable_chunked_prefill": (True, "prompts are always prefilled in chunks when they exceed the token budget"),
    "disable_custom_all_reduce": (False, "GPUs of a host add up in shared memory where torch can, and else by NCCL"),
    "compilation_config": (None, "kernels have no variants to choose; they are compiled while the weights are read"),
    "optimization_level": (None, "kernels have no variants to choose; they are compiled while the weights are read"),
    "max_seq_len_to_capture": (None, "graphs serve sequences of any length"),
    "use_v2_block_manager": (True, "there is one block manager"),
    "scheduler_reserve_full_isl": (True, "a request always enters only when its whole prompt fits"),
    "tokenizer_mode": ("auto", "the fast tokenizer is used when there is one"),
    "distributed_executor_backend": (None, "an engine starts its ranks itself; on Ray the pool starts them"),
    "async_scheduling": (None, "the overlap of host and device follows the device"),
    "use_tqdm_on_load": (True, "weights load without a bar"),
    "ignore_patterns": (None, "copies of weights that are not read are not downloaded"),
    "hf_token": (None, "credentials are read from the environment: HF_TOKEN"),
    "limit_mm_per_prompt": (None, "this release takes text only"),
    "served_model_name": (None, "the engine has no server"),
    "performance_mode": ("throughput", "the engine is made for batch throughput"),
    "disable_log_requests": (True, "requests are never logged"),
    "prefix_caching_hash_algo": (None, "the hash function of blocks cannot be chosen"),
    "watermark": (0.0, "no blocks are held back"),
    "long_prefill_token_threshold": (0, "a long prompt may take a whole step"),
    "allowed_local_media_path": ("", "this release takes text only"),
    "allowed_media_domains": (None, "this release takes text only"),
    "mm_processor_kwargs": (None, "this release takes text only"),
    "mm_processor_cache_gb": (None, "this release takes text only"),
    "structured_outputs_config": (None, "one library handles all grammars; see structured_outputs"),
    "lora_dtype": ("auto", "adapters have the dtype of the model"),
    "lora_extra_vocab_size": (0, "an adapter cannot add tokens to the vocabulary; one that does is refused"),
    "fully_sharded_loras": (False, "each rank has the part of an adapter that belongs to its part of the model"),
    "specialize_active_lora": (False, "one kernel serves any number of adapters"),
}
"""Settings of vLLM without effect -> (the value that describes the engine, the reason why other values warn)."""

ONLY: dict[str, tuple[Any, ...]] = {
    "data_parallel_size": (1,),
    "default_mm_loras": (None, {}),
    "enable_lora_bias": (False,),
    "enable_tower_connector_lora": (False,),
    "long_lora_scaling_factors": (None, (), []),
    "lora_target_modules": (None, []),
    "speculative_config": (None,),
    "cpu_offload_gb": (0,),
    "scheduling_policy": ("fcfs", "priority"),
    "logprobs_mode": ("raw_logprobs",),
    "logits_processors": (None, []),
    "override_generation_config": (None, {}),
    "enable_sleep_mode": (False,),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "spec_model": (None,),
    "spec_method": (None,),
    "kv_offloading_size": (None,),
    "hf_config_path": (None,),
    "config_format": ("auto", "hf"),
    "code_revision": (None,),
    "model_loader_extra_config": (None, {}),
    "enable_eplb": (False,),
    "disable_sliding_window": (False,),
}
"""Settings of vLLM with values that this release does not support -> the values that it supports."""

OTHER_NAMES = {"convert": "task", "override_pooler_config": "pooler_config"}
"""Names that vLLM has, or once had, for fields of `EngineConfig` -> the names of the fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: Folder of the model in Hugging Face's layout, GGUF file, URL of one of them, name on a hub
            (``"org/name"``), or ``"bundled:NAME"``.
        tokenizer: Folder, GGUF file, URL or name of the tokenizer; None for the model's own.
        revision: Branch, tag or commit of a model of a hub; None for the newest version.
        tokenizer_revision: The same of the tokenizer; None for the newest version, or for `revision` if the tokenizer
            is the model's own.
        download_dir: Folder into which models of a hub are downloaded; None for the cache of the hub's library.
        skip_tokenizer_init: Whether no tokenizer is loaded. Prompts must then be token ids, and outputs have no text.
        chat_template: Jinja text, or path of a file with it, that replaces the tokenizer's chat template.
        hf_overrides: Values that replace values of the model's config.json, `architectures` included. `LLM` also takes
            a function from the transformers config to the one that is used, which other ranks must be able to import.
        model_impl: Whose code runs the model: ``"millrace"`` for our own families, ``"transformers"`` for a module of
            transformers with our paged attention inside it, ``"auto"`` for the first where there is one.
        trust_remote_code: Whether Python code in the model's folder may run. Only models that neither Millrace nor
            transformers has need it.
        generation_config: ``"auto"`` reads the default sampling parameters from the model's generation_config.json;
            ``"vllm"`` takes the defaults of `SamplingParams`.
        runner: ``"generate"`` generates tokens, ``"pooling"`` makes a vector of each prompt; ``"auto"`` takes the
            runner that the checkpoint was made for.
        task: ``"generate"``, ``"embed"`` (the vector is an embedding) or ``"classify"`` (the vector holds the
            probabilities of classes); ``"token_embed"`` and ``"token_classify"`` make a vector of each token where a
            request names no task. ``"score"`` classifies with a classifier and else embeds, ``"reward"`` classifies.
            ``"auto"`` takes the task that the checkpoint was made for.
        pooler_config: Fields of `PoolerConfig`; None for the settings in the model's folder.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"`` for the dtype of the checkpoint (float32 on a
            CPU that has no arithmetic for that dtype).
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for CUDA where it is available.
        tensor_parallel_size: Number of ranks that share every matrix of a pp stage; it must divide the numbers of the
            model's heads. Every rank is a process with a device of its own.
        pipeline_parallel_size: Number of pp stages that the layers are divided into.
        enable_expert_parallel: Whether each rank of a pp stage has whole experts of a model with experts; otherwise
            it has a slice of each. `tensor_parallel_size` must then divide the number of experts.
        seed: Seed from which the seeds of requests without a seed are derived.
        max_model_len: Most tokens of prompt and output together; None for the limit of the model.
        max_num_seqs: Most sequences running at once; None for 256, or on a GPU of at least 70 GiB for up to 1024, if
            the KV cache holds so many of 1024 tokens.
        max_num_batched_tokens: Most tokens computed in one step; None for the default of the device.
        block_size: Number of tokens in a KV cache block.
        num_gpu_blocks_override: Number of KV cache blocks, on any device; None to derive it from the memory.
        kv_cache_memory_bytes: Size of each rank's KV cache in bytes; None to derive it from the device's memory.
        gpu_memory_utilization: Share of a GPU's memory that the engine uses, above 0, at most 1.
        enable_prefix_caching: Whether sequences share the KV cache blocks of equal prompt beginnings.
        enable_lora: Whether requests may name LoRA adapters (`LoRARequest`).
        max_loras: Most adapters of the sequences that run at once, each of which is in an adapter slot on the device.
        max_lora_rank: Largest rank of an adapter's matrices, at most 512; each adapter slot has room for it.
        max_cpu_loras: Most adapters in the memory of the host; None for twice `max_loras`, so that
            the next adapters are read while others run.
        enable_prompt_embeds: Whether prompts may be embeddings (`EmbedsPrompt`).
        max_logprobs: Most log-probabilities that a request may ask for, for each token; -1 for no limit.
        quantization: Name of the scheme by which the matrices of linear layers are stored and multiplied, a file in
            engine/quantization/schemes: ``"int8"`` (8 bits), ``"fp8"`` (8 bits, GPU) or ``"int4"`` (4 bits; 8 in the
            output head and the token embedding); None for none.
        kv_cache_dtype: ``"auto"`` (the model's dtype), or 8 bits, which hold twice as many tokens as bfloat16:
            ``"fp8"``, whose heads have scales from the checkpoint (``k_scale`` and ``v_scale``) or chosen at load from
            fixed prompts, or on a CPU ``"int8"``, which is nearer to 16 bits, and whose scales are always chosen.
        deterministic: Whether the result of a token is the same to the bit in any batch. This is slower.
        enforce_eager: Whether every kernel of every step is launched from Python: a GPU then uses no CUDA graphs, and a
            CPU no tapes of recorded decode steps.
        cudagraph_capture_sizes: Numbers of sequences that decode steps are recorded for as CUDA graphs; None for a
            series of numbers up to max_num_seqs.
        load_format: ``"auto"`` reads the checkpoint; ``"dummy"`` makes random weights, for benchmarks;
            ``"sharded_state"`` reads files of `LLM.save_sharded_state`, written with the same numbers of ranks.
        num_threads: Number of threads that each rank computes with on a CPU. None for OMP_NUM_THREADS, or else for the
            physical cores that the process may use, divided among the ranks of a host.
        overlap_depth: Number of steps that are started before the tokens of an earlier one are read; None for the
            default of the device (0 on a CPU, 1 on CUDA).
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    hf_overrides: dict[str, Any] | Callable[[Any], Any] | None = None
    model_impl: str = "auto"
    trust_remote_code: bool = False
    generation_config: str = "auto"
    runner: str = "auto"
    task: str = "auto"
    pooler_config: dict[str, Any] | None = None
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
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
        for name in ("model", "tokenizer", "chat_template", "revision", "tokenizer_revision", "download_dir"):
            value = getattr(self, name)
            if not isinstance(value, str | PathLike | None) or "\0" in str(value):
                raise _wrong(name, value, "a path or a text without a zero byte")
            if value is not None:
                object.__setattr__(self, name, str(value))
        if not self.model:
            raise ConfigError("model is empty; pass the folder of a model in Hugging Face's layout")
        if type(self.dtype).__module__ == "torch":
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in choices:
                raise _wrong(name, value, f"one of {', '.join(map(str, choices))}")
            object.__setattr__(self, name, choices[value])
        self._check_task()
        self._check_sizes()
        self._check_adapters()
        self._check_ranks()
        self._check_overrides()

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return f"EngineConfig({', '.join(f'{name}={value!r}' for name, value in without_secrets(given).items())})"

    @property
    def hub(self) -> HubSettings:
        """The settings with which the model is downloaded from a hub."""
        return HubSettings(self.revision, self.download_dir)

    @property
    def tokenizer_hub(self) -> HubSettings:
        """The settings with which the tokenizer is downloaded from a hub."""
        own = self.revision if self.tokenizer is None else None
        return HubSettings(self.tokenizer_revision or own, self.download_dir)

    @property
    def num_ranks(self) -> int:
        """Number of processes that the engine consists of."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def model_code(self) -> dict[str, Any]:
        """The settings that say whose code runs the model, as keyword arguments of `load_hf_config`."""
        return {"model_impl": self.model_impl, "trust_remote_code": self.trust_remote_code}

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Makes a config from the keyword arguments of vLLM's engine.

        Args:
            **kwargs: Fields of this class, and other settings of vLLM. A setting without effect here logs a warning.

        Returns:
            The checked config.

        Raises:
            ConfigError: A name is unknown (the message gives the nearest known one), a value is wrong, or this release
                cannot honour a setting of vLLM.
        """
        config, warnings = cls._read(kwargs)
        for warning in warnings:
            logger.warning("%s", warning)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> None:
        """Checks keyword arguments for `from_kwargs`, without logging its warnings.

        Raises:
            ConfigError: As in `from_kwargs`.
        """
        cls._read(kwargs)

    @classmethod
    def _read(cls, kwargs: dict[str, Any]) -> tuple[EngineConfig, list[str]]:
        """Returns the config, and the warnings about settings without effect."""
        fields: dict[str, Any] = {}
        warnings: list[str] = []
        names = {field.name for field in dataclasses.fields(cls)}
        for given, value in kwargs.items():
            name = OTHER_NAMES.get(given, given)
            if name in names:
                if value is not None:  # None asks for the default, as it does in vLLM.
                    fields[name] = _one_value(name, fields.get(name), value)
            elif name in IGNORED:
                anyway, why = IGNORED[name]
                if value is not None and not _is_one_of(value, (anyway,)):
                    shown = without_secrets({name: value})[name]
                    warnings.append(f"{name}={quote(shown)} is ignored: {why}")
            elif name in ONLY:
                if value is not None and not _is_one_of(value, ONLY[name]):
                    allowed = " or ".join(repr(allowed) for allowed in ONLY[name])
                    raise ConfigError(f"{name}={quote(value)} is not supported in this release; it can be {allowed}")
            else:
                raise ConfigError(unknown_key_message("the engine", name, names, IGNORED.keys() | ONLY.keys()))
        if "model" not in fields:
            raise ConfigError("model is missing; pass the folder of a model in Hugging Face's layout")
        fields["max_model_len"] = _parse_length(fields.get("max_model_len"))
        config = cls(**fields)
        if not config.enable_lora:
            warnings += [
                f"{name}={fields[name]} is ignored: enable_lora is off" for name in ADAPTER_SIZES if name in fields
            ]
        return config, warnings

    def _check_overrides(self) -> None:
        overrides = self.hf_overrides
        if not isinstance(overrides, dict | None) and not callable(overrides):
            raise _wrong("hf_overrides", overrides, "a dict of config.json values, or a function of the config")
        if callable(overrides) and self.num_ranks > 1 and not _is_importable(overrides):
            raise ConfigError(
                f"hf_overrides={quote(overrides)} cannot be sent to {self.num_ranks} ranks; define the function in a "
                "module that they can import, or pass a dict"
            )

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
                "number of steps in flight is the number of pp stages; leave overlap_depth out"
            )

    def _check_adapters(self) -> None:
        most = self.max_cpu_loras
        if self.enable_lora and most is not None and most < self.max_loras:
            raise ConfigError(
                f"max_cpu_loras={most} is less than max_loras={self.max_loras}: an adapter on the device is in the "
                "memory of the host too; raise max_cpu_loras, or leave it out"
            )

    def _check_sizes(self) -> None:
        for name in ("block_size", "tensor_parallel_size", "pipeline_parallel_size", "max_loras", "max_lora_rank"):
            _check_at_least_one(name, getattr(self, name))
        for name in OPTIONAL_SIZES:
            if getattr(self, name) is not None:
                _check_at_least_one(name, getattr(self, name))
        if not _is_one_of(self.overlap_depth, (None, 0, 1)):
            raise _wrong("overlap_depth", self.overlap_depth, "None, 0 or 1")
        utilization = self.gpu_memory_utilization
        if not isinstance(utilization, int | float) or isinstance(utilization, bool) or not 0 < utilization <= 1:
            raise _wrong("gpu_memory_utilization", self.gpu_memory_utilization, "a share above 0, at most 1")
        if not _is_integer(self.max_logprobs, -1, 2**31 - 1):
            raise _wrong("max_logprobs", self.max_logprobs, "an integer of at least 0, or -1 for no limit")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        sizes = self.cudagraph_capture_sizes
        if not isinstance(sizes, list | tuple | None):
            raise _wrong("cudagraph_capture_sizes", sizes, "a list of integers")
        for size in sizes or ():
            _check_at_least_one("cudagraph_capture_sizes", size)
        if not _is_integer(self.seed, -(2**63), 2**63 - 1):
            raise _wrong("seed", self.seed, "an integer of at most 64 bits")


SWITCHES = (
    "enable_expert_parallel",
    "enable_lora",
    "enable_prefix_caching",
    "enable_prompt_embeds",
    "skip_tokenizer_init",
    "deterministic",
    "enforce_eager",
    "trust_remote_code",
)

LARGEST = {
    "num_threads": 1024,
    "tensor_parallel_size": 1024,
    "pipeline_parallel_size": 1024,
    "max_num_seqs": 1 << 20,
    "block_size": 1 << 20,
    "kv_cache_memory_bytes": 1 << 50,
    "max_loras": 1024,
    "max_lora_rank": 512,
    "max_cpu_loras": 1 << 20,
}
"""Largest values of sizes for each unit of which threads, processes or memory are taken; 2**31 - 1 for the others."""

OPTIONAL_SIZES = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_gpu_blocks_override",
    "kv_cache_memory_bytes",
    "num_threads",
    "max_cpu_loras",
)

ADAPTER_SIZES = ("max_loras", "max_lora_rank", "max_cpu_loras")
"""Settings that only an engine with `enable_lora` reads."""


def _one_value(name: str, first: Any, second: Any) -> Any:
    """Returns the value of a field that may be given under two names; the values that leave it open are replaced."""
    open_values = (None, "auto", "none")
    if _is_one_of(first, open_values) or _is_one_of(second, (first, *open_values)):
        return second if _is_one_of(first, open_values) else first
    other = next(other for other, field in OTHER_NAMES.items() if field == name)
    raise ConfigError(f"{name} and {other} are two names of one setting, and differ; keep one")


def _check_at_least_one(name: str, value: Any) -> None:
    most = LARGEST.get(name, 2**31 - 1)
    if not _is_integer(value, 1, most):
        raise _wrong(name, value, f"an integer of at least 1, at most {most}")


def _is_importable(function: Any) -> bool:
    """Returns whether another process, which does not run this script, can get a function by its name."""
    try:
        return b"__main__" not in pickle.dumps(function)
    except Exception:  # noqa: BLE001  # The object can raise anything.
        return False


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Returns whether a value of any type is one of some plain values; arrays and the like equal none of them."""
    return isinstance(value, bool | int | float | str | list | tuple | dict | None) and value in allowed


def _parse_length(value: Any) -> Any:
    """Returns None for ``-1`` and ``"auto"``, which ask for the model's limit, and the number for e.g. ``"32k"``."""
    if _is_one_of(value, (-1, "auto")):
        return None
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}[kK]", value):
        return int(value[:-1]) * 1024
    return value


def _wrong(name: str, given: Any, allowed: str) -> ConfigError:
    return ConfigError(f"{name} must be {allowed}; got {quote(given)}")
