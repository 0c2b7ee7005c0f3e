"""Packed integers are read as the published layouts say where each bit is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_files import AWQ_ORDER, pack_awq, pack_bits
from millrace.engine.weights.packed_bits import unpack_bits

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def random_codes(bits: int, shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(0, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_every_width_is_read_as_it_was_packed(bits: int, num_rows: int, num_blocks: int, seed: int) -> None:
    codes = random_codes(bits, (num_rows, 32 * num_blocks), seed)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (num_rows, num_blocks * bits)
    assert torch.equal(unpack_bits(words, bits).int(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_number_i_begins_at_bit_i_times_its_width(bits: int) -> None:
    codes = random_codes(bits, (1, 64), seed=bits)
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(pack_bits(codes, bits)[0]))
    assert whole == sum(int(code) << (bits * i) for i, code in enumerate(codes[0]))


def test_a_word_of_awq_has_its_columns_in_the_published_order() -> None:
    codes = random_codes(4, (3, 16), seed=1)
    words = pack_awq(codes)
    for row in range(3):
        for word in range(2):
            bits = int(words[row, word]) & 0xFFFFFFFF
            for place, column in enumerate(AWQ_ORDER):
                assert (bits >> (4 * place)) & 15 == codes[row, 8 * word + column]


def test_words_may_be_a_view_of_others() -> None:
    codes = random_codes(4, (5, 64), seed=2)
    words = pack_bits(codes, 4).t().contiguous().t()
    assert torch.equal(unpack_bits(words[1:4, 2:5], 4).int(), codes[1:4, 16:40])
