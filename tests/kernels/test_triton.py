"""The Triton kernels without a GPU: run in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.kernels._op import all_ops

pytest.importorskip("triton")

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent.parent / "benchmarks"
OPS = [name for name in all_ops() if (HERE.parent.parent / "kernels" / name / "triton.py").exists()]
LARGE = ["paged_attention", "sample"]


def run_script(path: Path, *arguments: str, interpret: bool) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", str(path), *arguments]
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


# The small ops share a process, since importing torch and triton takes longer than most of them.
@pytest.mark.parametrize("names", [*([name] for name in LARGE), [name for name in OPS if name not in LARGE]])
@pytest.mark.parametrize("dtypes", ["one", pytest.param("all", marks=pytest.mark.soak)])
def test_agrees_with_the_definition_in_the_interpreter_and_launches_only_what_is_listed(names, dtypes):
    assert run_script(HERE / "interpret.py", dtypes, *names, interpret=True).split() == names


def test_the_inline_instructions_make_every_code_less_its_zero():
    printed = run_script(HERE / "interpret_ptx.py", interpret=True).splitlines()
    assert printed == ["4 bfloat16", "4 float16", "8 float16"]


def test_no_batch_meets_a_form_that_is_not_listed():
    launched = run_script(HERE / "launch_forms.py", "500", interpret=True).split()
    assert {"gather_batch_kernel", "prefill_kernel", "decode_kernel", "prefix_kernel", "merge_kernel"} < set(launched)
    assert {"rms_norm_kernel", "gate_and_mul_kernel", "gate_and_quantize_kernel", "quantize_fp8_kernel"} < set(launched)
    assert {"count_kernel", "place_kernel", "product_kernel", "combine_kernel", "sum_kernel"} < set(launched)
    assert {"shrink_kernel", "expand_kernel", "text_kernel"} < set(launched)


def test_a_launch_on_the_meta_device_compiles_ahead_and_a_failure_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert run_script(HERE / "compile_ahead.py", interpret=False).split() == ["compiled"]


def test_every_kernel_is_launched_where_the_meta_device_only_compiles():
    """A launch that goes around `launch` would run on the meta device, whose tensors have no address."""
    kernels = HERE.parent.parent / "kernels"
    direct = re.compile(r"\w*kernel\w*\[[^\]]")
    found = [
        f"{path.parent.name}/{path.name}: {line.strip()}"
        for path in kernels.rglob("*.py")
        for line in path.read_text().splitlines()
        if direct.search(line)
    ]
    assert found == ["kernels/_triton.py: kernel[grid](*args, **options)"]


def assert_compiles(*arguments: str) -> None:
    printed = run_script(BENCHMARKS / "kernels_report.py", *arguments, "--json", interpret=False)
    forms = [json.loads(line) for line in printed.splitlines()]
    assert {form["op"] for form in forms} == set(OPS)
    assert [form for form in forms if form["num_spills"] or not form["fits"] or not form["overlaps"]] == []
    assert all(0 < form["occupancy"] <= 1 for form in forms)


def test_the_largest_forms_compile_without_spills_and_within_shared_memory():
    assert_compiles("--targets", "sm_90", "--largest")


@pytest.mark.soak
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_form_compiles_without_spills_and_within_shared_memory(target):
    assert_compiles("--targets", target)
