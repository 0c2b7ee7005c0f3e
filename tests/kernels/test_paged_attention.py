"""Paged attention on the CPU: against torch's own, over random geometries, to the bit, and from several threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from millrace.kernels import paged_attention
from millrace.kernels._op import Draw, Sample
from millrace.kernels.paged_attention import _cpu_numba
from millrace.kernels.paged_attention.samples import Geometry, make_sample

IMPLEMENTATIONS = [paged_attention.plain, paged_attention.implementations()["cpu"]]


def by_sdpa(query, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, window, causal=True):
    """Gathers the keys of each token and calls torch: slow, but simple enough to be obviously right."""
    block_size, group = k_cache.shape[2], query.shape[1] // k_cache.shape[1]
    rows = []
    for seq, seq_len in enumerate(seq_lens.tolist()):
        for row in range(int(query_start_loc[seq]), int(query_start_loc[seq + 1])):
            position = seq_len - int(query_start_loc[seq + 1]) + row
            first = max(0, position - window + 1) if window else 0
            last = position if causal else min(seq_len, position + window) - 1 if window else seq_len - 1
            slots = [(int(block_tables[seq, p // block_size]), p % block_size) for p in range(first, last + 1)]
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
@given(args=calls(), causal=st.booleans())
@settings(deadline=None, max_examples=30)
def test_any_geometry_is_what_torch_computes(implementation, args, causal):
    wanted = by_sdpa(*args, causal=causal)
    torch.testing.assert_close(implementation(*args, causal=causal), wanted, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("sign", [0, 0x80])
def test_every_float8_is_read_as_torch_reads_it(sign):
    codes = torch.arange(sign, sign + 0x80, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = codes.view(1, 1, 1, 128)
    one = torch.ones(1, dtype=torch.int32)
    keys, starts = torch.zeros_like(values), torch.tensor([0, 1], dtype=torch.int32)
    out = paged_attention(torch.zeros(1, 1, 128), keys, values, one.view(1, 1) - 1, one, starts, 1.0)
    torch.testing.assert_close(out.view(-1), codes.float(), rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("deterministic", [False, True])
def test_padding_of_any_length_gives_zeros(draw, implementation, deterministic):
    sinks = torch.tensor([3.0, -3.0])
    sample = make_sample("", draw, Geometry(2, 1, 8, 16), [(0, 1), (20, 1), (0, 200), (300, 140), (0, 0)])
    out = implementation(*sample.args, sinks=sinks, deterministic=deterministic)
    assert not out[0].any()
    assert not out[2:202].any()
    assert out[1].any()
    assert out[202:].any(-1).all()


def sharing_call(draw: Draw, options: dict, *, num_shared: int = 4) -> Sample:
    """Returns a prompt and decodes, some of them padding, that share a prefix long enough for the shared path."""
    lengths = [(num_shared * 16 + 1 + i % 50, 1) for i in range(140)]
    lengths[3:3] = [(0, 1)]
    geometry = Geometry(6, 2, 32, 16, num_shared=num_shared, cache_dtype=options.pop("cache_dtype", None))
    return make_sample("", draw, geometry, [*lengths, (150, 40)], num_decodes=len(lengths), **options)


SHARING_OPTIONS = {
    "no options": {},
    "sinks": {"sinks": torch.tensor([0.0, 1.0, -2.0, 5.0, 9.0, -9.0])},
    "bent scores": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 0.3, 0.02, 1.0])},
    "8-bit cache": {"cache_dtype": torch.float8_e4m3fn},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", SHARING_OPTIONS)
def test_a_shared_prefix_changes_the_cost_alone(dtype, options):
    sample = sharing_call(Draw.seeded(dtype), dict(SHARING_OPTIONS[options]))
    without = {name: value for name, value in sample.kwargs.items() if name != "num_shared"}
    rtol, atol = paged_attention.tolerance[dtype]
    shared, expected = paged_attention(*sample.args, **sample.kwargs), paged_attention(*sample.args, **without)
    torch.testing.assert_close(shared, expected, rtol=rtol, atol=atol)
    assert not torch.equal(shared, expected)  # the hint was taken


@pytest.mark.parametrize("num_shared", [0, 4, 9])
def test_a_shared_prefix_is_read_through_one_table(draw, num_shared):
    sample = sharing_call(draw, {}, num_shared=num_shared)
    expected = paged_attention(*sample.args, **sample.kwargs)
    torch.testing.assert_close(expected, paged_attention.plain(*sample.args, **sample.kwargs), rtol=1e-4, atol=1e-5)
    tables, num_decodes = sample.args[3], sample.kwargs["num_decodes"]
    _, k_cache, v_cache = sample.args[:3]
    unused = next(i for i in range(len(k_cache)) if i not in tables)
    assert k_cache[unused].isnan().all()
    assert v_cache[unused].isnan().all()
    tables[1:num_decodes, :num_shared] = unused
    assert torch.equal(paged_attention(*sample.args, **sample.kwargs), expected)


Piece = tuple[int, int, int]
"""Some tokens of a sequence: (sequence, first token, token after the last one)."""


def attend_to_pieces(whole: Sample, pieces: list[Piece]) -> list[torch.Tensor]:
    """Computes pieces of the prompts of `whole` in one call, and returns the rows of each piece."""
    query, k_cache, v_cache, tables, _, starts, scale, window = whole.args
    rows = [slice(int(starts[seq]) + start, int(starts[seq]) + end) for seq, start, end in pieces]
    sizes = [end - start for _, start, end in pieces]
    out = paged_attention(
        torch.cat([query[some] for some in rows]),
        k_cache,
        v_cache,
        tables[[seq for seq, _, _ in pieces]],
        torch.tensor([end for _, _, end in pieces], dtype=torch.int32),
        torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        scale,
        window,
        **whole.kwargs,
    )
    return list(out.split(sizes))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's thread count, and splits calls of any size over the threads."""
    before, smallest = torch.get_num_threads(), _cpu_numba._MIN_PARALLEL_FLOPS
    torch.set_num_threads(count)
    _cpu_numba._MIN_PARALLEL_FLOPS = 0
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _cpu_numba._MIN_PARALLEL_FLOPS = smallest


