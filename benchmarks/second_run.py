"""The second run on a GPU: its tests, and then the figures of docs/benchmarks.md, which count only if the tests pass.

    python benchmarks/second_run.py [--device cuda] [--time-limit 240] [--output FOLDER]

Like first_run.py it writes second_run.log and second_run.jsonl into FOLDER. A line with the field `withheld` is a
figure of code whose tests have not passed in this run: it is not to be reported.
"""

from __future__ import annotations

from first_run import FP8, LARGE, SMALL, parse, pytest, script
from steps import Step, run_steps

EIGHT_BITS = "fp8 or float8 or 8_bit or 8-bit or scaled_linear"
"""The part of the tests that concerns 8-bit weights and caches, as an expression of pytest's -k."""
TESTS = ("tests/kernels", "tests/engine")

GPU_STEPS = (
    Step(
        "1 tests",
        pytest("-m", "gpu", "-k", f"not ({EIGHT_BITS})", *TESTS),
        85,
        passed="the figures of steps 3 and 4 count",
        failed="no figure of this run counts; mend what the log shows",
    ),
    Step(
        "2 tests of 8 bits",
        pytest("-m", "gpu", "-k", EIGHT_BITS, *TESTS),
        40,
        passed="the figure of step 5 counts if step 1 passed too",
        failed="the figure of step 5 does not count",
    ),
    Step(
        "3 nano Qwen3-0.6B",
        script("offline", *SMALL),
        40,
        passed="for docs/benchmarks.md; goal: 25,000 output tok/s or more",
        failed="no figure",
        proofs=("1 tests",),
    ),
    Step(
        "4 Qwen3-8B bf16",
        script("offline", *LARGE),
        90,
        passed="for docs/benchmarks.md; goal: 29.5 s or less",
        failed="no figure",
        proofs=("1 tests",),
    ),
    Step(
        "5 Qwen3-8B fp8",
        script("offline", *LARGE, *FP8),
        75,
        passed="for docs/benchmarks.md; goal: 18 s or less",
        failed="no figure",
        proofs=("1 tests", "2 tests of 8 bits"),
    ),
    Step(
        "6 products of codes",
        script("kernels", "--only", "group_linear", "--repeats", "7"),
        40,
        passed="for kernels/group_linear/README.md; goal at 1 and 16 rows: share_of_limit of 0.85 or more",
        failed="no figure",
        proofs=("1 tests",),
    ),
    Step(
        "7 products of adapters",
        script("kernels", "--only", "lora", "--repeats", "7"),
        30,
        passed="for kernels/lora/README.md; goal at 1 and 16 rows: 5 microseconds or less",
        failed="no figure",
        proofs=("1 tests",),
    ),
    Step(
        "8 nano Qwen3-0.6B, 8 adapters",
        script("offline", *SMALL, "--adapters", "8"),
        40,
        passed="for docs/benchmarks.md; goal: 0.85 or more of the figure of step 3",
        failed="no figure",
        proofs=("1 tests",),
    ),
)


def cpu_steps() -> tuple[Step, ...]:
    """Returns the steps with a tiny model, which only show that they work, and the reason why the tests cannot run."""
    tiny = ("--model", "tiny", "--workloads")
    commands = {
        "3 nano Qwen3-0.6B": script("offline", *tiny, "nano", device="cpu"),
        "4 Qwen3-8B bf16": script("offline", *tiny, "1024/1024", device="cpu"),
        "5 Qwen3-8B fp8": script("offline", *tiny, "1024/1024", *FP8, device="cpu"),
        "6 products of codes": script("kernels", "--tiny", "--only", "group_linear", device="cpu"),
        "7 products of adapters": script("kernels", "--tiny", "--only", "lora", device="cpu"),
        "8 nano Qwen3-0.6B, 8 adapters": script("offline", *tiny, "nano", "--adapters", "8", device="cpu"),
    }
    return tuple(
        Step(
            step.name,
            commands.get(step.name, ()),
            60,
            "it works at a tiny size on a CPU; its figures mean nothing",
            step.failed,
            proofs=step.proofs,
            skip="" if step.name in commands else "these tests need a GPU; make test runs the others",
        )
        for step in GPU_STEPS
    )


def main() -> int:
    """Runs the steps; returns 1 if one failed."""
    options = parse(time_limit_s=240)
    steps = GPU_STEPS if options.device == "cuda" else cpu_steps()
    return run_steps(steps, options.output, "second_run", options.time_limit)


if __name__ == "__main__":
    raise SystemExit(main())
