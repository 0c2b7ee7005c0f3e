"""The figures of a replica: the table, the docs that repeat it, and what becomes of counters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from millrace.actors import EnginePool, PoolClient
from millrace.actors.replica.metrics import METRICS, Meter
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams


def stats(num_prompt_tokens: int, num_output_tokens: int) -> SimpleNamespace:
    counters = SimpleNamespace(
        num_steps=4,
        num_preemptions=1,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_prompt_tokens // 4,
        num_output_tokens=num_output_tokens,
    )
    return SimpleNamespace(num_running=3, num_waiting=2, kv_cache_usage=0.5, step_time_s=2.0, counters=counters)


def test_figures_follow_from_the_counters() -> None:
    now_s = [10.0]
    meter = Meter("pool", "0.0", clock=lambda: now_s[0])
    now_s[0] = 12.0
    meter.publish(stats(100, 40))
    figures = meter.read(stats(400, 40))
    assert list(figures) == list(METRICS)
    assert figures == {
        "num_running": 3,
        "num_waiting": 2,
        "kv_cache_usage": 0.5,
        "cache_hit_rate": 0.25,
        "num_preemptions": 1,
        "step_time_s": 0.5,
        "prompt_tokens_per_s": 50,
        "output_tokens_per_s": 20,
    }
    now_s[0] = 13.0
    meter.publish(stats(400, 40))
    assert (meter.read(stats(400, 40))["prompt_tokens_per_s"], meter.read(stats(400, 40))["output_tokens_per_s"]) == (
        300,
        0,
    )


def test_an_engine_of_another_kind_has_no_figures() -> None:
    assert Meter("pool", "0.0").read({"num_running": 1}) == {}


def test_the_docs_list_every_figure_as_it_is(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (root / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
    assert rows == [(name, metric.description) for name, metric in METRICS.items()]


@pytest.mark.soak
@pytest.mark.slow
def test_a_pool_of_real_engines_gives_its_figures(
    cluster: None, tiny_model: Callable[[str], Path], pools: Callable[..., EnginePool]
) -> None:
    from millrace.actors.replica.ranks import build_engine

    kwargs = {"model": str(tiny_model("llama")), "dtype": "float32", "max_num_seqs": 8, "num_threads": 1}
    pool = pools(engine_kwargs=kwargs, engine_factory=build_engine)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    sent = [GenerateRequest(str(index), None, [5] * 40 + [index], params) for index in range(4)]
    assert len(list(PoolClient(pool.name).generate(sent))) == 4
    (replica,) = pool.stats(with_engines=True).replicas
    assert list(replica.metrics) == list(METRICS)
    assert (replica.metrics["num_running"], replica.metrics["num_waiting"]) == (0, 0)
    assert replica.metrics["step_time_s"] > 0
    assert replica.engine.counters.num_output_tokens == 16
