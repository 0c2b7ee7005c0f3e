"""The 8-bit conversions that the Triton kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from millrace.kernels._fp8 import e4m3_storage, e4m3_type
from millrace.kernels._triton import TARGETS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_in_the_interpreter_numbers_convert_as_torch_does_and_fusion_changes_no_bit():
    here = Path(__file__).parent
    command = [sys.executable, "-P", str(here / "interpret_fp8.py")]
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    num_fused, num_on_bytes = map(int, done.stdout.split())
    assert num_fused >= 60 and num_on_bytes >= 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_gate_to_8_bits_give_the_bits_of_two_kernels(fusion_changes_no_bit, dtype):
    assert fusion_changes_no_bit("cpu", dtype) > 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_gate_to_8_bits_give_the_bits_of_two_kernels_on_a_gpu(fusion_changes_no_bit, dtype):
    assert fusion_changes_no_bit("cuda", dtype, "cuda") > 20


def test_a_target_without_e4m3_gets_the_bytes():
    cache = torch.ones(2, 3).to(torch.float8_e4m3fn)
    assert {name: e4m3_type(target) for name, target in TARGETS.items()} == {
        "sm_80": "u8",
        "sm_90": "fp8e4nv",
        "gfx942": "u8",
    }
    assert e4m3_storage(cache, TARGETS["sm_90"]) is cache
    seen = e4m3_storage(cache, TARGETS["sm_80"])
    assert seen.dtype == torch.uint8
    assert seen.data_ptr() == cache.data_ptr()
    assert e4m3_storage(seen, TARGETS["sm_80"]) is seen
