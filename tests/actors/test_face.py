"""What importing the actors costs: workers of a job import them, and have no use for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import millrace.actors", []),
        ("from millrace.actors import EnginePool, EngineReplica, PoolClient, PoolConfig, PoolStats", ["ray"]),
    ],
)
def test_import_loads_no_more_than_needed(code: str, loaded: list[str]) -> None:
    ask = f"import sys; {code}; print([m for m in ('ray', 'torch', 'transformers', 'pandas') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-P", "-c", ask], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(loaded)
