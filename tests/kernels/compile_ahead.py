"""Compiles two kernels ahead for a GPU that is not there; a script of its own, because it replaces Triton's driver."""

from __future__ import annotations

import logging

import fake_gpu
import torch
import triton
from torch import Tensor

from millrace.kernels import rms_norm, silu_and_mul
from millrace.kernels._gated import gate_and_mul_kernel
from millrace.kernels.ahead import compile_launches
from millrace.kernels.rms_norm.triton import rms_norm_kernel


def step(num_tokens: int) -> None:
    """Launches two kernels, one of them twice, on the meta device."""
    hidden = torch.empty((num_tokens, 64), dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, dtype=torch.bfloat16, device="meta")
    out, _ = rms_norm(hidden, weight, 1e-6)
    assert isinstance(out, Tensor) and out.is_meta and out.shape == hidden.shape
    rms_norm(out, weight, 1e-6)
    silu_and_mul(hidden)


def main() -> None:
    """Checks that a form is compiled once, and that a compilation that fails is tried again by the next launch."""
    fake_gpu.install()
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("millrace.kernels.ahead").addHandler(handler)

    real = triton.compiler.compile

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("the disk is full")

    entered: list[None] = []
    triton.compiler.compile = fail
    assert compile_launches(lambda: step(3), 2, lambda: entered.append(None)) == 2
    assert entered
    assert warnings == ["a kernel could not be compiled ahead: OSError: the disk is full"], warnings
    for kernel in (gate_and_mul_kernel, rms_norm_kernel):
        kernel.compile = real
    assert compile_launches(lambda: step(3), 2, lambda: None) == 2
    assert compile_launches(lambda: step(17), 2, lambda: None) == 0
    assert len(warnings) == 1
    for kernel in (gate_and_mul_kernel, rms_norm_kernel):
        (compiled,) = kernel.device_caches[0][0].values()
        assert "ptx" in compiled.asm
    print("compiled")


if __name__ == "__main__":
    main()
