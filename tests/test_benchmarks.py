"""The benchmark scripts: they run at tiny sizes on a CPU, and their limits are those worked out by hand.

What they measure here is not looked at.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from millrace.kernels._op import all_ops

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a file of benchmarks/ as its scripts do, by its bare name, and forgets all of them afterwards.

    A module that has such a name already (`kernels` is one that transformers looks for) is put aside for the while.
    """
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    aside = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(aside)


@pytest.fixture
def bare_environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a checkout that was not installed, on a machine without Ray and pydantic."""
    (tmp_path / "millrace").symlink_to(ROOT)
    for name in ("ray", "pydantic"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(f'{__name__} is not here', name=__name__)\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(environment: dict[str, str], script: str, *arguments: str) -> list[dict[str, Any]]:
    """Runs a script and returns its lines."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_nano_workload_is_the_published_one(load: Load) -> None:
    workloads = load("workloads")
    nano = workloads.nano(workloads.FULL)
    assert (len(nano.prompts), nano.num_input_tokens, nano.num_output_tokens) == (256, 142_827, 133_966)
    assert max(map(max, nano.prompts)) == 10_000


@pytest.mark.parametrize("name", ["nano", "1024/1024", "128/128", "2048/128", "shared"])
def test_a_warm_up_meets_every_batch_size_and_fills_no_cache_for_the_run(load: Load, name: str) -> None:
    workloads = load("workloads")
    workload = workloads.WORKLOADS[name](workloads.FULL)
    warm_up = workload.warm_up(16_384)
    assert list(map(len, warm_up.prompts)) == list(map(len, workload.prompts))
    # The last to end is the first to start, and all have started before the first ends.
    assert [a - b for a, b in zip(warm_up.max_tokens, warm_up.max_tokens[1:], strict=False)] == [1] * 255
    assert min(warm_up.max_tokens) > workload.num_input_tokens / 16_384
    block = 16
    assert not {tuple(p[:block]) for p in warm_up.prompts} & {tuple(p[:block]) for p in workload.prompts}


def h200(load: Load) -> Any:
    return load("limits").Limits("H200", 4.3e12, {"bfloat16": 790e12, "float32": 50e12, "fp8": 1400e12})


@pytest.mark.parametrize(
    ("model", "weight_gb", "kv_bytes"),
    [
        ("qwen3-0.6b", 1.19, 114_688),
        ("qwen3-8b", 15.14, 147_456),
        ("qwen3-14b", 27.98, 163_840),
        ("llama-3.1-8b", 15.01, 131_072),
    ],
)
def test_the_shapes_have_the_sizes_of_the_published_models(
    load: Load, model: str, weight_gb: float, kv_bytes: int
) -> None:
    roofline = load("roofline").Roofline(load("models").SHAPES[model], h200(load), "bfloat16")
    assert roofline.weight_bytes / 1e9 == pytest.approx(weight_gb, abs=0.006)
    assert roofline.kv_bytes_per_token == kv_bytes


def test_one_step_is_the_sum_of_what_it_reads_and_computes(load: Load) -> None:
    roofline = load("roofline").Roofline(load("models").SHAPES["qwen3-8b"], h200(load), "bfloat16")
    # 256 requests decode at a context of 1,000: weights and products together, then the cache.
    products_s = 256 * (13.89e9 + 1.24e9) / 790e12
    assert roofline.step_seconds(256, 256, 0, 256_000) == pytest.approx(
        max(15.136e9 / 4.3e12, products_s) + 256_000 * 147_456 / 4.3e12, rel=2e-3
    )


@pytest.mark.parametrize(
    ("model", "workload", "ideal_s"),
    [("qwen3-0.6b", "nano", 3.70), ("qwen3-8b", "nano", 10.58), ("qwen3-8b", "1024/1024", 23.56)],
)
def test_the_limit_of_a_workload_on_an_h200(load: Load, model: str, workload: str, ideal_s: float) -> None:
    workloads, roofline = load("workloads"), load("roofline")
    on_h200 = roofline.Roofline(load("models").SHAPES[model], h200(load), "bfloat16")
    requests = workloads.WORKLOADS[workload](workloads.FULL)
    assert roofline.ideal_seconds(on_h200, requests, 256, 16_384) == pytest.approx(ideal_s, rel=5e-3)


def test_eight_bits_and_a_shared_prefix_lower_the_limit(load: Load) -> None:
    workloads, roofline = load("workloads"), load("roofline")
    shape, shared = load("models").SHAPES["qwen3-8b"], workloads.shared_prefix(workloads.FULL)
    own = workloads.Workload("own", shared.prompts, shared.max_tokens)
    full, eight = (
        roofline.Roofline(shape, h200(load), "bfloat16", *options) for options in ((None, "auto"), ("fp8", "fp8"))
    )
    assert eight.weight_bytes < 0.6 * full.weight_bytes
    assert eight.kv_bytes_per_token * 2 == full.kv_bytes_per_token
    times = [roofline.ideal_seconds(line, work, 256, 16_384) for line in (full, eight) for work in (own, shared)]
    assert times[0] > times[1] > times[3]
    assert times[0] > times[2] > times[3]


