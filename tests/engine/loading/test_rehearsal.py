"""The rehearsal: what an engine compiles for a GPU while the weights of its model are read."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.engine.device import Device
from millrace.engine.loading.rehearsal import start_rehearsal

pytest.importorskip("triton")

HERE = Path(__file__).parent
GPU = Device(torch.device("cuda"), 8192, 1)


class FakeRehearsal:
    """A rehearsal that raises, or records that it was run."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.has_run = error, False

    def run(self) -> None:
        self.has_run = True
        if self.error:
            raise self.error


def test_a_rehearsal_asks_for_every_form_that_random_steps_of_the_model_ask_for() -> None:
    path = os.pathsep.join([str(HERE.parent.parent / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-P", str(HERE / "rehearsal_forms.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    num_forms = {name: int(count) for name, count in (line.rsplit(": ", 1) for line in done.stdout.splitlines())}
    assert len(num_forms) == 13
    assert all(5 < count < 40 for count in num_forms.values()), num_forms


def test_nothing_is_compiled_ahead_on_a_cpu() -> None:
    rehearsal: Any = FakeRehearsal()
    start_rehearsal(rehearsal, Device(torch.device("cpu"), 2048, 0))()
    assert not rehearsal.has_run


def test_a_rehearsal_that_fails_is_logged_and_does_not_stop_the_start(caplog: pytest.LogCaptureFixture) -> None:
    rehearsal: Any = FakeRehearsal(RuntimeError("no driver"))
    with caplog.at_level(logging.WARNING, "millrace.engine.loading.rehearsal"):
        start_rehearsal(rehearsal, GPU)()
    assert rehearsal.has_run
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are not compiled ahead, so the first steps will wait for it: RuntimeError: no driver"
    ]