@st.composite
def whole_prompts(draw):
    """Draws a deterministic call that computes all of two prompts, and ways to compute them in pieces."""
    num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    geometry = Geometry(
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.one_of(st.integers(1, 70), st.sampled_from([64, 128]))),
        block_size=draw(st.sampled_from([1, 4, 7, 16, 32])),
        window=draw(st.sampled_from([0, 0, 1, 5, 33, 100])),
    )
    numbers = Draw.seeded(draw(st.sampled_from([torch.float32, torch.bfloat16])), seed=draw(st.integers(0, 99)))
    options = {}
    if draw(st.booleans()):
        options["sinks"] = numbers.normal(geometry.num_heads, dtype=torch.float32)
    if draw(st.booleans()):
        options["softcap"] = 2.0
        options["alibi_slopes"] = numbers.normal(geometry.num_heads, dtype=torch.float32).abs()
    lengths = [draw(st.integers(1, 60)), draw(st.integers(129, 200))]
    whole = make_sample("", numbers, geometry, [(length, length) for length in lengths], deterministic=True, **options)
    pieces = []
    for seq, length in enumerate(lengths):
        cuts = draw(st.lists(st.integers(1, length), max_size=4))
        ends = sorted({*cuts, *(cut - 1 for cut in cuts if cut > 1), length})  # single tokens too
        pieces += [(seq, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return whole, draw(st.permutations(pieces))


@given(case=whole_prompts())
@settings(deadline=None, max_examples=40)
def test_deterministic_rows_depend_on_nothing_but_their_sequence(case):
    whole, pieces = case
    expected = paged_attention(*whole.args, **whole.kwargs)
    starts = whole.args[5].tolist()
    together = attend_to_pieces(whole, pieces)
    alone = [rows for piece in pieces for rows in attend_to_pieces(whole, [piece])]
    with threads(2):
        split = attend_to_pieces(whole, pieces)
    for (seq, start, end), *results in zip(pieces, together, alone, split, strict=True):
        for rows in results:
            assert torch.equal(rows, expected[starts[seq] + start : starts[seq] + end])


def test_deterministic_decodes_are_the_rows_of_their_prompt(draw):
    whole = make_sample("", draw, Geometry(6, 2, 64, 16), [(150, 150)], deterministic=True)
    decodes = attend_to_pieces(whole, [(0, i, i + 1) for i in range(150)])
    assert torch.equal(torch.cat(decodes), paged_attention(*whole.args, **whole.kwargs))


def test_deterministic_ignores_the_shared_prefix(draw):
    sample = sharing_call(draw, {"deterministic": True})
    without = {name: value for name, value in sample.kwargs.items() if name != "num_shared"}
    assert torch.equal(paged_attention(*sample.args, **sample.kwargs), paged_attention(*sample.args, **without))


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
    """Attends without the long sequences, which torch's own threads would compute: these do not survive a fork."""
    query, k_cache, v_cache, tables, seq_lens, starts, scale, window = call
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    return paged_attention(query[: len(seq_lens)], k_cache, v_cache, tables, seq_lens, starts, scale, window)
