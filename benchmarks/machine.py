"""Prints what this machine has: processor, GPU, versions of the libraries, and whether they can be imported.

    python benchmarks/machine.py

One JSON line for each. Exits with 1 if something is missing that every other script needs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys

NEEDED = ("torch", "transformers", "safetensors", "numpy", "millrace", "millrace.engine.llm")
NEEDED_ON_A_GPU = ("triton",)
OPTIONAL = ("numba", "ray", "pydantic", "llguidance", "pytest", "hypothesis", "xdist")
PROGRAMS = ("make", "nvcc", "g++", "compute-sanitizer")


def state_of(module: str) -> str:
    """Returns the version of a module, or the error of its import."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "imported"))
    except Exception as error:  # noqa: BLE001 - whatever a broken install raises is what this script is to show
        return f"{type(error).__name__}: {error}"


def gpu() -> dict[str, str]:
    """Returns name, memory and driver of the GPU, as nvidia-smi and torch see them."""
    fields = "name,memory.total,memory.used,driver_version,clocks.sm"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        shown = str(error)
    import torch

    seen = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return {"nvidia-smi": shown, "torch": seen, "cuda": str(torch.version.cuda)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="what the other scripts will run on")
    return parser.parse_args(arguments)


def main() -> int:
    """Prints the lines; returns 1 if something is missing."""
    options = parse()
    needed = NEEDED + (NEEDED_ON_A_GPU if options.device == "cuda" else ())
    lines = {"python": sys.version.split()[0], "cpus": str(os.cpu_count())}
    lines |= {name: shutil.which(name) or "absent" for name in PROGRAMS}
    lines |= {name: state_of(name) for name in (*needed, *OPTIONAL)}
    lines |= {f"gpu: {name}": value for name, value in gpu().items()}
    for name, value in lines.items():
        print(json.dumps({"benchmark": "machine", "what": name, "state": value}), flush=True)
    missing = [name for name in needed if "Error: " in lines[name]]
    if options.device == "cuda" and lines["gpu: torch"] == "no CUDA device":
        missing.append("a CUDA device")
    if missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
