"""Runs the Triton kernel of one op in Triton's interpreter, on CPU tensors, over all its samples.

A script of its own, for test_triton.py: TRITON_INTERPRET=1 counts only before triton is first imported.
bfloat16 is left out: the interpreter's is not that of the hardware.
"""

from __future__ import annotations

import sys

import torch

from conftest import assert_agrees, poison
from millrace.kernels._op import Draw, all_ops

if __name__ == "__main__":
    op = all_ops()[sys.argv[1]]
    implementation = op.implementations()["cuda"]
    poison(setattr)
    num_samples = len(list(op.samples(Draw.seeded(torch.float32))))
    for dtype in {torch.float32, torch.float16} & set(op.tolerance):
        for index in range(num_samples):
            assert_agrees(op, implementation, index, dtype)
    print(num_samples)
