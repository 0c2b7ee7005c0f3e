"""Measures what this machine can do at most: bytes copied and operations of a matrix product, per second.

    python benchmarks/limits.py [--device cuda]

Other scripts call `measure_limits` first and give every figure as a share of these, so that figure and limit come from
one machine, in one state, in one run. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from timing import time_calls

REPEATS = 7


@dataclass(frozen=True, slots=True)
class Limits:
    """The ceilings of one device.

    Attributes:
        device: What it is called.
        copy_bytes_per_s: Bytes read plus bytes written by a large copy, per second.
        flops_per_s: Additions plus multiplications of a large matrix product per second, by element type: "float32",
            "bfloat16", and "fp8" where there is a product of that type.
    """

    device: str
    copy_bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def figures(self) -> dict[str, Any]:
        """Returns the limits as fields of a JSON line."""
        rates = {f"limit_{name}_TFLOP_per_s": round(rate / 1e12, 3) for name, rate in self.flops_per_s.items()}
        return {"device": self.device, "limit_copy_GB_per_s": round(self.copy_bytes_per_s / 1e9, 1), **rates}


def measure_limits(device: torch.device, *, is_tiny: bool = False) -> Limits:
    """Measures the ceilings of a device; its memory is given back.

    Args:
        device: "cpu" or "cuda".
        is_tiny: Whether to take sizes that only show that it works.
    """
    is_cuda = device.type == "cuda"
    num_bytes, size = (4 << 30, 8192) if is_cuda else (1 << 28, 2048)
    if is_tiny:
        num_bytes, size = 1 << 20, 64
    flops = {
        str(dtype).removeprefix("torch."): _matmul_rate(_plain_product(size, dtype, device), size, device)
        for dtype in (torch.float32, torch.bfloat16)
    }
    if is_cuda and has_fp8_product(device):
        flops["fp8"] = _matmul_rate(_fp8_product(size, device), size, device)
    limits = Limits(device_name(device), _copy_rate(num_bytes, device), flops)
    if is_cuda:
        torch.cuda.empty_cache()
    return limits


def device_name(device: torch.device) -> str:
    """Returns the name that the maker gave to a GPU, or to the processor with the number of threads in use."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def has_fp8_product(device: torch.device) -> bool:
    """Returns whether a GPU multiplies 8-bit floats: compute capability 8.9, or AMD's CDNA 3, which reports 9.4."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _least_seconds(partial(target.copy_, source), device)


def _matmul_rate(product: Callable[[], Any], size: int, device: torch.device) -> float:
    return 2 * size**3 / _least_seconds(product, device)


def _least_seconds(call: Callable[[], Any], device: torch.device) -> float:
    return min(time_calls({"call": [call]}, device, REPEATS)["call"])


def _plain_product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    # A GPU's clock falls with the bits that toggle: random numbers, as a model has, not zeros.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return partial(torch.mm, a, b.t(), out=torch.empty_like(a))


def _fp8_product(size: int, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def main() -> None:
    """Prints the limits of one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    options = parser.parse_args()
    limits = measure_limits(torch.device(options.device), is_tiny=options.tiny)
    print(json.dumps({"benchmark": "limits", **limits.figures()}))


if __name__ == "__main__":
    main()
