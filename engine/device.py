"""`Device`: an engine's device with its memory and dtypes, and copies to and from it; also the host's CPU cores.

Only this module asks CUDA which devices there are and how much memory they have.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

MAX_CPU_KV_CACHE_BYTES = 4 << 30
"""Most bytes of the KV cache on a CPU, if the settings give no size."""

LARGE_GPU_BYTES = 70 << 30
"""A GPU with at least this memory computes up to 16,384 tokens of up to 1024 sequences a step by default, and a smaller
GPU up to 8192 tokens of 256 sequences."""

CPU_KV_CACHE_SHARE = 0.4
"""Share of the host's available memory for the KV cache on a CPU, if the settings give no size."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of the parameters of `mallopt`, as malloc.h of glibc defines them."""

_KEPT_BYTES = 256 << 20
"""Larger allocations, such as weights, are still returned to the operating system when they are freed."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the default settings for it.

    Attributes:
        torch_device: The device of the model's tensors.
        max_num_batched_tokens: Default of the most tokens in a step: as many as use the device fully.
        overlap_depth: Default of the number of steps to plan ahead: 1 for a GPU, which computes by itself, else 0.
        is_large: Whether it is a GPU with at least `LARGE_GPU_BYTES` of memory.
        num_sharing: Number of ranks of one engine that share the host's cores, and on a CPU also its memory.
    """

    torch_device: torch.device
    max_num_batched_tokens: int
    overlap_depth: int
    is_large: bool = False
    num_sharing: int = 1

    @classmethod
    def choose(cls, name: str, index: int | None = None) -> Device:
        """Returns the device that the settings ask for.

        Args:
            name: ``"cpu"``, ``"cuda"``, or ``"auto"`` for CUDA where PyTorch finds a CUDA device.
            index: Index of the GPU, which becomes PyTorch's current device; None for the current device.

        Raises:
            ConfigError: The name is ``"cuda"``, and PyTorch finds no CUDA device.
        """
        has_cuda = torch.cuda.is_available()
        if name == "cuda" and not has_cuda:
            raise ConfigError("device='cuda', but PyTorch finds no CUDA device; use device='cpu' or 'auto'")
        if name == "cpu" or not has_cuda:
            return cls(torch.device("cpu"), max_num_batched_tokens=2048, overlap_depth=0)
        if index is not None:
            torch.cuda.set_device(index)
        device = torch.device("cuda", torch.cuda.current_device())
        is_large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU_BYTES
        return cls(device, 16_384 if is_large else 8192, overlap_depth=1, is_large=is_large)

    def check_enough(self, num_ranks: int) -> None:
        """Checks that this host has a GPU for each rank; a CPU serves any number of ranks.

        Args:
            num_ranks: Number of ranks on this host.

        Raises:
            ConfigError: The host has fewer GPUs than ranks.
        """
        if not self.is_cpu and torch.cuda.device_count() < num_ranks:
            raise ConfigError(
                f"tensor_parallel_size x pipeline_parallel_size is {num_ranks}, and this host has "
                f"{torch.cuda.device_count()} GPUs; lower one of them, use device='cpu', or spread the ranks "
                "over hosts with Ray"
            )

    def shared_by(self, num_ranks: int) -> Device:
        """Returns a copy of the device for one of `num_ranks` ranks that share its host."""
        return replace(self, num_sharing=num_ranks)

    @property
    def default_num_threads(self) -> int:
        """Default number of threads of a rank: its share of the host's cores, at least 1."""
        return max(1, default_num_threads() // self.num_sharing)

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.torch_device.type == "cpu"

    @property
    def supports_fp8(self) -> bool:
        """Whether fp8 matrices can be multiplied: NVIDIA GPUs since Ada and Hopper, and CPUs (slowly, for tests)."""
        if self.is_cpu:
            return True
        return torch.version.hip is None and torch.cuda.get_device_capability(self.torch_device) >= (8, 9)

    def resolve_dtype(self, asked: str, stored: torch.dtype | None) -> torch.dtype:
        """Returns the dtype of weights and activations.

        Args:
            asked: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"`` for the dtype of the checkpoint. On a CPU
                that has no fast arithmetic for the dtype of the checkpoint, ``"auto"`` gives float32.
            stored: Dtype of the checkpoint; None if the model's config does not say, which counts as float32.
        """
        if asked != "auto":
            return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[asked]
        if stored is None or stored == torch.float64:
            stored = torch.float32
        if not self.is_cpu or stored == torch.float32:
            return stored
        return torch.bfloat16 if stored == torch.bfloat16 and has_bfloat16_arithmetic() else torch.float32

    def free_memory_bytes(self, utilization: float) -> int:
        """Returns the number of bytes that the KV cache may take.

        Args:
            utilization: Share of a GPU's memory that the engine may use. On a GPU the result is the unused rest of this
                share. On a CPU it is a fixed share of the host's available memory.
        """
        if self.is_cpu:
            most = min(MAX_CPU_KV_CACHE_BYTES, int(_available_host_bytes() * CPU_KV_CACHE_SHARE))
            return most // self.num_sharing
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - total * (1 - utilization))

    def used_memory_bytes(self) -> int:
        """Returns the number of bytes of the GPU's memory that all processes together use."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free

    def measure_peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs a function on a GPU and returns the most bytes that it needed at any moment, beyond the bytes in use.

        Afterwards PyTorch returns the memory that the function has freed to the GPU.

        Args:
            work: The function.
        """
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        work()
        torch.cuda.synchronize(self.torch_device)
        peak = torch.cuda.max_memory_reserved(self.torch_device)
        torch.cuda.empty_cache()
        return peak - before


