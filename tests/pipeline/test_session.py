"""Which Ray a job runs on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.engine.errors import ConfigError
from millrace.pipeline.session import cluster_address


@pytest.fixture(autouse=True)
def ray_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where Ray keeps its files in these tests: nothing has been started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


@pytest.fixture
def listening() -> Iterator[str]:
    """An address where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent() -> str:
    """An address where nothing does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_without_a_cluster_a_job_has_its_own_ray() -> None:
    assert cluster_address() is None


def test_what_ray_start_has_left_running_is_taken(ray_folder: Path, listening: str) -> None:
    (ray_folder / "ray_current_cluster").write_text(f"{listening}\n")
    assert cluster_address() == listening


def test_what_it_has_left_and_is_gone_is_not_waited_for(ray_folder: Path, silent: str) -> None:
    (ray_folder / "ray_current_cluster").write_text(silent)
    assert cluster_address() is None


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_named_cluster_counts_before_the_one_here(
    ray_folder: Path, listening: str, silent: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ray_folder / "ray_current_cluster").write_text(silent)
    monkeypatch.setenv("RAY_ADDRESS", prefix + listening)
    assert cluster_address() == prefix + listening


@pytest.mark.parametrize("spoilt", ["{}", "ray://{}", "nowhere"])
def test_a_named_cluster_that_does_not_answer_is_told_at_once(
    silent: str, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", spoilt.format(silent))
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS: no Ray cluster answers at '.*'; correct it, or unset it"):
        cluster_address()


@pytest.mark.parametrize(("named", "address"), [("auto", "auto"), ("local", None)])
def test_words_that_ray_knows_are_its_own(named: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    assert cluster_address() == address
