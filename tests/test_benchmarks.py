"""The benchmark scripts: they run at tiny sizes on a CPU, and their limits equal limits computed by hand.

The tests do not look at the measured times.
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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from millrace.kernels._op import all_ops

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a file of benchmarks/ as its scripts do, by its bare name, and forgets all of them afterwards.

    A module that has such a name already (transformers looks for one named `kernels`) is removed for that time.
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
    """The environment variables of a checkout that is not installed, on a machine without Ray and pydantic."""
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
    # The last request to end is the first to start, and all have started before the first one ends.
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


@pytest.mark.soak
def test_a_suite_reports_a_job_that_fails_and_goes_on(load: Load) -> None:
    suite = load("suite")
    jobs = [suite.Job(("limits.py", "--no-such-option"), 0), suite.Job(("limits.py", "--tiny"), 0)]
    failed, limits = suite.lines(jobs, "cpu", time_limit_s=60)
    assert "no-such-option" in failed["failed"]
    assert limits["benchmark"] == "limits"
    table = suite.tables([failed, limits])
    assert "no-such-option" in table
    assert limits["device"] in table


@pytest.mark.soak
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


@pytest.mark.soak
def test_the_pipeline_is_measured_beside_the_engine() -> None:
    *cases, ratio = run(dict(os.environ), "pipeline.py", "--tiny", "--rows", "40", "--cpus", "2")
    assert [line["case"] for line in cases] == ["engine", "pipeline"]
    assert len({(line["rows"], line["output_tokens"]) for line in cases}) == 1
    assert ratio["ratio"] > 0


def test_without_the_peer_nothing_is_measured_side_by_side() -> None:
    command = [sys.executable, str(BENCHMARKS / "side_by_side.py")]
    for arguments, reason in ([], "--peer-python"), (["--peer-python", "/no/such/python"], "/no/such/python"):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
        assert "skipped" in done.stderr
        assert reason in done.stderr


def test_a_python_without_the_peer_is_told_from_one_with_it(load: Load, tmp_path: Path) -> None:
    find_peer = load("side_by_side").find_peer
    python = tmp_path / "python"
    for status, found in (1, "No module named 'vllm'"), (0, None):
        python.write_text(f"#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vllm'\" >&2\nexit {status}\n")
        python.chmod(0o755)
        reason = find_peer(str(python))
        assert reason is None if found is None else found in reason


def test_starting_cancels_out_between_two_numbers_of_rows(load: Load) -> None:
    side_by_side = load("side_by_side")
    runs = {(side_by_side.OURS, 100): 5, (side_by_side.OURS, 500): 10, (side_by_side.PEER, 100): 60}
    runs |= {(side_by_side.PEER, 500): 80}
    noise = (0, -1, 2)
    lines = [{"side": side, "rows": rows, "seconds": s + more} for more in noise for (side, rows), s in runs.items()]
    found = side_by_side.summary(lines)
    assert found["seconds"][side_by_side.PEER] == {100: [60, 59, 62], 500: [80, 79, 82]}
    assert found["steady_tokens_per_s"] == {"millrace": 400 * 48 / 5, "ray.data.llm": 400 * 48 / 20}
    assert (found["ratio_steady"], found["ratio_in_all"]) == (4, {100: 12, 500: 8})


@pytest.mark.parametrize(("ids", "lengths"), [([0, 1], [48, 48]), ([0, 1, 1], [48, 48, 48]), ([0, 1, 2], [48, 7, 48])])
def test_a_job_that_lost_doubled_or_cut_a_row_is_no_figure(
    load: Load, tmp_path: Path, ids: list[int], lengths: list[int]
) -> None:
    pq.write_table(pa.table({"id": ids, "num_generated_tokens": lengths}), tmp_path / "part.parquet")
    with pytest.raises(RuntimeError, match=r"rows were written for 3|rows have 7 to 48 tokens"):
        load("side_by_side").count_tokens(tmp_path, 3)


@pytest.mark.soak
def test_our_side_of_side_by_side_is_measured_alone() -> None:
    alone = ["--sides", "millrace", "--tiny", "--rows", "40", "--rounds", "1", "--no-warm-up"]
    line, summary = run(dict(os.environ), "side_by_side.py", *alone)
    assert (line["side"], line["rows"], line["output_tokens"]) == ("millrace", 40, 40 * 48)
    assert summary["seconds"] == {"millrace": {"40": [line["seconds"]] * 3}}


@pytest.mark.soak
def test_what_a_process_leaves_behind_is_waited_for(load: Load, tmp_path: Path) -> None:
    left = f"import os; os.setsid(); open({str(tmp_path / 'late')!r}, 'w').write(str(sum(range(10**7))))"
    leaver = f"import subprocess, sys; print('first'); subprocess.Popen([sys.executable, '-c', {left!r}])"
    run_it = f"run_to_the_end([sys.executable, '-c', {leaver!r}], os.environ)"
    script = f"import os, sys; from processes import run_to_the_end; print({run_it})"
    # In a process of its own, because the function waits for all descendants, and so would wait for those of pytest.
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert (tmp_path / "late").read_text()
    assert "code=0, printed='first" in done.stdout


@pytest.mark.soak
def test_the_pipeline_is_measured_without_an_engine() -> None:
    *lines, whole = run(dict(os.environ), "pipeline_alone.py", "--rows", "3000", "--block", "256", "--every", "0.5")
    assert whole["case"] == "whole"
    assert whole["rows"] == 3000
    assert all({"driver"} <= line["memory"].keys() for line in lines)


@pytest.mark.soak
def test_what_a_resume_must_know_is_measured() -> None:
    lines = run(dict(os.environ), "ledger.py", "--rows", "60000", "--lookups", "4000", "--block", "100")
    assert [(line["case"], line["rows"], line["found"]) for line in lines] == [
        ("position", 60_000, 2_000),
        ("key", 60_000, 2_000),
    ]


@pytest.mark.slow
def test_the_host_overhead_is_measured(bare_environment: dict[str, str]) -> None:
    assert run(bare_environment, "host_overhead.py", "--steps", "3", "--num-seqs", "2")


@pytest.mark.soak
def test_what_a_grammar_costs_is_measured(bare_environment: dict[str, str]) -> None:
    sizes = ["--vocab-size", "1000", "--num-rows", "3", "--num-steps", "4", "--repeats", "1"]
    lines = run(bare_environment, "structured.py", *sizes)
    assert [line["case"] for line in lines] == ["start", "mask", "mask", "apply", "engine", "engine", "engine"]


@pytest.mark.soak
def test_ranks_are_measured(bare_environment: dict[str, str]) -> None:
    lines = run(
        bare_environment, "parallel.py", "--steps", "3", "--repeats", "1", "--num-seqs", "2", "--lengths", "4", "3"
    )
    assert {line["case"] for line in lines} == {"parallel/step", "parallel/throughput"}
    measured = {"added_us", "output_tokens_per_s", "skipped"}
    assert all(measured & line.keys() for line in lines)
