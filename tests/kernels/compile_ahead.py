"""Compiles the Triton kernels for GPUs that need not be there, and prints one JSON line per variant.

A script of its own, for test_triton.py: it must run without the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from millrace.kernels.rms_norm import triton as rms_norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def rms_norm_variants() -> list[tuple[ASTSource, dict[str, Any]]]:
    variants = []
    for dtype in ("fp32", "fp16", "bf16"):
        for block in (64, 4096, rms_norm.MAX_HIDDEN_SIZE):
            signature = dict.fromkeys(rms_norm.rms_norm_kernel.arg_names, "*" + dtype) | {
                "x_stride": "i64",
                "residual_stride": "i64",
                "hidden_size": "i32",
                "eps": "fp32",
                "HAS_RESIDUAL": "constexpr",
                "BLOCK": "constexpr",
            }
            source = ASTSource(rms_norm.rms_norm_kernel, signature, {"HAS_RESIDUAL": True, "BLOCK": block})
            variants.append((source, rms_norm.launch_options(block)))
    return variants


def num_spills(compiled: Any, target: GPUTarget) -> int:
    """Returns the spilled bytes (NVIDIA, as its assembler reports them) or registers (AMD)."""
    if target.backend == "hip":
        return sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count: +(\d+)", compiled.asm["amdgcn"]))
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = re.search(r"\.target (\w+)", ptx)
        assert architecture is not None
        assembler = nvidia.get_ptxas(target.arch).path
        command = [assembler, "-v", "--gpu-name", architecture[1], file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    for source, options in rms_norm_variants():
        compiled = triton.compile(source, target=target, options=options)
        print(
            json.dumps(
                {
                    "kernel": source.name,
                    "types": source.signature["x_ptr"],
                    "options": options,
                    "num_spills": num_spills(compiled, target),
                    "shared_bytes": compiled.metadata.shared,
                }
            )
        )
