"""Compares every kernel with its plain body, at the sizes of real models.

    python benchmarks/check_kernels.py [--device cuda] [--processes 12]

The tests of the kernels use small and odd sizes; these are the sizes that are timed. One JSON line per case: `error`
is the largest difference over the one that the op allows, and `failed` says why a case is wrong. The cases are dealt
out to several processes, because most of the time goes into compiling. A case that breaks the GPU's context ends its
process: the case runs again by itself with CUDA_LAUNCH_BLOCKING=1, which names the kernel, and the others in a new
process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kernel_cases import TINY, Case, Cases, Sizes
from millrace.kernels._op import all_ops

SIZES = Sizes(
    *((256, 1024), (1, 8192), 2048, 32, 8, 128, 4096, 12_288, (256, 151_936), (256, 2048)),
    coded=((4096, 4096), (14_336, 4096)),
)
"""The sizes of kernel_cases.GPU with a shorter prompt, whose plain body needs less memory, and with a batch of 1."""
BROKEN = 3
"""Exit status of a process whose GPU context is broken: nothing that it computes afterwards counts."""
STEP_OF_E4M3 = (0.126, 2.0**-9)
"""Relative and absolute difference of neighbours among 8-bit floats with 3 bits of mantissa."""


def cases(device: torch.device, *, is_tiny: bool) -> list[Case]:
    """Returns the cases of a device, in an order that depends on nothing else."""
    sizes = TINY if is_tiny else SIZES
    around = Cases(sizes, torch.float32, device).around_the_model()
    return [*Cases(sizes, torch.bfloat16, device).of_the_model(), *around]


@torch.inference_mode()
def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Runs a case on the kernel and on the plain body, and compares results and arguments."""
    op = all_ops()[case.op]
    rtol, atol = op.tolerance.get(getattr(torch, case.dtype), op.tolerance[torch.float32])
    call = case.make()
    args = [_widened(arg, is_exact=rtol == atol == 0) for arg in (*call.args, *call.kwargs.values())]
    named = dict(zip(call.kwargs, args[len(call.args) :], strict=True))
    wanted = op.plain(*args[: len(call.args)], **named), args
    actual = op(*call.args, **call.kwargs), [*call.args, *call.kwargs.values()]
    if device.type == "cuda":
        torch.cuda.synchronize()
    pairs = zip(_flatten(actual), _flatten(wanted), strict=True)
    error = max(excess(a, w, rtol, atol) for a, w in pairs)
    line: dict[str, Any] = {"error": round(error, 4)}
    if error > 1:
        line["failed"] = f"differs from its plain body by {error:.3g} times what is allowed"
    return line


def excess(actual: Tensor, wanted: Tensor, rtol: float, atol: float) -> float:
    """Returns the largest difference over the allowed one; where none is allowed, the number of different elements.

    The absolute tolerance goes with the size of the results, because the tests give it for results of about 1.
    """
    if wanted.dtype == torch.float8_e4m3fn:
        rtol, atol = STEP_OF_E4M3 if rtol or atol else (0.0, 0.0)
    if not wanted.is_floating_point() or rtol == atol == 0:
        different = actual.to(torch.float64) != wanted.to(torch.float64)
        return float(different.sum())
    actual, wanted = actual.float(), wanted.float()
    size = float(wanted.square().mean().sqrt())
    ratio = (actual - wanted).abs() / (atol * size + rtol * wanted.abs()).clamp(min=torch.finfo(torch.float32).tiny)
    return float(ratio.nan_to_num(nan=torch.inf).max()) if ratio.numel() else 0.0


def _widened(value: Any, *, is_exact: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    # 8-bit numbers stay as they are, because their rounding is part of the definition.
    is_wide = value.is_floating_point() and value.dtype.itemsize > 1
    return value.to(torch.float32, copy=True) if is_wide and not is_exact else value.clone()


def _flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _flatten(item)] if isinstance(value, (tuple, list)) else []


def check_here(indices: Sequence[int], device: torch.device, *, is_tiny: bool) -> int:
    """Checks some cases in this process; a line each. Returns `BROKEN` if a case has broken the GPU's context."""
    torch.manual_seed(0)
    found = cases(device, is_tiny=is_tiny)
    for index in indices:
        case = found[index]
        line = {"benchmark": "check_kernels", "op": case.op, "case": case.name, "dtype": case.dtype}
        try:
            line |= check(case, device)
        except Exception as error:  # noqa: BLE001 - the other cases run whatever one case raises
            line |= {"failed": f"{type(error).__name__}: {error}"}
            if _is_broken(device):
                print(f"{case.op}, {case.name}: {line['failed']}", file=sys.stderr, flush=True)
                return BROKEN
        print(json.dumps(line), flush=True)
    return 0


def _is_broken(device: torch.device) -> bool:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


class Deal:
    """Checks all cases in several processes, and starts new ones after those that end early.

    Args:
        arguments: Arguments of this script that each process gets.
        all_cases: The cases, which the processes get by their indices.
    """

    def __init__(self, arguments: Sequence[str], all_cases: Sequence[Case]) -> None:
        self._arguments, self._cases = list(arguments), all_cases
        self._lock = threading.Lock()
        self.lines: list[dict[str, Any]] = []

    def run(self, num_processes: int) -> None:
        """Checks all cases; neighbours, which are slow alike, go to different processes."""
        shares = [list(range(i, len(self._cases), num_processes)) for i in range(num_processes)]
        with ThreadPoolExecutor(num_processes) as pool:
            list(pool.map(self._check, filter(None, shares)))

    def _check(self, indices: Sequence[int]) -> None:
        while indices:
            num_lines, status = self._start(indices, {})
            if not status or num_lines == len(indices):
                return
            broken, indices = indices[num_lines], indices[num_lines + 1 :]
            case = self._cases[broken]
            if not self._start([broken], {"CUDA_LAUNCH_BLOCKING": "1"})[0]:
                reason = f"its process ended with status {status}; the log has its message"
                own = {"op": case.op, "case": case.name, "dtype": case.dtype, "failed": reason}
                self._take({"benchmark": "check_kernels", **own})

    def _start(self, indices: Sequence[int], variables: dict[str, str]) -> tuple[int, int]:
        """Runs one process to its end; returns the number of its lines, and its status."""
        command = [sys.executable, __file__, *self._arguments, "--indices", *map(str, indices)]
        num_lines = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith("{"):
                    num_lines += 1
                    self._take(json.loads(text))
        return num_lines, process.returncode

    def _take(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.lines.append(line)
            print(json.dumps(line), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--indices", type=int, nargs="+", help="check these cases only, in this process")
    return parser.parse_args(arguments)


def main() -> int:
    """Checks all cases; returns 1 if one is wrong, and names its op."""
    options = parse()
    device = torch.device(options.device)
    if options.indices is not None:
        return check_here(options.indices, device, is_tiny=options.tiny)
    deal = Deal(
        ["--device", options.device, *(["--tiny"] if options.tiny else [])],
        cases(device, is_tiny=options.tiny),
    )
    deal.run(options.processes)
    wrong = dict.fromkeys(line["op"] for line in deal.lines if "failed" in line)
    summary = f"wrong: {', '.join(wrong)}" if wrong else f"{len(deal.lines)} cases agree with their plain bodies"
    print(summary, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
