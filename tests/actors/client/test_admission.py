"""Requests in flight never pass the bound, and whoever waits gets in."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_engine import requests
from hypothesis import given
from hypothesis import strategies as st

from millrace.actors import EnginePool, PoolClient
from millrace.actors.client.admission import Admission

Start = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], object]], None]


def test_without_a_bound_all_come_in() -> None:
    admission = Admission(None)
    assert [admission.enter(1000, wait=True) for _ in range(3)] == [1000] * 3


@given(st.integers(1, 50), st.lists(st.integers(1, 60)))
def test_no_more_than_the_bound_come_in(bound: int, wishes: list[int]) -> None:
    admission, inside = Admission(bound), 0
    for wanted in wishes:
        count = admission.enter(wanted, wait=False)
        inside += count
        assert 0 <= count <= wanted
        assert inside <= bound
        assert inside == bound or count == wanted or count == 0
        if not count:
            admission.leave(inside)
            inside = 0
            assert admission.enter(1, wait=False) == 1
            admission.leave(1)


def test_room_is_filled_in_lots() -> None:
    admission = Admission(80)
    assert admission.enter(100, wait=False) == 80
    admission.leave(9)
    assert admission.enter(20, wait=False) == 0
    admission.leave(1)
    assert admission.enter(20, wait=False) == 10
    admission.leave(1)
    assert admission.enter(1, wait=False) == 1, "the last ones of a call wait for no lot"


def test_those_who_wait_come_in_one_after_the_other() -> None:
    admission, peak, inside, lock = Admission(8), 0, 0, threading.Lock()

    def work(_: int) -> int:
        nonlocal peak, inside
        left = 20
        while left:
            count = admission.enter(left, wait=True)
            with lock:
                inside += count
                peak = max(peak, inside)
            with lock:
                inside -= count
            admission.leave(count)
            left -= count
        return 20

    with ThreadPoolExecutor(12) as threads:
        assert sum(threads.map(work, range(60))) == 1200
    assert 0 < peak <= 8


def num_running(pool: EnginePool) -> int:
    return sum(replica.engine["num_running"] for replica in pool.stats(with_engines=True).replicas if replica.engine)


@pytest.mark.parametrize("sizes", [[200], [8] * 25], ids=["one large call", "many small calls"])
def test_engines_see_the_bound_whatever_the_calls(
    start_pool: Start, gate: Path, eventually: Eventually, sizes: list[int]
) -> None:
    pool = start_pool(num_replicas=2)
    client = PoolClient(pool.name, max_pending=32)
    sent = [requests(f"gate {gate}", size, f"{call}-") for call, size in enumerate(sizes)]
    with ThreadPoolExecutor(len(sizes)) as threads:
        calls = [threads.submit(lambda one=one: list(client.generate(one))) for one in sent]
        eventually(lambda: num_running(pool) == 32)
        gate.touch()
        outputs = [output for call in calls for output in call.result()]
    assert Counter(output.request_id for output in outputs) == Counter(one.request_id for call in sent for one in call)


def test_a_call_that_is_given_up_leaves_its_places(start_pool: Start, gate: Path, eventually: Eventually) -> None:
    pool = start_pool()
    client = PoolClient(pool.name, max_pending=4)
    given_up = client.generate([*requests("steps 1", 1, "first"), *requests(f"gate {gate}", 50)])
    next(given_up)
    given_up.close()
    eventually(lambda: num_running(pool) == 0)
    assert len(list(client.generate(requests("steps 1", 9)))) == 9
