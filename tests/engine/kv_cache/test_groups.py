"""Groups of layers: who is with whom, and how many blocks a sequence holds in a group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.kv_cache.groups import MAX_GROUPS, LayerCache, LayerGroup, cut_into_groups, max_held_blocks

FULL = LayerCache()


def cut(windows: Sequence[int]) -> tuple[LayerGroup, ...]:
    return cut_into_groups([LayerCache(window) for window in windows])


@pytest.mark.parametrize("window", [0, 6])
def test_layers_of_one_kind_are_one_group(window: int) -> None:
    assert cut([window] * 28) == (LayerGroup(LayerCache(window), tuple(range(28))),)


def test_alternating_layers_are_two_groups() -> None:
    windowed, full = cut([4096, 0] * 13)
    assert (windowed.cache.window, full.cache.window) == (4096, 0)
    assert windowed.layers == tuple(range(0, 26, 2)) and full.layers == tuple(range(1, 26, 2))


def test_of_uneven_counts_little_memory_is_unused() -> None:
    groups = cut(([8] * 5 + [0]) * 4 + [8, 8])  # 4 layers with full attention, 22 with a window
    assert [len(group.layers) for group in groups] == [4, 4, 4, 4, 3, 3, 4]
    assert [group.cache.window for group in groups] == [8] * 6 + [0]


@given(st.lists(st.sampled_from([0, 0, 0, 4, 4, 9]), min_size=1, max_size=80))
def test_every_layer_is_in_one_group_of_its_kind(windows: list[int]) -> None:
    groups = cut(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.cache.window for group in groups for layer in group.layers)
    assert len(groups) <= MAX_GROUPS


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_a_sequence_never_holds_more_blocks_than_told(
    window: int, block_size: int, max_step_tokens: int, counts: list[int]
) -> None:
    cache, start = LayerCache(window), 0
    for count in (min(count, max_step_tokens) for count in counts):
        num_held = -(-(start + count) // block_size) - cache.first_block(start, block_size)
        start += count
        assert num_held <= cache.max_blocks(start, block_size, max_step_tokens)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 20))
def test_some_step_needs_as_many_blocks_as_told(window: int, block_size: int, max_step_tokens: int) -> None:
    cache = LayerCache(window)
    needed = {
        -(-(start + max_step_tokens) // block_size) - cache.first_block(start, block_size) for start in range(20, 40)
    }
    assert max(needed) == cache.max_blocks(1000, block_size, max_step_tokens)


def test_blocks_are_those_of_all_groups() -> None:
    assert max_held_blocks([FULL], 33, 16, 8) == 3
    assert max_held_blocks([FULL, LayerCache(16)], 160, 16, 8) == 10 + 3
    assert max_held_blocks([FULL, LayerCache(16)], 16, 16, 8) == 2
