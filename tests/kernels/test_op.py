"""`Op`: dispatch, lazy import, registration, and calls without numba."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from millrace.kernels._op import Draw, Op, Sample, op


def no_samples(draw: Draw) -> list[Sample]:
    return []


@pytest.fixture
def double() -> Op[..., torch.Tensor]:
    @op(samples=no_samples, tolerance={torch.float32: (0.0, 0.0)})
    def double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        """Doubles."""
        return x * times

    return double


def test_the_plain_body_runs_where_nothing_is_registered(double):
    assert double(torch.tensor(2.0)).item() == 4
    assert double(x=torch.tensor(2.0), times=3).item() == 6
    assert double(times=3, x=torch.tensor(2.0)).item() == 6
    assert double(torch.empty(2, device="meta")).device.type == "meta"
    assert double.__doc__ == "Doubles."
    assert double.implementations() == {}


def test_a_registered_implementation_runs_on_its_device_only(double):
    @double.register("cpu")
    def double_cpu(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        return torch.full_like(x, -1)

    assert double(torch.tensor(2.0)).item() == -1
    assert double.plain(torch.tensor(2.0)).item() == 4
    assert double(torch.empty(2, device="meta")).device.type == "meta"
    assert double.implementations() == {"cpu": double_cpu}


def test_a_second_registration_raises(double):
    double.register("cpu")(double.plain)
    with pytest.raises(ValueError, match=r"double already has an implementation for 'cpu'"):
        double.register("cpu")


def test_an_unknown_device_type_raises(double):
    with pytest.raises(ValueError, match=r"no device type 'gpu'; use one of \['cpu', 'cuda'\]"):
        double.register("gpu")


def test_a_call_without_a_tensor_says_so(double):
    with pytest.raises(TypeError, match="without a tensor"):
        double()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_the_package_loads_neither_numba_nor_triton():
    code = "import sys, millrace.kernels; print([name for name in ('numba', 'triton') if name in sys.modules])"
    assert run_python(code) == "[]\n"


DECODE = """
import logging, sys, torch
logging.basicConfig(level=logging.WARNING)
{before}
from millrace.kernels import paged_attention
cache = torch.ones(2, 1, 4, 8).half()  # which no compiled kernel takes
args = torch.ones(1, 1, 8).half(), cache, cache, *(torch.tensor(x, dtype=torch.int32) for x in ([[1]], [3], [0, 1]))
for _ in range(2):
    print(paged_attention(*args, 1.0).sum().item())
"""


def test_without_numba_the_plain_body_runs_and_one_warning_names_the_package():
    output = run_python(DECODE.format(before="sys.modules['numba'] = None"))
    assert output.count("8.0\n") == 2
    assert output.count("WARNING") == 1
    assert "paged_attention runs its plain torch body on cpu, which is slower: package numba is not installed" in output


def test_a_fault_in_our_own_file_is_not_swallowed():
    code = DECODE.format(before="sys.modules['millrace.kernels._threads'] = None")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
    assert "millrace.kernels._threads" in done.stderr


def test_kernels_compile_where_no_cache_folder_can_be_written(tmp_path):
    before = (
        "from numba.core import caching; "
        "caching.CacheImpl._locator_classes = []"  # what numba has left when it finds no folder to write to
    )
    assert run_python(DECODE.format(before=before)) == "8.0\n8.0\n"
