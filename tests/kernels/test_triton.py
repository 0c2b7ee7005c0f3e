"""The Triton kernels without a GPU: run in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.kernels._op import all_ops

pytest.importorskip("triton")

HERE = Path(__file__).parent
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Per block: NVIDIA's CUDA programming guide, "Technical specifications per compute capability"; AMD's CDNA 3 LDS."""


def run_script(name: str, argument: str, *, interpret: bool) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(HERE / name), argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name, op in all_ops().items() if "cuda" in op.implementations()])
def test_agrees_with_the_definition_in_the_interpreter(name):
    assert int(run_script("interpret.py", name, interpret=True)) > 0


@pytest.mark.parametrize("target", MAX_SHARED_BYTES)
def test_compiles_without_spills_and_within_shared_memory(target):
    variants = [json.loads(line) for line in run_script("compile_ahead.py", target, interpret=False).splitlines()]
    assert len(variants) == 9
    assert [variant for variant in variants if variant["num_spills"]] == []
    assert [variant for variant in variants if variant["shared_bytes"] > MAX_SHARED_BYTES[target]] == []
