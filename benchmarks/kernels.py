"""Times every kernel, and prints its share of the machine's limit.

    python benchmarks/kernels.py [--device cuda] [--only paged_attention ...] [--plain] [--repeats 15] [--threads 2]

One JSON line per case. `share_of_limit` is the least time, the larger of bytes over copy bandwidth and operations over
matrix rate, both measured in the same run (limits.py), over the median time. The printed rate is that of bytes or of
operations, whichever needs more time. On a GPU calls are replayed from graphs, on enough sets of inputs that none stays
in the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kernel_cases import CPU, GPU, TINY, Case, Cases
from limits import Limits, measure_limits
from millrace.kernels._op import all_ops
from timing import Call, time_calls

MAX_SETS = 64


def cases(device: torch.device, *, is_tiny: bool) -> Iterator[Case]:
    """Yields the cases of a device: in bfloat16, and on a CPU in float32 too."""
    is_cuda = device.type == "cuda"
    sizes = TINY if is_tiny else GPU if is_cuda else CPU
    yield from Cases(sizes, torch.float32, device).around_the_model()
    for dtype in (torch.bfloat16,) if is_cuda else (torch.float32, torch.bfloat16):
        yield from Cases(sizes, dtype, device).of_the_model()


def run(case: Case, limits: Limits, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the line of a case: its measurements, or the reason of its failure."""
    line = {"benchmark": "kernels", "op": case.op, "case": case.name, "dtype": case.dtype}
    try:
        return line | measure(case, limits, device, options)
    except Exception as error:  # noqa: BLE001 - the other cases run whatever one case raises
        return line | {"failed": f"{type(error).__name__}: {error}"}


def measure(case: Case, limits: Limits, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Times a case, the library's function if there is one, and the plain body if an option asks for it."""
    op = all_ops()[case.op]
    functions: dict[str, Callable[..., Any]] = {"kernel": op}
    if case.library is not None:
        functions["library"] = case.library
    if options.plain and device.type == "cpu":  # Some plain bodies read values back, which a graph cannot hold.
        functions["plain"] = op.plain
    inputs = [case.make()]
    inputs += [case.make() for _ in range(num_sets(inputs[0].args, device) - 1)]
    variants: dict[str, list[Call]] = {
        name: [partial(function, *call.args, **call.kwargs) for call in inputs] for name, function in functions.items()
    }
    timed = time_calls(variants, device, options.repeats)
    seconds = {name: statistics.median(times) for name, times in timed.items()}
    figures = {"us" if name == "kernel" else f"{name}_us": round(s * 1e6, 2) for name, s in seconds.items()}
    return figures | rate(case, limits, seconds["kernel"])


def num_sets(args: tuple[Any, ...], device: torch.device) -> int:
    """Returns the number of sets of inputs that makes sure that a set has left the GPU's cache before its next turn."""
    if device.type != "cuda":
        return 1
    size = sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, torch.Tensor))
    return min(MAX_SETS, 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // max(size, 1))


def rate(case: Case, limits: Limits, seconds: float) -> dict[str, Any]:
    """Returns the rate of a case, in bytes or operations per second, and its share of the limit."""
    peak = limits.flops_per_s.get(case.rate) or limits.flops_per_s.get(case.dtype, math.inf)
    bytes_s, flops_s = case.num_bytes / limits.copy_bytes_per_s, case.num_flops / peak
    share = {"share_of_limit": round(max(bytes_s, flops_s) / seconds, 4)}
    if bytes_s > flops_s:
        return {"GB_per_s": round(case.num_bytes / seconds / 1e9, 1), **share}
    return {"TFLOP_per_s": round(case.num_flops / seconds / 1e12, 3), **share}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=list(all_ops()), metavar="OP")
    parser.add_argument("--plain", action="store_true", help="time the plain torch body too, on a CPU")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    return parser.parse_args(arguments)


def main() -> int:
    """Prints the limits and a line per case; returns 1 if a case failed."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, num_failed = torch.device(options.device), 0
    limits = measure_limits(device, is_tiny=options.tiny)
    print(json.dumps({"benchmark": "limits", **limits.figures()}), flush=True)
    for case in cases(device, is_tiny=options.tiny):
        if options.only is None or case.op in options.only:
            line = run(case, limits, device, options)
            num_failed += "failed" in line
            print(json.dumps(line), flush=True)
    if num_failed:
        print(f"{num_failed} cases failed", file=sys.stderr)
    return int(num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
