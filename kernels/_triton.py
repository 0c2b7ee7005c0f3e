"""Types that the Triton kernels share: the GPU they are launched on, and the forms they may be compiled into.

Nothing is tuned at run time. A launcher chooses its tiles from the shapes and the target, so no time is spent on a
search, and every form that a kernel can take is known beforehand. Each `triton.py` lists its forms in
`specialisations(target)`. Tests compile the listed forms without a GPU, and check that every launch uses one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: The vendor's name of the instruction set: sm_90, gfx942.
        warp_size: The number of threads that run in lockstep.
        max_shared_bytes: The most shared memory of one program. NVIDIA: CUDA programming guide, technical
            specifications per compute capability. AMD: the LDS of a compute unit.
        num_processors: The number of multiprocessors, or compute units, of the largest model. A grid should fill them.
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
"""The GPUs for which the tests compile every kernel."""

TORCH_TO_TRITON: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float8_e4m3fn: "fp8e4nv",
        torch.int8: "i8",
        torch.int32: "i32",
        torch.int64: "i64",
        torch.uint8: "u8",
    }
)
"""Triton's names of element types in a signature."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel. If its tensors are on the meta device, the kernel is compiled and does not run.

    All kernels are launched here, so a step on the meta device compiles the forms that a step on the GPU launches
    (`ahead.py`).

    Args:
        kernel: The `@triton.jit` function.
        grid: Numbers of programs.
        *args: The arguments of the kernel, at least one tensor among them.
        **options: Compile-time arguments, and the options of the launch.
    """
    if next(arg for arg in args if isinstance(arg, Tensor)).is_meta:
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


def varying(sizes: Sequence[str] = (), pointers: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the options of `triton.jit` for arguments whose values change between the steps of one model.

    By default, Triton compiles another form for an integer that is 1 or a multiple of 16, and for a pointer that is not
    a multiple of 16 bytes. A step would then wait for a compilation whenever it is the first with such a value.

    Args:
        sizes: Names of integers, such as numbers of sequences and widths of tables.
        pointers: Names of tensors that may begin anywhere, such as one row of a tensor with an odd number of columns.
    """
    return {"do_not_specialize": list(sizes), "do_not_specialize_on_alignment": list(pointers)}


class Layout(NamedTuple):
    """What a launch depends on of a tensor: its shape, its strides in elements, and its dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Returns the layout of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its grid and all of its arguments but tensors, which come first.

    Choosing these takes the host longer than launching the kernel. Launchers therefore make a `Launch` from the shapes,
    strides and dtypes of a call in a function with a cache, because all layers of a step make the same call.

    Attributes:
        kernel: The kernel.
        grid: Numbers of programs.
        values: The arguments after the tensors.
        options: The options of the launch.
    """

    kernel: Any
    grid: tuple[int, ...]
    values: tuple[Any, ...]
    options: Mapping[str, Any]

    def run(self, *tensors: Any) -> None:
        """Launches the kernel with its tensors; None stands for a tensor that is absent."""
        launch(self.kernel, self.grid, *tensors, *self.values, **self.options)


MAX_PLANS = 256
"""Most launches that a launcher keeps: those of the last steps, which differ in their numbers of tokens."""


@functools.cache
def current_target() -> Target:
    """Returns the GPU that kernels are launched on. Triton's interpreter counts as an sm_90."""
    if triton.knobs.runtime.interpret:
        return TARGETS["sm_90"]
    driver = triton.runtime.driver.active
    found, properties = driver.get_current_target(), driver.utils.get_device_properties(driver.get_current_device())
    name = f"sm_{found.arch}" if found.backend == "cuda" else str(found.arch)
    return Target(name, found.warp_size, properties["max_shared_mem"], properties["multiprocessor_count"])


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One form into which a launcher can have Triton compile a kernel.

    Attributes:
        kernel: The `@triton.jit` function.
        types: The type of each argument that is not in `constants`, as Triton writes it ("*bf16", "i32", "fp32").
        constants: The value of each `tl.constexpr` argument. An optional tensor that is absent is listed here as None.
        options: The options of compilation: num_warps, num_stages, enable_fp_fusion.
        multiples_of_16: The integer arguments, such as row strides, that are multiples of 16 at the sizes of models.
            The compiled code then has the same wide loads as in use. Pointers always count as aligned.
        overlaps_copies: Whether the loop of the kernel must copy its next tiles to shared memory while it computes.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = field(default=())
    overlaps_copies: bool = False
