"""What the Triton kernels share: the GPU they are launched on, and the list of what they may be compiled into.

Nothing is tuned at run time: a launcher picks its tiles from the shapes and the target, so that a start costs no search
and every form a kernel can take is known beforehand. Each `triton.py` lists them in `specialisations(target)`; tests
compile the list for GPUs that need not be there, and check that launches keep to it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import triton


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: What its maker calls the instruction set: sm_90, gfx942.
        warp_size: Threads that run in step.
        max_shared_bytes: Shared memory that one program may have. NVIDIA: CUDA programming guide, technical
            specifications per compute capability. AMD: the LDS of a compute unit.
        num_processors: Multiprocessors, or compute units, of the largest part: what a grid has to fill.
    """

    name: str
    warp_size: int
    max_shared_bytes: int
    num_processors: int


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("sm_80", 32, 163 * 1024, 108),
            Target("sm_90", 32, 227 * 1024, 132),
            Target("gfx942", 64, 64 * 1024, 304),
        )
    }
)
"""The GPUs that every kernel is compiled for in the tests."""

TORCH_TO_TRITON: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float8_e4m3fn: "fp8e4nv",
        torch.int32: "i32",
        torch.int64: "i64",
    }
)
"""Triton's names of element types, as they stand in a signature."""


@functools.cache
def current_target() -> Target:
    """Returns the GPU that kernels are launched on; Triton's interpreter stands in for an sm_90."""
    if triton.knobs.runtime.interpret:
        return TARGETS["sm_90"]
    driver = triton.runtime.driver.active
    found, properties = driver.get_current_target(), driver.utils.get_device_properties(driver.get_current_device())
    name = f"sm_{found.arch}" if found.backend == "cuda" else str(found.arch)
    return Target(name, found.warp_size, properties["max_shared_mem"], properties["multiprocessor_count"])


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One form of a kernel that a launcher can ask Triton for.

    Attributes:
        kernel: The `@triton.jit` function.
        types: Argument -> its type in Triton's words ("*bf16", "i32", "fp32"), for all that are not in `constants`.
        constants: `tl.constexpr` argument -> value. An optional tensor that is absent stands here as None.
        options: How it is compiled: num_warps, num_stages, enable_fp_fusion.
        multiples_of_16: The integer arguments that are multiples of 16 at the sizes models have (row strides, say), so
            that the compiled code has the wide loads it will have there. Pointers always count as aligned.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = field(default=())
