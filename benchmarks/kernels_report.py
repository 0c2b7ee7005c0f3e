"""Compiles every specialisation of every Triton kernel, for GPUs that this machine need not have.

    python benchmarks/kernels_report.py [--targets sm_90 ...] [--only rms_norm ...] [--largest] [--json]

Prints the resources of each form on a multiprocessor: registers of a thread, shared memory of a program, and the
resulting occupancy (resident warps over the most possible ones). Exits with 1 if a form spills registers or does not
fit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from millrace.kernels._op import all_ops
from millrace.kernels._triton import TARGETS, Specialisation, Target

COMPILE_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAX_WARPS_NVIDIA, REGISTERS_NVIDIA, REGISTER_UNIT_NVIDIA, MAX_PROGRAMS_NVIDIA = 64, 65_536, 256, 32
RESERVED_SHARED_BYTES_NVIDIA = 1024
"""CUDA programming guide, technical specifications of compute capability 8.0 and 9.0."""
MAX_THREADS = 1024
"""Most threads of a program, on all targets."""
MAX_WAVES_AMD, REGISTERS_AMD, REGISTER_UNIT_AMD, NUM_SIMDS_AMD = 8, 512, 8, 4
"""AMD CDNA 3 instruction set guide: numbers for each SIMD, of which a compute unit has four."""


@dataclass(frozen=True, slots=True)
class Report:
    """The resources of one compiled form.

    Attributes:
        op: The op it belongs to.
        kernel: The name of the kernel.
        target: The GPU.
        types: Element types of its tensors, once each.
        constants: Its compile-time arguments.
        options: num_warps and num_stages.
        num_registers: Registers of a thread.
        num_spills: Bytes (NVIDIA) or registers (AMD) that were spilled to memory.
        shared_bytes: Shared memory of a program.
        occupancy: Resident warps over the most possible ones.
        num_buffers: Fewest tiles that a buffer of a copy in a loop holds; 0 if no loop copies asynchronously.
        waits: For each wait inside a loop, the number of copies that may still be running after it.
        fits: Whether it spills nothing, and the target has enough shared memory and threads for it.
        overlaps: Whether copies overlap products, or the form need not do that (`Specialisation.overlaps_copies`).
    """

    op: str
    kernel: str
    target: str
    types: str
    constants: dict[str, Any]
    options: dict[str, Any]
    num_registers: int
    num_spills: int
    shared_bytes: int
    occupancy: float
    num_buffers: int
    waits: list[int]
    fits: bool
    overlaps: bool

    @property
    def is_good(self) -> bool:
        """Whether the form fits, and its copies overlap its products where they must."""
        return self.fits and self.overlaps


def specialisations(op: str, target: Target) -> list[Specialisation]:
    """Returns the forms that the kernels of an op can take on a target; none if it has no `triton.py`."""
    name = f"millrace.kernels.{op}.triton"
    if importlib.util.find_spec(name) is None:
        return []
    return list(importlib.import_module(name).specialisations(target))


def compile_form(form: Specialisation, target: Target) -> Any:
    """Compiles one form ahead of time."""
    kernel = form.kernel
    signature = {name: "constexpr" if name in form.constants else form.types[name] for name in kernel.arg_names}
    aligned = [
        (i,)
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in form.multiples_of_16
    ]
    attributes = {index: [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, dict(form.constants), attributes)
    return triton.compile(source, target=COMPILE_TARGETS[target.name], options=dict(form.options))


def report(op: str, index: int, target_name: str) -> Report:
    """Compiles form `index` of an op and reads its resources."""
    target = TARGETS[target_name]
    form = specialisations(op, target)[index]
    compiled = compile_form(form, target)
    count = _count_amd if COMPILE_TARGETS[target_name].backend == "hip" else _count_nvidia
    num_registers, num_spills = count(compiled, target_name)
    shared_bytes, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    num_buffers, waits = _copies_in_loops(compiled.asm["ttgir"])
    return Report(
        op=op,
        kernel=form.kernel.__name__,
        target=target_name,
        types=" ".join(dict.fromkeys(kind for kind in form.types.values() if kind.startswith("*"))).replace("*", ""),
        constants={name: value for name, value in form.constants.items() if value is not None},
        options=dict(form.options),
        num_registers=num_registers,
        num_spills=num_spills,
        shared_bytes=shared_bytes,
        occupancy=round(occupancy(target, num_registers, shared_bytes, num_warps), 3),
        num_buffers=num_buffers,
        waits=waits,
        fits=_fits(target, num_spills, shared_bytes, num_warps),
        overlaps=not form.overlaps_copies or (num_buffers > 1 and min(waits, default=0) > 0),
    )


def _fits(target: Target, num_spills: int, shared_bytes: int, num_warps: int) -> bool:
    has_room = shared_bytes <= target.max_shared_bytes and num_warps * target.warp_size <= MAX_THREADS
    return has_room and not num_spills


def _copies_in_loops(ttgir: str) -> tuple[int, list[int]]:
    """Reads `Report.num_buffers` and `Report.waits` from Triton's intermediate code for GPUs.

    A copy is `async_copy_global_to_local`, its destination a slice of a buffer `tiles x rows x columns`, and a wait is
    `async_wait {num = copies that may still run}`. A loop is pipelined if it waits only for copies of earlier tiles.
    """
    waits: list[int] = []
    depth, loops = 0, []
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        if loops and depth <= loops[-1]:
            loops.pop()
        if loops and (found := re.search(r"async_wait.*num = (\d+)", line)):
            waits.append(int(found[1]))
    buffers = [int(tiles) for tiles in re.findall(r"local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x\w+", ttgir)]
    return min(buffers, default=0) if waits else 0, waits


def _count_nvidia(compiled: Any, target_name: str) -> tuple[int, int]:
    """Returns registers of a thread and spilled bytes, as NVIDIA's assembler reports them."""
    ptx = compiled.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        assembler = nvidia.get_ptxas(COMPILE_TARGETS[target_name].arch).path
        command = [assembler, "-v", "--gpu-name", architecture[1], file.name, "-o", os.devnull]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", printed))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", printed)), spills


