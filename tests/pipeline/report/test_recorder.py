"""The record of a run: work over restarts, a timeline that keeps its length, and where the time went."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from looks import absent, up

from millrace.pipeline.ledger.counts import Counts
from millrace.pipeline.report import Run
from millrace.pipeline.report.idle import IdleClock
from millrace.pipeline.report.recorder import Recorder
from millrace.pipeline.report.tally import Tally, Work
from millrace.pipeline.report.timeline import AMOUNTS, Interval, Timeline


def clock_of(*looks: tuple[float, list[object], float]) -> IdleClock:
    """Goes through (seconds passed, replicas, seconds blocked so far) as the recorder does."""
    clock, tally = IdleClock(), Tally()
    for passed_s, replicas, blocked_s in looks:
        clock.look(replicas, tally.look(replicas), passed_s, blocked_s)
    return clock


def test_work_survives_the_restart_of_a_replica() -> None:
    tally = Tally()
    for replicas in ([up(steps=5, out=100)], [up(steps=9, out=180)], [absent("dead")], [up("0.1", steps=2, out=30)]):
        tally.look(replicas)
    assert tally.total.num_output_tokens == 210
    assert tally.total.num_input_tokens == 420
    assert tally.num_restarts == 1


def test_counters_that_go_back_belong_to_a_restarted_engine() -> None:
    tally = Tally()
    tally.look([up(steps=50, out=1000)])
    assert tally.look([up(steps=3, out=60)])["0.0"].num_output_tokens == 60
    assert tally.total.num_output_tokens == 1060


def test_a_look_without_an_answer_loses_no_time() -> None:
    tally = Tally()
    for replicas in ([up(steps=1, out=10)], [absent("ready")], [up(steps=3, out=30)]):
        tally.look(replicas)
    assert tally.total == Work(60, 15, 30, 3, 0, 0.0)


INTERVALS = st.lists(
    st.builds(
        Interval, end_s=st.just(0.0), duration_s=st.floats(0.01, 10), num_rows=st.integers(0, 50),
        step_time_s=st.floats(0, 10), num_running=st.floats(0, 300),
    ),
    max_size=200,
)  # fmt: skip


@given(INTERVALS)
def test_a_timeline_keeps_its_length_and_loses_no_amount(intervals: list[Interval]) -> None:
    timeline = Timeline(max_intervals=8)
    for interval in intervals:
        timeline.add(interval)
    assert len(timeline.intervals) <= 8
    for name in (*AMOUNTS, "duration_s"):
        want = sum(getattr(interval, name) for interval in intervals)
        assert sum(getattr(interval, name) for interval in timeline.intervals) == pytest.approx(want)
    area = sum(interval.num_running * interval.duration_s for interval in intervals)
    assert sum(one.num_running * one.duration_s for one in timeline.intervals) == pytest.approx(area, abs=1e-6)


def test_time_before_the_first_answer_is_loading() -> None:
    clock = clock_of((2.0, [absent("starting")], 0), (0.5, [up(steps=0)], 0))
    assert clock.idle_s["loading"] == 2.5


def test_an_engine_without_rows_is_starved_if_more_come_and_done_if_none_does() -> None:
    first = up(steps=1, busy_s=0.5)
    looks = [(0.5, [first], 0.0), (0.5, [up(steps=9, busy_s=1.0)], 0.0), (3.0, [up(steps=9, busy_s=1.0)], 0.0)]
    assert clock_of(*looks).idle_s["draining"] == 3.0
    clock = clock_of(*looks, (0.5, [up(steps=12, busy_s=1.5)], 0.0), (2.0, [up(steps=12, busy_s=1.5)], 0.0))
    assert (clock.idle_s["starved"], clock.idle_s["draining"]) == (3.0, 2.0)
    assert clock.busy_s == 1.5


def test_time_that_the_sink_holds_up_is_backpressure() -> None:
    looks = [(0.5, [up(steps=1, busy_s=0.5)], 0.0), (3.0, [up(steps=1, busy_s=0.5)], 1.0)]
    clock = clock_of(*looks, (0.5, [up(steps=2, busy_s=1.0)], 2.0))
    assert (clock.idle_s["backpressured"], clock.idle_s["starved"]) == (2.0, 1.0)


def test_time_between_steps_and_time_without_a_replica_have_their_own_reasons() -> None:
    clock = clock_of(
        (1.0, [up(steps=1, busy_s=1.0)], 0.0),
        (1.0, [up(steps=2, busy_s=1.75, running=4)], 0.0),
        (2.0, [absent("dead")], 0.0),
        (3.0, [absent("unplaced", "0.1")], 0.0),
        (4.0, [up("1.0", state="draining")], 0.0),
        (4.0, [up("1.0", state="draining")], 0.0),
    )
    assert clock.idle_s["between_steps"] == 0.25
    assert clock.idle_s["no_replica"] == 5.0
    assert clock.idle_s["draining"] == 4.0


def test_work_that_an_old_answer_did_not_report_is_moved_from_the_idle_time_before() -> None:
    clock = clock_of((3.0, [up(steps=0)], 0.0), (0.5, [up(steps=9, busy_s=2.5)], 0.0))
    assert (clock.busy_s, clock.idle_s["loading"]) == (2.5, 1.0)


LOOKS = st.lists(st.tuples(st.floats(0.1, 5), st.sampled_from(["starting", "ready", "silent", "dead"])), max_size=30)


@given(LOOKS)
def test_all_time_of_a_replica_is_counted(looks: list[tuple[float, str]]) -> None:
    clock, tally, steps, busy_s = IdleClock(), Tally(), 0, 0.0
    looks.append((1.0, "ready"))
    for passed_s, state in looks:
        if state == "ready":
            steps, busy_s = steps + 1, busy_s + passed_s / 2
            replica = up(steps=steps, busy_s=busy_s)
        else:
            replica = absent("ready" if state == "silent" else state)
        clock.look([replica], tally.look([replica]), passed_s, 0.0)
    all_s = sum(passed_s for passed_s, _ in looks)
    assert clock.busy_s + sum(clock.idle_s.values()) == pytest.approx(all_s)


def counts(num_rows: int, num_failed: int = 0) -> Counts:
    return Counts(num_rows=num_rows, num_failed=num_failed)


def test_a_run_is_recorded() -> None:
    recorder = Recorder(100.0, accelerator_of=lambda node_id: "H100")
    recorder.look([absent("starting")], counts(40), 104.0)
    recorder.look([up(steps=1, out=10, busy_s=1.0, running=3)], counts(40), 105.0)
    recorder.look([up(steps=9, out=90, busy_s=2.0, running=3)], counts(60, 2), 106.0)
    run = recorder.finish([up(steps=9, out=90, busy_s=2.0)], counts(70, 3), 108.0)
    assert (run.start_up_s, run.generate_s, run.write_s, run.seconds) == (5.0, 1.0, 2.0, 8.0)
    assert recorder.rows_before == 40
    assert sum(one.num_rows for one in run.timeline.intervals) == 30
    assert run.held_s == 8.0
    assert run.accelerator_s == {"H100": 8.0}
    assert run.work.num_output_tokens == 90
    assert recorder.cache_hit_rate == 0.25


def test_a_run_reads_back_as_it_was_written() -> None:
    recorder = Recorder(0.0)
    recorder.look([up(steps=1, out=10, busy_s=0.25, running=3)], counts(4), 1.0)
    run = recorder.finish([up(steps=2, out=20, busy_s=0.5)], counts(8), 2.0)
    plain = run.as_dict()
    assert Run.from_dict(json.loads(json.dumps(plain))).as_dict() == plain


def test_rates_cover_the_last_seconds() -> None:
    recorder = Recorder(0.0)
    for second in range(30):
        out = 10 * second if second < 10 else 100 + 50 * (second - 10)
        recorder.look([up(steps=second + 1, out=out, busy_s=second)], counts(0), float(second))
    assert recorder.rates() == (100.0, 50.0)
