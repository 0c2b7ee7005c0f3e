"""Sampling in Triton beyond the small samples of the op: many chunks, and more candidates than the buffer holds.

Run as a script it is the test itself: Triton's interpreter is chosen when triton is first imported.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from millrace.kernels import sample

pytest.importorskip("triton")

NUM_ROWS = 16


def run_in_interpreter() -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_chunks_and_overflowing_candidates_change_no_id():
    assert run_in_interpreter().split() == ["row", "chunks", "candidates", "row"]


def test_compiled_code_rounds_as_the_definition_does():
    report = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "kernels_report.py"))
    target = report["TARGETS"]["sm_90"]
    forms = report["specialisations"]("sample", target)
    code = "\n".join(report["compile_form"](form, target).asm["ptx"] for form in forms)
    divisions = set(re.findall(r"\bdiv\.\S*f32", code))
    flushing = set(re.findall(r"\b\S+\.ftz\.\S+", code))
    assert divisions == {"div.rn.f32"} and flushing == {"cvt.rmi.ftz.f32.f32"}
    assert not re.findall(r"\b(?:fma|mad)\.\S*f32", code)


def arguments(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rows of every kind: filters on and off, ties, forbidden tokens, distances of all sizes."""

    def uniform(high: float) -> torch.Tensor:
        return torch.rand(NUM_ROWS, generator=generator) * high

    def either(values: torch.Tensor, off: float) -> torch.Tensor:
        return torch.where(uniform(1.0) < 0.3, torch.full_like(values, off), values)

    logits = torch.randn(NUM_ROWS, 203, generator=generator) * 10 ** (uniform(4).unsqueeze(-1) - 2)
    logits[::3] = logits[::3].round(decimals=1)
    logits[1::4] = logits[1::4].masked_fill(logits[1::4] < -1, -torch.inf)
    logits[5] = 0.25
    top_k = torch.randint(1, 220, (NUM_ROWS,), generator=generator).int()
    return (
        logits,
        either(uniform(2.0), 0.0),
        either(top_k, 0),
        either(uniform(1.0), 1.0),
        either(uniform(0.1), 0.0),
        torch.randint(-(2**62), 2**62, (NUM_ROWS,), generator=generator),
        torch.randint(0, 2**30, (NUM_ROWS,), generator=generator),
    )


def main() -> None:
    """Draws the same rows with several tile sizes and buffers, and prints the name of each that was right."""
    importlib.import_module("interpret").patch_language_once()
    module = importlib.import_module("millrace.kernels.sample.triton")
    implementation = sample.implementations()["cuda"]
    generator = torch.Generator().manual_seed(0)
    rows = arguments(generator)
    for name, tile, room in (("row", 1024, 16_384), ("chunks", 32, 16_384), ("candidates", 64, 4), ("row", 256, 40)):
        module.TILE, module.MAX_CANDIDATES = tile, room
        assert torch.equal(implementation(*rows), sample.plain(*rows)), name
        print(name)


if __name__ == "__main__":
    main()
