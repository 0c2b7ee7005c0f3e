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
from dataclasses import astuple
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


def python(code: str) -> tuple[str, ...]:
    return ("-c", code)


def run_stand_ins(load: Load, folder: Path, *stand_ins: dict[str, Any], time_limit_s: float = 60) -> Any:
    """Runs steps with these fields; returns the exit status, the rows and the log."""
    steps = load("steps")
    texts = {"passed": "go on", "failed": "mend it", "limit_s": 30}
    status = steps.run_steps([steps.Step(**(texts | fields)) for fields in stand_ins], folder, "run", time_limit_s)
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return status, rows, (folder / "run.log").read_text()


def test_a_run_goes_on_after_steps_that_fail_or_hang(load: Load, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(load("steps"), "TRACE_S", 0.5)
    figure = 'print(\'{"benchmark": "b", "us": 7}\'); print("done")'
    status, rows, log = run_stand_ins(
        load,
        tmp_path,
        {"name": "fails", "command": python("raise ValueError('no such GPU')"), "otherwise": python("print('again')")},
        {"name": "hangs", "command": python("import time; time.sleep(1000)"), "limit_s": 3.1},
        {"name": "cannot", "command": (), "skip": "this needs two GPUs"},
        {"name": "prints", "command": python(figure), "proofs": ("fails",)},
    )
    assert status == 1
    *_, figures, _ = rows
    assert figures == {"benchmark": "b", "us": 7, "step": "prints", "withheld": "not passed: fails"}
    ends = [(row["step"], row["result"], row["follows"]) for row in rows if row["benchmark"] == "steps"]
    assert ends == [
        ("fails", "failed", "mend it"),
        ("hangs", "stopped", "mend it"),
        ("cannot", "skipped", "this needs two GPUs"),
        ("prints", "passed", "its figures do not count; not passed: fails"),
    ]
    assert rows[0]["last_line"] == "ValueError: no such GPU"
    assert [text in log for text in ("ValueError: no such GPU", "again", "time.sleep(1000)", "done")] == [True] * 4
    printed = capsys.readouterr().out
    assert "[2/4] hangs" in printed
    assert "ValueError: no such GPU" in printed
    assert "us" not in printed.split()  # a column of the figures


def test_a_run_ends_with_its_time_and_counts_figures_whose_tests_have_passed(load: Load, tmp_path: Path) -> None:
    fields = {"command": python('print(\'{"benchmark": "b"}\')'), "proofs": ()}
    proven = {**fields, "name": "second", "proofs": ("first",)}
    status, rows, _ = run_stand_ins(load, tmp_path, {**fields, "name": "first"}, proven)
    assert (status, [row["benchmark"] for row in rows]) == (0, ["b", "steps", "b", "steps"])
    assert [row["follows"] for row in rows if row["benchmark"] == "steps"] == ["go on"] * 2
    assert not [row for row in rows if "withheld" in row]
    status, (row,), _ = run_stand_ins(load, tmp_path, {**fields, "name": "late"}, time_limit_s=1)
    assert (status, row["result"], row["follows"]) == (0, "skipped", "no time is left")


@pytest.mark.parametrize("name", ["first_run", "second_run"])
def test_every_command_of_the_runs_on_a_gpu_is_understood(load: Load, name: str) -> None:
    module = load(name)
    names = [step.name for step in module.GPU_STEPS]
    assert [step.name for step in module.cpu_steps()] == names
    for steps in (module.GPU_STEPS, module.cpu_steps()):
        for step in steps:
            assert bool(step.command) != bool(step.skip)
            assert set(step.proofs) <= set(names[: names.index(step.name)])
            for script, *arguments in filter(None, (step.command, step.otherwise)):
                if script == "-P":
                    assert all((ROOT / path).is_dir() for path in arguments if path.startswith("tests"))
                else:
                    assert (ROOT / script).parent == BENCHMARKS
                    assert load(Path(script).stem).parse(arguments)


def test_the_first_run_fits_into_its_time_even_if_every_step_needs_all_of_its_own(load: Load) -> None:
    *steps, _ = load("first_run").GPU_STEPS  # The last step, the tests, has what the others leave.
    assert sum(step.limit_s for step in steps) < 395


def test_variants_of_the_attention_sweep_replace_what_the_launcher_chooses(load: Load) -> None:
    from millrace.kernels._triton import TARGETS
    from millrace.kernels.paged_attention import _plan as launcher

    sweep = load("attention_sweep")
    sizes, bfloat16 = load("kernel_cases").TINY, torch.bfloat16
    arguments = (TARGETS["sm_90"], bfloat16, bfloat16, 128, False)
    for case in sweep.sweeps(sizes, torch.device("cpu")):
        group = (4,) if case.config == "decode_config" else ()
        own = getattr(launcher, case.config)(*arguments, *group)
        for variant in case.variants:
            with sweep.chosen(case, variant):
                config = getattr(launcher, case.config)(*arguments, *group)
                splits = launcher.num_splits(arguments[0], 8, 4096, 64, programs_per_processor=1)
            wanted = zip(variant.tile or [None] * 4, astuple(own), strict=True)
            assert astuple(config) == tuple(mine if new is None else new for new, mine in wanted)
            assert variant.num_splits in (None, splits)
            assert variant.tile or variant.num_splits
        assert getattr(launcher, case.config)(*arguments, *group) == own


def test_gaps_between_kernels_that_overlap_are_not_counted_twice(load: Load) -> None:
    profile = load("profile_steps")
    spans = [profile.Span("a", 0, 1000), profile.Span("b", 500, 1500), profile.Span("a", 2000, 3000)]
    found = profile.gaps(spans, 2)
    assert (found["busy_ms"], found["gaps_ms"], found["largest_gap_ms"]) == (1.25, 0.25, 0.5)
    first, second = profile.by_name(spans, 2)
    assert (first["kernel"], first["us_per_step"], second["kernel"]) == ("a", 1000, "b")


def test_the_difference_of_a_kernel_is_relative_to_what_its_op_allows(load: Load) -> None:
    excess = load("check_kernels").excess
    wanted = torch.tensor([0.0, 1.0])
    size = 0.5**0.5
    assert excess(wanted + 0.02, wanted, 0.0, 0.01) == pytest.approx(2 / size)
    assert excess(wanted * 1e3 + 20, wanted * 1e3, 0.0, 0.01) == pytest.approx(2 / size)
    assert excess(torch.tensor([torch.nan, 1.0]), wanted, 0.1, 0.1) == torch.inf
    assert excess(torch.tensor([3, 4]), torch.tensor([3, 5]), 0.1, 0.1) == 1
    assert excess(wanted + 1e-6, wanted, 0.0, 0.0) == 2


def test_shorter_outputs_have_the_same_prompts(load: Load) -> None:
    workloads = load("workloads")
    nano = workloads.nano(workloads.FULL)
    short = nano.shortened(4)
    assert (short.prompts, short.max_tokens[:3]) == (nano.prompts, [n // 4 for n in nano.max_tokens[:3]])
    assert short.name == "nano, outputs / 4"
    assert nano.shortened(1) is nano


@pytest.mark.soak
def test_the_first_run_runs_on_a_cpu(bare_environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "first_run.py"), "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, env=bare_environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (tmp_path / "first_run.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout
    ends = [row["result"] for row in rows if row["benchmark"] == "steps"]
    assert ends == ["passed"] * 8 + ["skipped"]
    assert {row["op"] for row in rows if row["benchmark"] == "check_kernels"} == set(all_ops())


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
    lines = run(bare_environment, "host_overhead.py", "--steps", "3", "--num-seqs", "2", "--layers", "2")
    assert [line["num_seqs"] for line in lines if "num_seqs" in line] == [2, 2]
    launchers = {line["op"]: line for line in lines if "op" in line}
    assert launchers.keys() == {"paged_attention", "rope_and_store", "rms_norm", "silu_and_mul", "all of them"}
    assert all(line["planned_once_ms"] > 0 < line["planned_in_every_layer_ms"] for line in launchers.values())


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


def test_the_experts_of_a_layer_are_timed_against_a_loop_and_transformers(load: Load) -> None:
    script = load("experts")
    with torch.inference_mode():
        machine, *cases = script.lines(script.parse(["--tiny", "--tokens", "1", "5", "--repeats", "1"]))
    assert machine["read_GB_per_s"] > 0
    wanted = [(dtype, num_tokens) for dtype in ("float32", "bfloat16") for num_tokens in (1, 5)]
    assert [(case["dtype"], case["tokens"]) for case in cases] == wanted
    for case in cases:
        assert {"op_ms", "loop_ms", "grouped_ms", "times_the_better", "share_of_limit"} <= set(case)
        assert case["largest_difference"] < {"float32": 1e-4, "bfloat16": 0.1}[case["dtype"]]
