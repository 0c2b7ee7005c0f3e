"""A KV cache of 8-bit integers on the CPU: what is stored and attended to is what the definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millrace.kernels import paged_attention, rope_and_store, store_kv

BLOCK_SIZE, HEADS, SIZE = 16, 3, 40
SCALES = torch.tensor([[0.02, 0.03, 0.05], [0.04, 0.01, 0.03]])


def empty_cache(num_blocks: int = 12) -> tuple[Tensor, Tensor]:
    keys, values = torch.zeros(2, num_blocks, HEADS, BLOCK_SIZE, SIZE, dtype=torch.int8)
    return keys, values


def test_numbers_are_rounded_to_the_nearest_step_and_clamped() -> None:
    key = torch.tensor([0.5, 1.5, -2.5, 126.6, 300.0, -1e9, torch.nan, 0.49]).view(1, 1, 8)
    keys, values = torch.zeros(2, 1, 1, 4, 8, dtype=torch.int8)
    store_kv(key, key * 2, keys, values, torch.tensor([2]), kv_scales=torch.tensor([[1.0], [2.0]]))
    expected = [0, 2, -2, 127, 127, -127, 0, 0]
    assert keys[0, 0, 2].tolist() == values[0, 0, 2].tolist() == expected
    assert not keys[0, 0, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_rotated_before_they_are_rounded(dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(9, heads, SIZE).to(dtype) for heads in (6, HEADS, HEADS))
    slots, positions = torch.randperm(12 * BLOCK_SIZE)[:9], torch.arange(3, 12)
    slots[4] = -1
    angles = torch.randn(20, SIZE // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    results = []
    for run in (rope_and_store, rope_and_store.plain):
        caches, turned = empty_cache(), query.clone()
        options = {"kv_scales": SCALES, "interleaved": interleaved}
        run(turned, key, value, *caches, slots, positions, table, **options)
        results.append((turned.float(), *(cache.float() for cache in caches)))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= 1  # A number between two steps may be rounded to either.
        assert ((ours - expected).abs() > 0.02).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 21])
def test_attention_reads_the_steps_times_their_scales(dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(0)
    seq_lens = torch.tensor([37, 1, 150], dtype=torch.int32)
    num_queries = [1, 1, 140]  # The last sequence is computed by matrix multiplication.
    starts = torch.tensor([0, 1, 2, 142], dtype=torch.int32)
    tables = torch.randperm(30)[:30].view(3, 10).to(torch.int32)
    keys, values = torch.randint(-127, 128, (2, 30, HEADS, BLOCK_SIZE, SIZE), dtype=torch.int8)
    query = torch.randn(sum(num_queries), 2 * HEADS, SIZE).to(dtype)
    paged, options = (keys, values, tables, seq_lens, starts), {"num_decodes": 2, "kv_scales": SCALES}
    ours = paged_attention(query, *paged, SIZE**-0.5, window, **options)
    expected = paged_attention.plain(query.float(), *paged, SIZE**-0.5, window, **options)
    assert (ours.float() - expected).norm() < (0.01 if dtype == torch.bfloat16 else 1e-6) * expected.norm()
    plain = [cache.float() * scale.view(-1, 1, 1) for cache, scale in zip((keys, values), SCALES, strict=True)]
    whole = paged_attention.plain(query.float(), *plain, *paged[2:], SIZE**-0.5, window, num_decodes=2)
    torch.testing.assert_close(expected, whole)
