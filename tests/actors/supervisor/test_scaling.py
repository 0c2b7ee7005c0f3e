"""A pool that follows its work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fake_engine import requests

from millrace.actors import EnginePool, PoolClient
from millrace.actors.supervisor.scaling import Scaler
from millrace.engine.outputs import RequestOutput

Start = Callable[..., EnginePool]
Eventually = Callable[[Callable[[], object]], None]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_more_work_asks_for_more_replicas_at_once() -> None:
    scaler = Scaler(places=10, delay_s=5.0)
    assert [scaler.wanted(count, 1, 1, 4) for count in (0, 10, 11, 31, 1000)] == [1, 1, 2, 4, 4]
    assert scaler.wanted(0, 1, 2, 4) == 2


def test_less_work_gives_replicas_back_after_a_while() -> None:
    clock = Clock()
    scaler = Scaler(places=10, delay_s=5.0, clock=clock)
    assert scaler.wanted(5, 4, 1, 4) == 4
    clock.now_s = 4.9
    assert scaler.wanted(5, 4, 1, 4) == 4
    clock.now_s = 5.0
    assert scaler.wanted(5, 4, 1, 4) == 1


def test_a_burst_begins_the_wait_anew() -> None:
    clock = Clock()
    scaler = Scaler(places=10, delay_s=5.0, clock=clock)
    scaler.wanted(5, 2, 1, 4)
    clock.now_s = 4.0
    assert scaler.wanted(15, 2, 1, 4) == 2
    clock.now_s = 8.0
    assert scaler.wanted(5, 2, 1, 4) == 2


def num_ready(pool: EnginePool) -> int:
    return sum(replica.state == "ready" for replica in pool.stats().replicas)


def num_at_work(pool: EnginePool) -> int:
    replicas = pool.stats(with_engines=True).replicas
    return sum(bool(replica.engine and replica.engine["num_running"]) for replica in replicas)


def test_one_to_four_and_back_under_load_loses_no_row(start_pool: Start, gate: Path, eventually: Eventually) -> None:
    pool = start_pool(num_replicas=(1, 4), requests_per_replica=20, scale_down_delay_s=0.2)
    client = PoolClient(pool.name)

    def call(number: int) -> list[RequestOutput]:
        # A client of its own knows of every replica that is up by now.
        return list(
            PoolClient(pool.name).generate(
                [*requests(f"gate {gate}", 20, f"{number}-"), *requests("steps 9", 5, f"{number}+")]
            )
        )

    with ThreadPoolExecutor(12) as threads:
        first = [threads.submit(call, number) for number in range(6)]
        eventually(lambda: num_ready(pool) == 4)
        rest = [threads.submit(call, number) for number in range(6, 12)]
        eventually(lambda: num_at_work(pool) == 4)  # before it may shrink again
        gate.touch()
        # Work goes on while replicas are given back.
        trickle = []

        def is_back_to_one() -> bool:
            trickle.extend(client.generate(requests("steps 2", 5, f"t{len(trickle)}-")))
            return num_ready(pool) == 1 and len(pool.stats().replicas) == 1

        eventually(is_back_to_one)
        outputs = [output for done in [*first, *rest] for output in done.result()]
    assert len({output.request_id for output in outputs}) == len(outputs) == 12 * 25
    assert len({output.request_id for output in trickle}) == len(trickle)
    assert not [output for output in [*outputs, *trickle] if output.error]
    assert {output.metrics.attempt for output in outputs} == {1}
    assert len({output.metrics.replica_id for output in outputs}) == 4
