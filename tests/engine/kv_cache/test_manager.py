"""The KV cache of layers in groups: blocks that windows pass are freed, and a prefix is found if every group has it."""

from __future__ import annotations

from collections.abc import Sequence as Many

import pytest

from millrace.engine.kv_cache.groups import LayerCache
from millrace.engine.kv_cache.manager import KVCacheManager
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.sequence import Sequence

BLOCK_SIZE = 2
STEP = 4
"""Tokens of a chunk."""


def make_manager(*windows: int, num_blocks: int = 60) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK_SIZE, caches=[LayerCache(window) for window in windows])


def make_sequence(tokens: Many[int]) -> Sequence:
    return Sequence("0", 0, SamplingParams(), 0, list(tokens), len(tokens), len(tokens) + 9, {})


def compute(manager: KVCacheManager, sequence: Sequence) -> list[int]:
    """Plans a sequence to its end, in chunks; returns how many blocks were in use in each step."""
    num_used = []
    while sequence.num_computed_tokens < sequence.num_tokens:
        end = min(sequence.num_computed_tokens + STEP, sequence.num_tokens)
        assert manager.try_extend(sequence, end)
        sequence.num_computed_tokens = end
        manager.publish(sequence, end)
        num_used.append(manager.pool.num_used)
    return num_used


def admit(manager: KVCacheManager, tokens: Many[int]) -> Sequence:
    sequence = make_sequence(tokens)
    assert manager.try_admit(sequence, STEP)
    return sequence


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_blocks_before_a_window_are_freed(window: int) -> None:
    manager = make_manager(window)
    num_used = compute(manager, admit(manager, range(20 * window)))
    assert max(num_used) <= (window - 1 + STEP - 1 + BLOCK_SIZE - 1) // BLOCK_SIZE + 1
    assert manager.pool.num_used == num_used[-1]


def test_full_attention_keeps_all_blocks_beside_a_window() -> None:
    manager = make_manager(0, 3)
    sequence = admit(manager, range(40))
    compute(manager, sequence)
    full, windowed = manager.held_blocks(sequence)
    assert len(full) == 20 and len(windowed) == 3
    manager.release(sequence)
    assert manager.pool.num_used == 0


@pytest.mark.parametrize("windows", [(0,), (3,), (0, 3), (5, 0, 2), (0, 0)])
def test_an_equal_prompt_is_found_while_the_first_runs_and_afterwards(windows: tuple[int, ...]) -> None:
    manager = make_manager(*windows)
    first = admit(manager, range(21))
    compute(manager, first)
    second = admit(manager, range(21))
    assert second.num_computed_tokens == 20
    for mine, other in zip(manager.held_blocks(first), manager.held_blocks(second), strict=True):
        assert set(other) <= set(mine)
    manager.release(first)
    manager.release(second)
    assert admit(manager, range(21)).num_computed_tokens == 20


def test_a_hit_needs_only_the_blocks_of_the_last_window() -> None:
    manager = make_manager(0, 3)
    first = admit(manager, range(21))
    compute(manager, first)
    manager.release(first)
    freed_early = manager._find(1, first.block_hashes[0])
    manager.pool.forget([freed_early])
    second = admit(manager, range(21))
    assert second.num_computed_tokens == 20
    assert second.num_freed_blocks == [0, 9], "token 20 reads tokens 18 and 19, of block 9"


def test_a_prompt_whose_window_blocks_are_gone_is_not_found() -> None:
    manager = make_manager(0, 3)
    first = admit(manager, range(21))
    compute(manager, first)
    manager.release(first)
    manager.pool.forget([manager._find(1, name) for name in first.block_hashes[5:]])
    # Of the window's blocks 0 to 4 are left: the prefix of five blocks is the longest that both groups have.
    assert admit(manager, range(21)).num_computed_tokens == 10


def test_groups_agree_where_each_alone_would_find_more() -> None:
    manager = make_manager(4, 2)
    first = admit(manager, range(21))
    compute(manager, first)
    manager.release(first)
    hashes = first.block_hashes
    # Token 2n reads blocks n - 2 and n - 1 of the first group, and block n - 1 of the second. The first finds 8 blocks,
    # the second finds 7 of those, and of 7 the first finds 1.
    manager.pool.forget([manager._find(0, hashes[i]) for i in (1, 3, 5, 8)])
    manager.pool.forget([manager._find(1, hashes[i]) for i in (9, 7)])
    assert admit(manager, range(21)).num_computed_tokens == 2


def test_a_block_of_one_group_is_not_found_by_another() -> None:
    manager = make_manager(0, 0)
    first = admit(manager, range(9))
    compute(manager, first)
    mine, others = (set(blocks) for blocks in manager.held_blocks(first))
    assert not mine & others
    manager.pool.forget(mine)
    assert admit(manager, range(9)).num_computed_tokens == 0


def test_blocks_that_are_freed_can_be_found_until_another_sequence_takes_them() -> None:
    manager = make_manager(3, num_blocks=12)
    first = admit(manager, range(21))
    compute(manager, first)
    assert all(manager._find(0, name) is not None for name in first.block_hashes)
    second = admit(manager, [7] * 40)
    compute(manager, second)
    manager.pool.check_integrity([*manager.held_blocks(first), *manager.held_blocks(second)])
    found = [manager._find(0, name) for name in first.block_hashes]
    (held,) = manager.held_blocks(first)
    assert [block for block in found if block is not None] == held[:-1], "the last block is not full"


def test_room_is_asked_for_what_a_window_holds_at_once() -> None:
    manager = make_manager(3, num_blocks=4)
    sequence = admit(manager, range(1000))
    assert len(compute(manager, sequence)) == 250
    assert not manager.try_admit(make_sequence(range(100, 1000)), STEP)
    assert not make_manager(0, num_blocks=4).try_admit(make_sequence(range(9)), STEP)
