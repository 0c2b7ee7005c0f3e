"""The view of a running job: what it shows, what the time to go follows from, and that it harms nothing."""

from __future__ import annotations

import io
import queue
from dataclasses import replace

import pytest
from looks import absent, up
from rich.console import Console

from millrace import EngineDeadError
from millrace.actors import PoolStats, ReplicaStats
from millrace.pipeline.job import progress
from millrace.pipeline.job.display import ProgressView, describe_progress, describe_summary
from millrace.pipeline.job.progress import Progress, ProgressMonitor
from millrace.pipeline.ledger.counts import Counts
from millrace.pipeline.report import JobSummary, Run
from millrace.pipeline.stages.base import Row, RowError

DEADLINE_S = 60
LOOK = Progress(
    "running", 6000, 1500, 2, 12_345.6, 789.0, 65.0, 195.0, "23.1 rows/s over the last 60 s",
    num_ready=1, num_replicas=2, num_restarts=1, num_running=250, num_waiting=40, kv_cache_usage=0.43,
    cache_hit_rate=0.31,
)  # fmt: skip


class FakeProcessor:
    """A processor whose replica generates ten tokens between two looks, after it has loaded for two."""

    def __init__(self) -> None:
        self.num_looks = 0

    def stats(self) -> PoolStats:
        self.num_looks += 1
        if self.num_looks == 3:
            raise EngineDeadError("nobody answers for a moment")
        return PoolStats("pool", "ready", None, 1, [self._replica()])

    def _replica(self) -> ReplicaStats:
        if self.num_looks < 3:
            return absent("starting")
        return replace(up(steps=self.num_looks, out=10 * self.num_looks, running=3), node_ids=())


class FakeReader:
    """Six hundred rows were there before; ten more come with each look."""

    def __init__(self) -> None:
        self.num_rows = 600

    def update(self) -> Counts:
        self.num_rows += 10
        return Counts(num_rows=self.num_rows)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """What a monitor shows of a job of a thousand rows, up to the first time to go."""
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    seen: queue.Queue[Progress] = queue.Queue()
    monitor = ProgressMonitor(FakeProcessor(), FakeReader(), 1000, 0.0, show=seen.put)  # type: ignore[arg-type]
    found = []
    with monitor:
        while not found or found[-1].eta_s is None:
            found.append(seen.get(timeout=DEADLINE_S))
    return found


def test_an_error_of_a_look_does_not_stop_the_job(looks: list[Progress]) -> None:
    assert [look.phase for look in looks[:3]] == ["starting", "starting", "running"]
    assert (looks[0].num_ready, looks[0].num_replicas, looks[0].eta_s) == (0, 1, None)
    assert (looks[-1].num_ready, looks[-1].num_running) == (1, 3)
    assert looks[-1].cache_hit_rate == 0.25


def test_the_remaining_time_follows_from_the_rows_of_this_run(looks: list[Progress]) -> None:
    last = looks[-1]
    assert last.eta_s is not None
    rows_per_s = (1000 - last.num_done) / last.eta_s
    assert float(last.eta_basis.split()[0].replace(",", "")) == pytest.approx(rows_per_s, rel=0.01)
    assert " rows/s over the last " in last.eta_basis


def test_the_last_look_is_at_the_end() -> None:
    processor = FakeProcessor()
    monitor = ProgressMonitor(processor, FakeReader(), 1000, 0.0)  # type: ignore[arg-type]
    processor.num_looks = 10
    with monitor:
        pass  # Shorter than the time between two looks.
    assert monitor.finish(Counts()).work.num_output_tokens == 10 * processor.num_looks >= 110


def test_the_record_of_the_run_is_saved_in_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "SAVE_INTERVAL_S", 0.0)
    saved: queue.Queue[tuple[Run, Counts]] = queue.Queue()
    monitor = ProgressMonitor(
        FakeProcessor(), FakeReader(), None, 0.0, save=lambda run, counts: saved.put((run, counts))  # type: ignore[arg-type]
    )  # fmt: skip
    with monitor:
        first, _ = saved.get(timeout=DEADLINE_S), saved.get(timeout=DEADLINE_S)
    assert first[1].num_rows == 610


def test_the_terminal_shows_a_bar_and_the_basis_of_the_remaining_time() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ProgressView(console) as view:
        view.show(LOOK)
    shown = stream.getvalue()
    for text in (
        "running", "1500/6000", "25%", "2 failed", "12,346 in, 789 out", "1 of 2 replicas up, 1 restarted",
        "250 running, 40 waiting", "KV cache 43% in use, 31% of prompts found in it",
        "1:05 gone, ETA 3:15 from 23.1 rows/s over the last 60 s",
    ):  # fmt: skip
        assert text in shown


def test_other_outputs_get_a_plain_line_in_intervals() -> None:
    stream = io.StringIO()
    with ProgressView(Console(file=stream, width=200)) as view:
        view.show(LOOK)
        view.show(LOOK)
    assert stream.getvalue() == f"running: {describe_progress(LOOK)}\n"


def test_an_input_of_unknown_length_has_no_remaining_time() -> None:
    assert describe_progress(replace(LOOK, num_rows=None, eta_s=None)).startswith("1,500/? rows, 2 failed")


@pytest.mark.parametrize("step", ["show", "save"])
def test_a_monitor_that_fails_ends_no_job(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SAVE_INTERVAL_S", 0.0)

    def fail(*_: object) -> None:
        raise ValueError("out of range float values are not JSON compliant")

    with ProgressMonitor(FakeProcessor(), FakeReader(), 1000, 0.0, **{step: fail}):  # type: ignore[arg-type]
        pass
    assert "cannot be shown: ValueError: out of range" in caplog.text


def test_a_summary_shows_nothing_that_a_terminal_obeys() -> None:
    odd = "\x1b]0;owned\x07\x1b[2J \u202e [bold]\r\n"
    counts = Counts()
    counts.add(Row({}, {}, RowError("read", "ReadError", odd)))
    counts.finish_reasons[odd] = 1
    buffer = io.StringIO()
    console = Console(file=buffer, soft_wrap=True, highlight=False, force_terminal=True, color_system=None)
    console.print(describe_summary(JobSummary.of("m", odd, 1, counts, [])))
    assert all(line.isprintable() for line in buffer.getvalue().splitlines())
    assert buffer.getvalue().count(r"\x1b]0;owned\x07\x1b[2J \u202e [bold]\r\n") == 4