def _count_amd(compiled: Any, _target_name: str) -> tuple[int, int]:
    """Returns vector registers of a lane and spilled registers, from the code object's notes."""
    notes = compiled.asm["amdgcn"]
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count: +(\d+)", notes))
    return max(int(n) for n in re.findall(r"\.vgpr_count: +(\d+)", notes)), spills


def occupancy(target: Target, num_registers: int, shared_bytes: int, num_warps: int) -> float:
    """Returns the resident warps of a multiprocessor over the most that it can hold."""
    if target.warp_size == 64:
        waves = min(MAX_WAVES_AMD, REGISTERS_AMD // _round_up(max(num_registers, 1), REGISTER_UNIT_AMD))
        by_registers = waves * NUM_SIMDS_AMD // num_warps
        by_shared = target.max_shared_bytes // shared_bytes if shared_bytes else by_registers
        return min(by_registers, by_shared) * num_warps / (MAX_WAVES_AMD * NUM_SIMDS_AMD)
    per_warp = _round_up(num_registers * target.warp_size, REGISTER_UNIT_NVIDIA)
    by_registers = REGISTERS_NVIDIA // per_warp // num_warps
    by_warps = MAX_WARPS_NVIDIA // num_warps
    room = target.max_shared_bytes + RESERVED_SHARED_BYTES_NVIDIA
    by_shared = room // (shared_bytes + RESERVED_SHARED_BYTES_NVIDIA)
    return min(by_registers, by_warps, by_shared, MAX_PROGRAMS_NVIDIA) * num_warps / MAX_WARPS_NVIDIA


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def largest(forms: list[Specialisation]) -> list[int]:
    """Returns the indices of the last of the forms that differ only in sizes, gates and the type of full-size floats.

    Every op lists its sizes in rising order, and bfloat16 last. A gate is short code after the loop of a product.
    """
    last: dict[tuple[Any, ...], int] = {}
    for index, form in enumerate(forms):
        types = tuple(re.sub(r"fp32|fp16|bf16", "float", kind) for kind in form.types.values())
        flags = tuple(value for name, value in form.constants.items() if type(value) is not int and name != "GATE")
        last[form.kernel.__name__, types, flags] = index
    return sorted(last.values())


def reports(targets: list[str], ops: list[str], only_largest: bool = False) -> Iterator[Report]:
    """Compiles the forms of some ops for some targets, on all cores, and yields the reports in order."""
    jobs = []
    for target in targets:
        for op in ops:
            forms = specialisations(op, TARGETS[target])
            jobs += [(op, i, target) for i in (largest(forms) if only_largest else range(len(forms)))]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(report, *zip(*jobs, strict=True)) if jobs else ()


def print_table(rows: list[Report]) -> None:
    """Prints a Markdown table per target, one line for each kernel and set of element types: the worst of its forms."""
    for target in dict.fromkeys(row.target for row in rows):
        print(f"\n### {target}\n")
        print("| kernel | types | forms | registers | shared KiB | occupancy | spills | buffers |")
        print("|---|---|---|---|---|---|---|---|")
        groups: dict[tuple[str, str], list[Report]] = {}
        for row in rows:
            if row.target == target:
                groups.setdefault((row.kernel, row.types), []).append(row)
        for (kernel, types), group in groups.items():
            registers = _span([row.num_registers for row in group])
            shared = _span([-(-row.shared_bytes // 1024) for row in group])
            share = _span([round(row.occupancy * 100) for row in group])
            spills = max(row.num_spills for row in group)
            buffers = _span([row.num_buffers for row in group])
            print(f"| {kernel} | {types} | {len(group)} | {registers} | {shared} | {share} % | {spills} | {buffers} |")


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def main() -> int:
    """Compiles, prints, and returns 1 if a form does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=list(all_ops()), metavar="OP")
    parser.add_argument("--largest", action="store_true", help="compile the largest sizes only, in bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON line per form")
    options = parser.parse_args()
    rows = []
    for row in reports(options.targets, options.only, options.largest):
        rows.append(row)
        if options.json:
            print(json.dumps(asdict(row), default=str), flush=True)
    if not options.json:
        print_table(rows)
    for row in rows:
        if not row.is_good:
            print(f"does not fit, or does not overlap copies and products: {row}", file=sys.stderr)
    return int(not all(row.is_good for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
