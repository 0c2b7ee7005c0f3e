"""Compares the 8-bit conversions of `kernels/_fp8.py` with torch's, in Triton's interpreter.

Then the kernels that quantise what they compute with the two kernels whose place they take, and the kernels that read
or write 8-bit numbers with their definitions, as they run on a GPU whose Triton does not know the type. A script of its
own, for test_fp8.py: TRITON_INTERPRET=1 counts only before triton is first imported.
"""

from __future__ import annotations

import importlib

import torch
import triton
import triton.language as tl
from interpret import patch_language_once

from conftest import assert_agrees, assert_fusion_changes_no_bit
from millrace.kernels._fp8 import narrow, widen
from millrace.kernels._op import Draw, all_ops
from millrace.kernels._triton import TARGETS

CODES = torch.arange(256).to(torch.uint8)
"""Every e4m3 number, as bytes."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def widen_all(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Widens N numbers to the element type of the output."""
    index = tl.arange(0, N)
    tl.store(out_ptr + index, widen(tl.load(x_ptr + index), out_ptr.dtype.element_ty))


@triton.jit
def narrow_all(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Narrows N numbers to the element type of the output."""
    index = tl.arange(0, N)
    tl.store(out_ptr + index, narrow(tl.load(x_ptr + index).to(tl.float32), out_ptr.dtype.element_ty))


def hard_numbers() -> torch.Tensor:
    """Returns float32 numbers: every float16, the midpoints of codes and their neighbours, and random bits."""
    every_float16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    codes = CODES[:127].view(torch.float8_e4m3fn).float()
    halfway = (codes[:-1] + codes[1:]) / 2
    beside = [halfway.nextafter(torch.tensor(end)) for end in (0.0, torch.inf)]
    random = torch.randint(-(2**31), 2**31, (2**15,), dtype=torch.int32).view(torch.float32)
    edges = torch.tensor([448.0, 464.0, 480.0, 1e30, torch.inf, torch.nan, -0.0, 1e-45, 2.0**-10, 2.0**-6])
    numbers = torch.cat((every_float16, halfway, *beside, random, edges))
    return torch.cat((numbers, -numbers, torch.zeros(2**18 - 2 * len(numbers))))


def check_conversions() -> None:
    """Fails if a bit differs from that of torch."""
    wanted = CODES.view(torch.float8_e4m3fn)
    for dtype in DTYPES:
        out = torch.empty(len(CODES), dtype=dtype)
        widen_all[(1,)](CODES, out, N=len(CODES))
        torch.testing.assert_close(out, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)
    numbers = hard_numbers()
    rounded = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        codes = torch.empty(len(numbers), dtype=torch.uint8)
        narrow_all[(1,)](numbers, codes.view(dtype), N=len(numbers))
        assert torch.equal(codes, rounded)


def check_kernels_on_bytes() -> int:
    """Runs the kernels that write 8-bit numbers as on an sm_80, and returns the number of samples."""
    num_samples = 0
    for name in ("quantize_fp8", "rms_norm_fp8", "gate_and_mul_fp8", "fp8_linear", "rope_and_store", "store_kv"):
        op = all_ops()[name]
        implementation = op.implementations()["cuda"]
        importlib.import_module(f"millrace.kernels.{name}.triton").current_target = lambda: TARGETS["sm_80"]
        for index, sample in enumerate(op.samples(Draw.seeded(torch.float32))):
            if "fp8" in name or "8-bit" in sample.name:
                assert_agrees(op, implementation, index, torch.float32)
                num_samples += 1
    return num_samples


def main() -> None:
    """Runs all checks, and prints the numbers of samples that fused kernels, and kernels on bytes, ran on."""
    torch.manual_seed(0)
    patch_language_once()
    check_conversions()
    num_fused = sum(assert_fusion_changes_no_bit("cuda", dtype) for dtype in DTYPES)
    print(num_fused, check_kernels_on_bytes())


if __name__ == "__main__":
    main()
