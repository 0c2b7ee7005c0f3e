"""What the engine sets in the environment of its process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from millrace.engine.env import SPIN_COUNT

SCRIPT = "import os, millrace.engine; print(os.environ.get('GOMP_SPINCOUNT'))"
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_spin_shortly_unless_the_user_says_how_they_wait(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | given
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_it_is_set_before_torch_is_loaded() -> None:
    script = "import sys, millrace.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
