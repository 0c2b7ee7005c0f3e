"""The first minutes on a GPU: shows what runs, what is wrong, and where the time goes.

    python benchmarks/first_run.py [--device cuda] [--time-limit 400] [--output FOLDER]

It needs a checkout and a Python with torch, triton and transformers. The steps are in the order of what the others
depend on; each has a process and a time limit of its own, and a step that fails or hangs does not keep the next one
from running. FOLDER gets first_run.log with everything that was printed, and first_run.jsonl with the results. Without
a GPU the same steps run at tiny sizes, which shows only that they work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

from steps import Step, run_steps

SMALL = ("--model", "qwen3-0.6b", "--workloads", "nano")
LARGE = ("--model", "qwen3-8b", "--workloads", "1024/1024")
FP8 = ("--quantization", "fp8", "--kv-cache-dtype", "fp8")


def pytest(*arguments: str, num_processes: int = 12) -> tuple[str, ...]:
    """Returns the command of the tests for a GPU, in several processes where pytest-xdist is installed."""
    workers = ("-n", str(num_processes)) if importlib.util.find_spec("xdist") else ()
    options = ("-q", "--continue-on-collection-errors", "-p", "no:cacheprovider")
    return ("-P", "-m", "pytest", *options, *workers, *arguments)


def script(name: str, *arguments: str, device: str = "cuda") -> tuple[str, ...]:
    """Returns the command of a script of this folder."""
    return (f"benchmarks/{name}.py", "--device", device, *arguments)


GPU_STEPS = (
    Step(
        "1 machine",
        script("machine"),
        30,
        passed="everything can run",
        failed="install what is missing first; the steps below may fail for that reason alone",
    ),
    Step(
        "2 kernels",
        script("check_kernels"),
        50,
        passed="all kernels agree with their plain bodies at the sizes of models",
        failed="mend the ops named wrong before any figure counts; a crash was repeated with CUDA_LAUNCH_BLOCKING=1",
    ),
    Step(
        "3 engine",
        script("check_engine"),
        45,
        passed="recording, streams and planning ahead are right",
        failed="only recorded cases wrong: enforce_eager=True until mended; only overlap_depth=1 wrong: a race",
    ),
    Step(
        "4 nano Qwen3-0.6B",
        script("offline", *SMALL),
        45,
        passed="compare with the limit, and step_ms of step 6 with its busy_ms: is the host late?",
        failed="it ran again with --enforce-eager; if that passed, the fault is in recording",
        otherwise=script("offline", *SMALL, "--enforce-eager"),
    ),
    Step(
        "5 attention sweep",
        script("attention_sweep", "--time-limit", "65"),
        80,
        passed="take the fastest tiles, stages and splits into _configs.py; decide on a library for prompts (IS_USED)",
        failed="look for the case in the log; the lines before it count",
    ),
    Step(
        "6 profile",
        script("profile_steps", "--model", "qwen3-0.6b", "qwen3-8b"),
        45,
        passed="the kernels with the most time, and the gaps, give the order of the work that follows",
        failed="the lines measured without the profiler count; time the parts of a step with events",
        otherwise=script("profile_steps", "--model", "qwen3-0.6b", "--enforce-eager"),
    ),
    Step(
        "7a Qwen3-8B bf16",
        script("offline", *LARGE, "--scale", "4"),
        50,
        passed="share_of_limit says what is left in products and attention",
        failed="it ran again with --enforce-eager; compare with 7b",
        otherwise=script("offline", *LARGE, "--scale", "8", "--enforce-eager"),
    ),
    Step(
        "7b Qwen3-8B fp8",
        script("offline", *LARGE, "--scale", "4", *FP8),
        45,
        passed="compare with 7a: the gain of 8-bit products and cache",
        failed="it ran again with the 8-bit cache alone; if that passed, the product of scaled rows is at fault",
        otherwise=script("offline", *LARGE, "--scale", "8", *FP8[2:]),
    ),
    Step(
        "8 tests of kernels",
        pytest("-m", "gpu", "tests/kernels"),
        120,
        passed="figures of the kernels count",
        failed="mend the tests that fail; stopped: those before it count, and the second run repeats all",
    ),
)


def cpu_steps() -> tuple[Step, ...]:
    """Returns the same steps with tiny sizes for a CPU, which only show that they work."""
    tiny = ("--model", "tiny", "--workloads")
    commands = {
        "1 machine": script("machine", device="cpu"),
        "2 kernels": script("check_kernels", "--tiny", "--processes", "2", device="cpu"),
        "3 engine": script("check_engine", "--model", "tiny", device="cpu"),
        "4 nano Qwen3-0.6B": script("offline", *tiny, "nano", device="cpu"),
        "5 attention sweep": script("attention_sweep", "--tiny", device="cpu"),
        "6 profile": script("profile_steps", "--model", "tiny", device="cpu"),
        "7a Qwen3-8B bf16": script("offline", *tiny, "1024/1024", "--scale", "4", device="cpu"),
        "7b Qwen3-8B fp8": script("offline", *tiny, "1024/1024", "--scale", "4", *FP8, device="cpu"),
        "8 tests of kernels": (),
    }
    reasons = {"8 tests of kernels": "these tests need a GPU; make test runs the others"}
    follows = "it works at a tiny size on a CPU; its figures mean nothing"
    return tuple(
        Step(step.name, commands[step.name], 60, follows, step.failed, skip=reasons.get(step.name, ""))
        for step in GPU_STEPS
    )


def has_gpu() -> bool:
    """Returns whether the machine has a GPU's tool or device file. The first step shows whether torch can use it."""
    return bool(shutil.which("nvidia-smi") or [*Path("/dev").glob("nvidia[0-9]*")] or Path("/dev/kfd").exists())


def parse(arguments: list[str] | None = None, *, time_limit_s: float = 400) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is a GPU, if not given")
    parser.add_argument("--time-limit", type=float, default=time_limit_s, metavar="SECONDS", help="for all steps")
    parser.add_argument("--output", type=Path, default=Path("build"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if has_gpu() else "cpu")
    return options


def main() -> int:
    """Runs the steps; returns 1 if one failed."""
    options = parse()
    steps = GPU_STEPS if options.device == "cuda" else cpu_steps()
    if options.device == "cpu":  # On a busy machine threads that wait for each other take most of the time.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run_steps(steps, options.output, "first_run", options.time_limit)


if __name__ == "__main__":
    raise SystemExit(main())
