"""What the machine offers: the device, its memory, its number types, its cores. The only file that asks CUDA."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import ConfigError

MAX_CPU_KV_CACHE_BYTES = 4 << 30
"""Most memory a CPU's KV cache takes by default."""

CPU_KV_CACHE_SHARE = 0.4
"""Share of the available memory that a CPU's KV cache takes by default."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the defaults that follow from it.

    Attributes:
        torch_device: Where tensors live.
        max_num_batched_tokens: Tokens per step that fill it.
        overlap_depth: Steps to plan ahead: 1 where the host can run ahead of the device.
    """

    torch_device: torch.device
    max_num_batched_tokens: int
    overlap_depth: int

    @classmethod
    def choose(cls, name: str) -> Device:
        """Finds a device.

        Args:
            name: ``"auto"`` (CUDA if there is any), ``"cpu"`` or ``"cuda"``.

        Raises:
            ConfigError: CUDA was asked for and there is none.
        """
        has_cuda = torch.cuda.is_available()
        if name == "cuda" and not has_cuda:
            raise ConfigError("device='cuda', but PyTorch finds no CUDA device; use device='cpu' or 'auto'")
        if name == "cpu" or not has_cuda:
            return cls(torch.device("cpu"), max_num_batched_tokens=2048, overlap_depth=0)
        return cls(torch.device("cuda", torch.cuda.current_device()), max_num_batched_tokens=8192, overlap_depth=1)

    @property
    def is_cpu(self) -> bool:
        """Whether this is the host itself."""
        return self.torch_device.type == "cpu"

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
            return min(MAX_CPU_KV_CACHE_BYTES, int(_available_host_bytes() * CPU_KV_CACHE_SHARE))
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free - total * (1 - utilization))


class HostCopy:
    """A tensor on its way to the host: the copy starts at once and is waited for when it is read.

    Work queued on the device after it does not delay it.

    Args:
        tensor: Anywhere; a tensor on the host is used as it is.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> torch.Tensor:
        """Returns the tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


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
