"""Runs the inline instructions of `group_linear` in an emulation of them, in Triton's interpreter.

For every code, zero and place it compares the numbers that a word becomes with `code - zero`. A script of its own, for
test_triton.py, because TRITON_INTERPRET=1 has an effect only before triton is first imported.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from millrace.kernels.group_linear import pack_codes
from millrace.kernels.group_linear.triton import _packed_codes

ARGUMENT = r"(\$?\w+)"
LOP3 = re.compile(rf"lop3\.b32 {ARGUMENT}, {ARGUMENT}, {ARGUMENT}, {ARGUMENT}, {ARGUMENT}")
ARITHMETIC = re.compile(rf"(fma|add)\.rn\.(bf16|f16)x2 {ARGUMENT}, {ARGUMENT}, {ARGUMENT}(?:, {ARGUMENT})?")
MOVE = re.compile(rf"mov\.b32 {ARGUMENT}, {ARGUMENT}")


def emulate(asm: str, _constraints: str, args: list[Any], dtype: Any, _pure: bool, _pack: int, **_: Any) -> Any:
    """Runs a block of PTX on the words of two tensors: `lop3` bit by bit, and halves by torch's 16-bit arithmetic."""
    first, second = np.broadcast_arrays(*(arg.handle.data.astype(np.int64) & 0xFFFFFFFF for arg in args))
    values: dict[str, Any] = {"$1": first, "$2": second}

    def value(name: str) -> Any:
        return values[name] if name in values else np.full_like(first, int(name, 0))

    for line in asm.strip(" {}").split(";"):
        if found := MOVE.search(line):
            values[found[1]] = value(found[2])
        elif found := LOP3.search(line):
            values[found[1]] = _lop3(*(value(found[i]) for i in (2, 3, 4)), table=int(found[5], 0))
        elif found := ARITHMETIC.search(line):
            a, b, *c = (_halves(value(found[i]), found[2]) for i in (4, 5, 6) if found[i])
            exact = a * b + c[0] if found[1] == "fma" else a + b
            values[found[3]] = _words(exact, found[2])
        else:
            assert not line.strip() or ".reg" in line, line
    return tl.tensor(TensorHandle(values["$0"].astype(np.uint32).view(np.int32), tl.int32), _block(dtype, first.shape))


def _block(dtype: Any, shape: tuple[int, ...]) -> Any:
    return tl.block_type(dtype, list(shape))


def _lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Looks up each bit of the result: bit `4 a + 2 b + c` of the table. PTX ISA, lop3."""
    out = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = (word if index & mask else ~word for word, mask in ((a, 4), (b, 2), (c, 1)))
            out |= np.bitwise_and.reduce(list(terms)) & 0xFFFFFFFF
    return out


def _halves(words: Any, kind: str) -> torch.Tensor:
    """Returns the halves of words as float64, in which sums and products of two of them are exact."""
    halves = torch.from_numpy(np.ascontiguousarray(words.astype(np.uint32)).view(np.int16).copy())
    return halves.view(torch.bfloat16 if kind == "bf16" else torch.float16).double()


def _words(halves: torch.Tensor, kind: str) -> Any:
    rounded = halves.to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return rounded.view(torch.int16).numpy().view(np.uint32).astype(np.int64)


@triton.jit
def store_codes_kernel(words_ptr, zeros_ptr, out_ptr, SHIFT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Stores one place of a block of 16 rows, `[16, 32]`."""
    row = tl.arange(0, 16)
    words = tl.load(words_ptr + row[:, None] * 16 + tl.arange(0, 16)[None, :])
    codes = _packed_codes(words, tl.load(zeros_ptr + row), SHIFT, BITS, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * 32 + tl.arange(0, 32)[None, :], codes)


def main() -> None:
    """Compares all codes with all zeros, of which 16 stands for a stored 15 in one of the formats."""
    tl.inline_asm_elementwise = emulate
    for bits, dtype in ((4, torch.bfloat16), (4, torch.float16), (8, torch.float16)):
        per_block = 512 // bits
        for first_zero in range(0, 17 if bits == 4 else 256, 16):
            zeros = (first_zero + torch.arange(16, dtype=torch.int32)).clamp(max=16 if bits == 4 else 255)
            for first_code in range(0, 1 << bits, per_block):
                codes = (first_code + torch.arange(per_block)).fmod(1 << bits).to(torch.uint8).expand(16, -1)
                words = pack_codes(codes.contiguous(), bits)
                for place in range(16 // bits):
                    out = torch.full((16, 32), torch.nan, dtype=dtype)
                    store_codes_kernel[(1,)](words, zeros, out, place * bits, bits)
                    wanted = codes[:, place * 32 : place * 32 + 32].float() - zeros[:, None].float()
                    assert torch.equal(out.float(), wanted), (bits, dtype, first_zero, place)
        print(bits, str(dtype).removeprefix("torch."))


if __name__ == "__main__":
    main()
