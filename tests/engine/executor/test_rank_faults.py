"""Processes of ranks die: the engine says so and never hangs, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from millrace.engine.errors import ConfigError, EngineDeadError
from millrace.engine.executor.distributed import TeamStep
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

SETTINGS = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4}
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
EACH = pytest.mark.parametrize(
    "sizes", [(2, 1), (1, 2), pytest.param((2, 2), marks=pytest.mark.soak)], ids=["tp", "pp", "tp-pp"]
)

SCRIPT = """
import json, sys
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams
llm = LLM(sys.argv[1], dtype="float32", device="cpu", tensor_parallel_size=2)
print(json.dumps(llm.llm_engine.executor.processes.pids), flush=True)
while True:
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
"""


def start(tiny_model, sizes: tuple[int, int]) -> tuple[LLM, int]:
    """Returns an engine of several ranks and the process of the last."""
    ranks = dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), sizes, strict=True))
    llm = LLM(str(tiny_model("llama")), **SETTINGS, **ranks)
    return llm, llm.llm_engine.executor.processes.pids[-1]


@EACH
def test_a_killed_rank_is_an_error(tiny_model, sizes: tuple[int, int]) -> None:
    llm, pid = start(tiny_model, sizes)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2), use_tqdm=False)
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):  # The second time it is known.
        with pytest.raises(EngineDeadError, match=r"rank \d"):
            llm.generate([[5, 6, 7]], LONG, use_tqdm=False)
    llm.close()
    assert not psutil.pid_exists(pid)


@EACH
def test_a_rank_killed_in_the_middle_of_a_step_is_an_error(tiny_model, sizes: tuple[int, int]) -> None:
    llm, pid = start(tiny_model, sizes)
    os.kill(pid, signal.SIGSTOP)  # Rank 0 comes to wait for it; when it is killed does not matter.
    timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(EngineDeadError):
        llm.generate([[5, 6, 7]], LONG, use_tqdm=False)
    timer.join()
    llm.close()


def test_a_step_that_fails_ends_the_engine(tiny_model) -> None:
    llm, pid = start(tiny_model, (2, 1))

    def fail(plan):
        raise RuntimeError("out of luck")

    llm.llm_engine.executor._runner.execute = fail
    with pytest.raises(EngineDeadError, match="rank 0 failed: RuntimeError: out of luck"):
        llm.generate([[5, 6, 7]], LONG, use_tqdm=False)
    assert not psutil.pid_exists(pid)


def test_a_device_that_waits_for_a_dead_rank_is_not_waited_for(tiny_model) -> None:
    llm, pid = start(tiny_model, (2, 1))

    class Stuck:
        """A step on a GPU, in the middle of a sum."""

        def is_ready(self) -> bool:
            os.kill(pid, signal.SIGKILL)
            return False

    with pytest.raises(EngineDeadError, match="rank 1"):
        TeamStep(llm.llm_engine.executor, Stuck()).result()


def test_closing_leaves_no_process(tiny_model) -> None:
    llm, pid = start(tiny_model, (2, 1))
    llm.close()
    llm.close()
    assert not psutil.pid_exists(pid)


def test_what_cannot_be_cut_starts_no_process(tiny_model) -> None:
    before = len(psutil.Process().children())
    with pytest.raises(ConfigError, match="tensor_parallel_size=3"):
        LLM(str(tiny_model("llama")), **SETTINGS, tensor_parallel_size=3)
    assert len(psutil.Process().children()) == before


def test_a_killed_parent_leaves_no_process(tiny_model, root: Path, tmp_path: Path) -> None:
    (tmp_path / "millrace").symlink_to(root)
    command = [sys.executable, "-P", "-c", SCRIPT, str(tiny_model("llama"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(pid) for pid in json.loads(parent.stdout.readline())]
        parent.kill()
    assert len(children) == 1
    gone, alive = psutil.wait_procs(children, timeout=10)
    for process in alive:
        process.kill()
    assert not alive and len(gone) == 1