def share_current_device() -> Callable[[], None]:
    """Returns a function that makes the current GPU of this thread that of the thread which calls the function.

    Each thread has its own current GPU, at first GPU 0, and Triton launches kernels there, wherever their tensors are.
    """
    if not torch.cuda.is_initialized():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def num_accelerators() -> int:
    """Returns the number of GPUs that this process sees."""
    return torch.cuda.device_count()


def gpu_with_shared_sums(device: torch.device) -> str | None:
    """Returns a name that only this GPU has; None if torch has no kernels that add up memory shared with other GPUs."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def repeat_until_idle(work: Callable[[], None], device: torch.device, timeout_s: float) -> None:
    """Runs a function on a GPU, beside the queued work and until that has ended, at most `timeout_s` seconds.

    Args:
        work: A function that queues work which needs none of the work that is queued already.
        device: The GPU.
        timeout_s: Most seconds.
    """
    deadline = time.monotonic() + timeout_s
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        while not torch.cuda.default_stream(device).query() and time.monotonic() < deadline:
            work()
            torch.cuda.current_stream().synchronize()


def memory_bytes(device: torch.device) -> int:
    """Returns the bytes that a GPU has, or that the host has available; no model can take more."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return sys.maxsize if device.type == "meta" else _available_host_bytes()


def to_device(values: Sequence[Any] | np.ndarray | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of numbers on a device. The host does not wait for the copy.

    A copy to a GPU reads from pinned memory, because the host would have to wait for a copy from other memory. PyTorch
    keeps the pinned memory until the copy is done.

    Args:
        values: Numbers as a nested list, an array or a tensor. On a CPU the result may share the memory of an array or
            a tensor, so the caller must not change it afterwards.
        dtype: Dtype of the result.
        device: Device of the result.

    Returns:
        A tensor with the shape of `values`.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A copy of tensors to the host that was started and may still be running.

    Attributes:
        sources: Tensors on the device. They are kept, so that their memory is not reused before they are copied.
        tensors: Tensors on the host that they are copied to.
        is_done: Event that occurs when the copy is done; None if the tensors can be read at once.
    """

    sources: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    is_done: torch.cuda.Event | None

    def is_ready(self) -> bool:
        """Returns whether the tensors have been copied to the host, so that `wait` returns at once."""
        return self.is_done is None or bool(self.is_done.query())

    def wait(self) -> list[np.ndarray]:
        """Waits until the tensors have been copied to the host, and returns them as arrays.

        The host waits for the device nowhere else.
        """
        if self.is_done is not None:
            self.is_done.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


class HostCopies:
    """Copies results to the host on a separate CUDA stream, so that a copy does not wait for work queued after it.

    Args:
        device: Device of the results.
        are_read: Whether anything reads the results on this rank; if not, nothing is copied.
    """

    def __init__(self, device: torch.device, *, are_read: bool = True) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and are_read else None

    def start(self, *tensors: Tensor) -> HostCopy:
        """Starts a copy of tensors to the host, which runs after the work that is queued so far."""
        if self._stream is None:
            return HostCopy(tensors, tensors, None)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            hosts = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            return HostCopy(tensors, hosts, self._stream.record_event())


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for later allocations instead of returning it to the operating system.

    The results of a step are some megabytes each. By default the kernel would map and zero new memory for each of them,
    which takes 3 % of the time of a step of prompts. The function does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Returns memory that the C library keeps for later allocations to the operating system; used while loading.

    The function does nothing if the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def has_bfloat16_arithmetic() -> bool:
    """Returns whether this CPU has instructions that multiply bfloat16 (AVX512_BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_num_threads() -> int:
    """Returns the default number of threads: the number of physical cores, or OMP_NUM_THREADS if that is smaller."""
    return min(num_physical_cores(), torch.get_num_threads())


def num_physical_cores() -> int:
    """Returns the number of physical cores that this process may use; hardware threads of a core count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


def _available_host_bytes() -> int:
    """Returns the number of bytes that the host, or the container of this process, has available."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)
