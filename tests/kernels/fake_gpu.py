"""A driver for Triton that pretends to be an H200: kernels are compiled for it, and none can run."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from millrace.kernels._triton import TARGETS


class FakeDriver:
    """What Triton asks of a driver before it compiles a kernel, and what `current_target` asks."""

    @property
    def utils(self) -> Any:
        return self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        target = TARGETS["sm_90"]
        return {"max_shared_mem": target.max_shared_bytes, "multiprocessor_count": target.num_processors}


def install() -> None:
    """Makes this process compile for the fake GPU."""
    driver.set_active(FakeDriver())
