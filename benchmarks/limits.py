"""Measures the limits of this machine: bytes copied and operations of a matrix product, per second.

    python benchmarks/limits.py [--device cuda] [--shapes]

Other scripts call `measure_limits` first and give every figure as a share of these limits, so that figure and limit
come from one machine, in one state, in one run. Prints one JSON line. With --shapes it prints further lines: one for
reading, and one for each shape of a matrix product in models of 100 and of 600 million parameters, with weights that no
cache holds.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from millrace.engine.layers import Linear
from timing import time_calls

REPEATS = 7


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one device.

    Attributes:
        device: Name of the device.
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
    """Measures the limits of a device, and frees the memory that it used.

    Args:
        device: "cpu" or "cuda".
        is_tiny: Whether to use tiny sizes, which only show that the script works.
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


SHAPES = (
    (1, 768, 4096),
    (16, 1024, 6144),
    (64, 768, 1280),
    (64, 768, 4096),
    (64, 2048, 768),
    (64, 768, 32000),
    (2048, 768, 4096),
    (2048, 2048, 768),
)
"""(rows, in_features, out_features)"""

_COLD_BYTES = 128 << 20
"""Bytes of the weights that are multiplied in turn, so that each weight comes from memory, as in a model."""


def shape_rates(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields the rate of reading memory, and of multiplying each of `SHAPES`, as fields of JSON lines."""
    numbers = torch.ones(1 << 28, dtype=torch.float32, device=device)
    rate = numbers.nbytes / _least_seconds(numbers.sum, device)
    del numbers
    yield {"limit_read_GB_per_s": round(rate / 1e9, 1)}
    for (rows, inputs, outputs), dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        count = max(1, _COLD_BYTES // (inputs * outputs * dtype.itemsize))
        layers = []
        for _ in range(count):
            layer = Linear(inputs, outputs, bias=False, dtype=dtype, device=device)
            torch.nn.init.normal_(layer.get_parameter("weight"))
            layer.pack()
            layers.append(layer)
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        seconds = _least_seconds(partial(_multiply, layers, x), device) / count
        flops, weight_bytes = 2 * rows * inputs * outputs, inputs * outputs * dtype.itemsize
        yield {
            "shape": f"{rows} x {inputs} to {outputs}",
            "dtype": str(dtype).removeprefix("torch."),
            "us": round(seconds * 1e6, 1),
            "TFLOP_per_s": round(flops / seconds / 1e12, 3),
            "weight_GB_per_s": round(weight_bytes / seconds / 1e9, 1),
        }


@torch.inference_mode()
def _multiply(layers: Sequence[Linear], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


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


def _matmul_rate(call: Callable[[], Any], size: int, device: torch.device) -> float:
    return 2 * size**3 / _least_seconds(call, device)


def _least_seconds(call: Callable[[], Any], device: torch.device) -> float:
    return min(time_calls({"call": [call]}, device, REPEATS)["call"])


def _plain_product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    # A GPU's clock falls with the number of bits that toggle, so the inputs are random, as in a model, and not zeros.
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
    parser.add_argument("--shapes", action="store_true", help="also the products that models run, and reading")
    options = parser.parse_args()
    device = torch.device(options.device)
    limits = measure_limits(device, is_tiny=options.tiny)
    print(json.dumps({"benchmark": "limits", **limits.figures()}), flush=True)
    for figures in shape_rates(device) if options.shapes else ():
        print(json.dumps({"benchmark": "limits", "device": limits.device, **figures}), flush=True)


if __name__ == "__main__":
    main()
