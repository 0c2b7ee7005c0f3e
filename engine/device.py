"""What the machine offers: the device, its memory, its number types, its cores. The only file that asks CUDA."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError

MAX_CPU_KV_CACHE_BYTES = 4 << 30
"""Most memory a CPU's KV cache takes by default."""

LARGE_GPU_BYTES = 70 << 30
"""Memory from which a GPU takes prompts in steps of 16,384 tokens."""

CPU_KV_CACHE_SHARE = 0.4
"""Share of the available memory that a CPU's KV cache takes by default."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""

_KEPT_BYTES = 256 << 20
"""Larger allocations than this, weights for one, still go back to the system when they are freed."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the defaults that follow from it.

    Attributes:
        torch_device: Where tensors live.
        max_num_batched_tokens: Tokens per step that fill it.
        overlap_depth: Steps to plan ahead: 1 where the host can run ahead of the device.
        num_sharing: Ranks of one engine that share the host's cores, and on a CPU its memory.
    """

    torch_device: torch.device
    max_num_batched_tokens: int
    overlap_depth: int
    num_sharing: int = 1

    @classmethod
    def choose(cls, name: str, index: int | None = None) -> Device:
        """Finds a device.

        Args:
            name: ``"auto"`` (CUDA if there is any), ``"cpu"`` or ``"cuda"``.
            index: Which GPU, made the current one; None for the one that is current.

        Raises:
            ConfigError: CUDA was asked for and there is none.
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
        return cls(device, max_num_batched_tokens=16_384 if is_large else 8192, overlap_depth=1)

    def check_enough(self, num_ranks: int) -> None:
        """Checks that every one of so many ranks on this host can have a device of its own.

        Raises:
            ConfigError: There are too few GPUs.
        """
        if not self.is_cpu and torch.cuda.device_count() < num_ranks:
            raise ConfigError(
                f"tensor_parallel_size x pipeline_parallel_size is {num_ranks}, and this host has "
                f"{torch.cuda.device_count()} GPUs; lower one of them, use device='cpu', or spread the ranks "
                "over hosts with Ray"
            )

    def shared_by(self, num_ranks: int) -> Device:
        """Returns the same device, for one of several ranks on its host."""
        return replace(self, num_sharing=num_ranks)

    @property
    def default_num_threads(self) -> int:
        """Threads to compute with: this rank's share of the cores."""
        return max(1, default_num_threads() // self.num_sharing)

    @property
    def is_cpu(self) -> bool:
        """Whether this is the host itself."""
        return self.torch_device.type == "cpu"

    @property
    def supports_fp8(self) -> bool:
        """Whether matrices can be multiplied in 8 bits: NVIDIA from Ada and Hopper on; on a CPU slowly, for tests."""
        if self.is_cpu:
            return True
        return torch.version.hip is None and torch.cuda.get_device_capability(self.torch_device) >= (8, 9)

    def resolve_dtype(self, asked: str, stored: torch.dtype | None) -> torch.dtype:
        """Chooses the number type of weights and activations.

        Args:
            asked: A name, or ``"auto"`` for as stored. A CPU has no arithmetic for float16, and some none for bfloat16:
                there ``"auto"`` means float32.
            stored: Of the checkpoint; None if its config does not say.
        """
        if asked != "auto":
            return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[asked]
        stored = stored or torch.float32
        if not self.is_cpu or stored == torch.float32:
            return stored
        return torch.bfloat16 if stored == torch.bfloat16 and has_bfloat16_arithmetic() else torch.float32

    def free_memory_bytes(self, utilization: float) -> int:
        """Returns the bytes a KV cache may take: on a GPU what is left of its share, on a CPU a share of the host's."""
        if self.is_cpu:
            most = min(MAX_CPU_KV_CACHE_BYTES, int(_available_host_bytes() * CPU_KV_CACHE_SHARE))
            return most // self.num_sharing
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - total * (1 - utilization))

    def used_memory_bytes(self) -> int:
        """Returns the bytes of a GPU that are in use, by whomever."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free

    def measure_peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs something on a GPU and returns the most memory it took at any moment; what it freed is given back."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        work()
        torch.cuda.synchronize(self.torch_device)
        peak = torch.cuda.max_memory_reserved(self.torch_device)
        torch.cuda.empty_cache()
        return peak - before


def num_accelerators() -> int:
    """Returns the number of GPUs that this process sees."""
    return torch.cuda.device_count()


def to_device(values: Sequence[Any] | np.ndarray | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sends numbers to the device without waiting for it.

    A copy to a GPU starts from pinned memory, or else the host would wait for it. PyTorch keeps that memory until the
    copy is done.

    Args:
        values: Numbers, nested as a tensor is. The result may share the memory of an array or a tensor on a CPU: leave
            that as it is.
        dtype: Of the result.
        device: Where to.

    Returns:
        A tensor of the shape of `values`.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Tensors on their way to the host.

    Attributes:
        sources: The tensors; kept, so that their memory is not used for others before they are copied.
        tensors: What they are copied to, on the host.
        is_done: What to wait for before reading; None if there is nothing to wait for.
    """

    sources: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    is_done: torch.cuda.Event | None

    def is_ready(self) -> bool:
        """Returns whether `wait` would return at once."""
        return self.is_done is None or bool(self.is_done.query())

    def wait(self) -> list[np.ndarray]:
        """Returns what the tensors hold. This is the one place where the host waits for the device."""
        if self.is_done is not None:
            self.is_done.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


class HostCopies:
    """Copies results to the host on a stream of its own, so that they do not wait for work that is queued after them.

    Args:
        device: Where the results are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, *tensors: Tensor) -> HostCopy:
        """Starts to copy tensors as they will be when the work queued so far is done."""
        if self._stream is None:
            return HostCopy(tensors, tensors, None)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            hosts = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for host, tensor in zip(hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            return HostCopy(tensors, hosts, self._stream.record_event())


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for the next allocation, in place of giving it back to the system.

    The results of a step are some megabytes each. By default each would be mapped, and zeroed by the kernel, anew: 3 %
    of a step of prompts. Other C libraries than glibc have no such switch, and stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def has_bfloat16_arithmetic() -> bool:
    """Returns whether this CPU multiplies bfloat16 natively (AVX512_BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_num_threads() -> int:
    """Returns the threads to compute with: the physical cores, or fewer if OMP_NUM_THREADS says so (torch reads it)."""
    return min(num_physical_cores(), torch.get_num_threads())


def num_physical_cores() -> int:
    """Returns the number of physical cores this process may run on; siblings of one core count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


def _available_host_bytes() -> int:
    """Reads what the host, or the container this runs in, has left."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)