def test_every_op_has_a_case(load: Load) -> None:
    device = torch.device("cpu")
    timed = {case.op for case in load("kernels").cases(device, is_tiny=True)}
    assert timed == set(all_ops())


def test_a_suite_without_time_skips_every_job_and_says_so(load: Load) -> None:
    suite = load("suite")
    jobs = [suite.Job(("offline.py",), 10), suite.Job(("kernels.py",), 10)]
    rows = list(suite.lines(jobs, "cpu", time_limit_s=5))
    assert [row["command"] for row in rows] == ["offline.py", "kernels.py"]
    assert all(row["failed"].startswith("skipped") for row in rows)


def test_a_suite_reports_a_job_that_fails_and_goes_on(load: Load) -> None:
    suite = load("suite")
    jobs = [suite.Job(("limits.py", "--no-such-option"), 0), suite.Job(("limits.py", "--tiny"), 0)]
    failed, limits = suite.lines(jobs, "cpu", time_limit_s=60)
    assert "no-such-option" in failed["failed"]
    assert limits["benchmark"] == "limits"
    table = suite.tables([failed, limits])
    assert "no-such-option" in table
    assert limits["device"] in table


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu(bare_environment: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = [sys.executable, str(BENCHMARKS / "suite.py"), "--tiny", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, env=bare_environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (output / "benchmarks.jsonl").read_text().splitlines()]
    assert [row for row in rows if "failed" in row] == []
    assert done.returncode == 0, done.stderr
    assert {row["op"] for row in rows if row["benchmark"] == "kernels"} == set(all_ops())
    runs = [row for row in rows if row["benchmark"] == "offline"]
    assert {(row["engine"], row["quantization"], row["deterministic"]) for row in runs} == {
        ("millrace", None, False),
        ("millrace", "fp8", False),
        ("millrace", None, True),
        ("transformers", None, False),
    }
    assert all(row["seconds"] > 0 and row["ideal_s"] > 0 and row["output_tokens"] > 0 for row in runs)
    assert [row["state"] for row in rows if row["benchmark"] == "startup"] == ["cold", "warm"]
    assert "share_of_limit" in done.stdout


def test_a_peer_that_cannot_run_is_skipped_with_its_reason(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    offline = load("offline")
    options = offline.parse(["--device", "cpu", "--workloads", "nano", "--peer", "transformers"])
    options.model = "no-such-model"
    offline.run_peer(options)
    (line,) = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    assert line["engine"] == "transformers"
    assert "no-such-model" in line["skipped"]


@pytest.mark.slow
def test_the_pipeline_is_measured_beside_the_engine() -> None:
    *cases, ratio = run(dict(os.environ), "pipeline.py", "--tiny", "--rows", "40", "--cpus", "2")
    assert [line["case"] for line in cases] == ["engine", "pipeline"]
    assert len({(line["rows"], line["output_tokens"]) for line in cases}) == 1
    assert ratio["ratio"] > 0


@pytest.mark.slow
def test_the_pipeline_is_measured_without_an_engine() -> None:
    *lines, whole = run(dict(os.environ), "pipeline_alone.py", "--rows", "3000", "--block", "256", "--every", "0.5")
    assert whole["case"] == "whole"
    assert whole["rows"] == 3000
    assert all({"driver"} <= line["memory"].keys() for line in lines)


def test_what_a_resume_must_know_is_measured() -> None:
    lines = run(dict(os.environ), "ledger.py", "--rows", "60000", "--lookups", "4000", "--block", "100")
    assert [(line["case"], line["rows"], line["found"]) for line in lines] == [
        ("position", 60_000, 2_000),
        ("key", 60_000, 2_000),
    ]


@pytest.mark.slow
def test_the_host_overhead_is_measured(bare_environment: dict[str, str]) -> None:
    assert run(bare_environment, "host_overhead.py", "--steps", "3", "--num-seqs", "2")


@pytest.mark.slow
def test_ranks_are_measured(bare_environment: dict[str, str]) -> None:
    lines = run(
        bare_environment, "parallel.py", "--steps", "3", "--repeats", "1", "--num-seqs", "2", "--lengths", "4", "3"
    )
    assert {line["case"] for line in lines} == {"parallel/step", "parallel/throughput"}
    measured = {"added_us", "output_tokens_per_s", "skipped"}
    assert all(measured & line.keys() for line in lines)
