"""Paged attention: against torch's own, over random geometries, and from several threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from millrace.kernels import paged_attention
from millrace.kernels._op import Draw
from millrace.kernels.paged_attention.samples import Geometry, make_sample

IMPLEMENTATIONS = [paged_attention.plain, *paged_attention.implementations().values()]


def by_sdpa(query, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, window):
    """Gathers token by token and lets torch attend: slow, and simple enough to be believed."""
    block_size, group = k_cache.shape[2], query.shape[1] // k_cache.shape[1]
    rows = []
    for seq, seq_len in enumerate(seq_lens.tolist()):
        for row in range(int(query_start_loc[seq]), int(query_start_loc[seq + 1])):
            position = seq_len - int(query_start_loc[seq + 1]) + row
            first = max(0, position - window + 1) if window else 0
            slots = [(int(block_tables[seq, p // block_size]), p % block_size) for p in range(first, position + 1)]
            keys, values = (
                torch.stack([cache[block, :, offset] for block, offset in slots], 1).repeat_interleave(group, 0)
                for cache in (k_cache, v_cache)
            )
            rows.append(F.scaled_dot_product_attention(query[row].unsqueeze(1), keys, values, scale=scale).squeeze(1))
    return torch.stack(rows)


@st.composite
def calls(draw):
    num_kv_heads = draw(st.integers(1, 3))
    geometry = Geometry(
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.integers(1, 40)),
        block_size=draw(st.sampled_from([1, 4, 16, 32])),
        window=draw(st.one_of(st.just(0), st.integers(1, 40))),
    )
    lengths = []
    for _ in range(draw(st.integers(1, 5))):
        seq_len = draw(st.integers(1, 70))
        lengths.append((seq_len, draw(st.one_of(st.just(1), st.integers(1, seq_len)))))
    return make_sample("", Draw.seeded(torch.float32, seed=draw(st.integers(0, 99))), geometry, lengths).args


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
@given(args=calls())
@settings(deadline=None, max_examples=30)
def test_any_geometry_is_what_torch_computes(implementation, args):
    torch.testing.assert_close(implementation(*args), by_sdpa(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("num_queries", [1, 5, 200])
def test_a_chunk_is_the_end_of_the_whole_prompt(draw, implementation, num_queries):
    args = make_sample("", draw, Geometry(4, 2, 32, 16), [(300, 300)]).args
    query, *caches, starts, scale, window = args
    whole = implementation(*args)
    starts = torch.tensor([0, num_queries], dtype=torch.int32)
    chunk = implementation(query[-num_queries:], *caches, starts, scale, window)
    torch.testing.assert_close(chunk, whole[-num_queries:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_not_hidden(draw, implementation, value):
    args = make_sample("", draw, Geometry(2, 2, 16, 16), [(20, 1), (20, 1)]).args
    args[1][args[3][0, 0], 0, 3, 5] = value
    out = implementation(*args)
    assert not out[0, 0].isfinite().all()
    assert out[0, 1].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -65504.0, 6e-8, 6.1e-5, torch.inf])
def test_every_float16_is_read_right(value):
    cache = torch.full((1, 1, 1, 2), value, dtype=torch.float16)
    one = torch.ones(1, dtype=torch.int32)
    query = torch.zeros(1, 1, 2, dtype=torch.float16)
    keys = torch.zeros_like(cache)
    out = paged_attention(query, keys, cache, one.view(1, 1) - 1, one, torch.tensor([0, 1], dtype=torch.int32), 1.0)
    assert torch.equal(out, cache.view(1, 1, 2))


def large_call(seed: int) -> tuple:
    lengths = [(150 + 7 * i, 1 if i % 3 else 90 + i) for i in range(16)]
    return make_sample("", Draw.seeded(torch.float32, seed=seed), Geometry(8, 4, 64, 16), lengths).args


@pytest.mark.usefixtures("two_threads")
def test_several_threads_may_call_at_once():
    calls = [large_call(seed) for seed in range(3)] * 4
    wanted = [paged_attention.plain(*call) for call in calls[:3]] * 4
    with ThreadPoolExecutor(4) as pool:
        for result, expected in zip(pool.map(lambda call: paged_attention(*call), calls), wanted, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own():
    call = large_call(0)
    expected = paged_attention(*call)  # the parent's threads exist now
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if torch.equal(decode_only(call), decode_only(call)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert expected.isfinite().all()


def decode_only(call: tuple) -> torch.Tensor:
    """Leaves out what torch's own threads would compute: they do not survive a fork."""
    query, k_cache, v_cache, tables, seq_lens, starts, scale, window = call
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    return paged_attention(query[: len(seq_lens)], k_cache, v_cache, tables, seq_lens, starts, scale, window)
