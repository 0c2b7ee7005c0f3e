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
BENCHMARKS = HERE.parent.parent / "benchmarks"
OPS = [name for name in all_ops() if (HERE.parent.parent / "kernels" / name / "triton.py").exists()]


def run_script(path: Path, *arguments: str, interpret: bool) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", str(path), *arguments]
    environment["PYTHONPATH"] = str(HERE)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.parametrize("name", OPS)
def test_agrees_with_the_definition_in_the_interpreter_and_launches_only_what_is_listed(name):
    assert int(run_script(HERE / "interpret.py", name, interpret=True)) > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", pytest.param("gfx942", marks=pytest.mark.soak)])
def test_every_form_compiles_without_spills_and_within_shared_memory(target):
    printed = run_script(BENCHMARKS / "kernels_report.py", "--targets", target, "--json", interpret=False)
    forms = [json.loads(line) for line in printed.splitlines()]
    assert {form["op"] for form in forms} == set(OPS)
    assert [form for form in forms if form["num_spills"] or not form["fits"]] == []
    assert all(0 < form["occupancy"] <= 1 for form in forms)
