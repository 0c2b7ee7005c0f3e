"""Checks of the Triton kernels of `paged_attention` beyond its samples: a script of its own, as interpret.py is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from interpret import patch_language_once, record_launches
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from conftest import poison
from millrace.kernels._fp8 import e4m3_storage
from millrace.kernels._op import Draw, Sample
from millrace.kernels._triton import TARGETS
from millrace.kernels.paged_attention import paged_attention
from millrace.kernels.paged_attention import triton as launcher
from millrace.kernels.paged_attention.samples import Geometry, make_sample

GEOMETRY = Geometry(num_heads=4, num_kv_heads=2, head_dim=32, block_size=16)
OPTIONS = {"softcap": 3.0, "sinks": torch.linspace(-1, 1, 4), "alibi_slopes": torch.linspace(0.1, 0.4, 4)}
Launches = list[tuple[Any, dict[str, Any]]]


def run(sample: Sample, **options: Any) -> torch.Tensor:
    return launcher.paged_attention_triton(*sample.args, **{**sample.kwargs, **options})


def assert_agrees(sample: Sample) -> None:
    wanted = paged_attention.plain(*sample.args, **sample.kwargs)
    torch.testing.assert_close(run(sample), wanted, rtol=1e-4, atol=1e-5)


def part_of(sample: Sample, parts: list[tuple[int, int, int]]) -> Sample:
    """Returns the call that computes chunks of the sequences of a sample, each given as (sequence, first, end)."""
    query, k_cache, v_cache, tables, lengths, starts, *rest = sample.args
    rows, ends, new_starts = [], [], [0]
    for seq, first, end in parts:
        origin = int(starts[seq + 1]) - int(lengths[seq])  # the row of position 0
        rows.append(query[origin + first : origin + end])
        ends.append(end)
        new_starts.append(new_starts[-1] + end - first)
    picked = tables[[seq for seq, _, _ in parts]]
    args = (torch.cat(rows), k_cache, v_cache, picked, torch.tensor(ends).int(), torch.tensor(new_starts).int(), *rest)
    return Sample("part", args, sample.kwargs)


def dot_by_row(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> TensorHandle:
    """A product in which a row does not depend on its position, as on a GPU. In numpy's product it does."""
    wide = a.data.astype(np.float32)[:, :, None] * b.data.astype(np.float32)[None]
    return TensorHandle(acc.data + wide.sum(1), acc.dtype.scalar)


def check_deterministic() -> None:
    """No bit of the last tokens of a prompt depends on other sequences or on chunks."""
    for dtype, window in ((torch.float32, 50), (torch.float16, 0)):
        with patch.object(InterpreterBuilder, "create_dot", dot_by_row):
            geometry = replace(GEOMETRY, window=window)
            # The first sequence is whole; nothing of it is hidden, so that every chunk of it may be computed.
            whole = make_sample("prompts", Draw.seeded(dtype), geometry, [(147, 147), (61, 61)], **OPTIONS)
            wanted = run(whole, deterministic=True)
            for first, end in ((146, 147), (130, 147), (17, 147), (100, 117)):
                alone = run(part_of(whole, [(0, first, end)]), deterministic=True, num_decodes=int(end - first == 1))
                assert torch.equal(alone, wanted[first:end]), (dtype, window, first, end)
            together = run(part_of(whole, [(1, 60, 61), (0, 146, 147), (1, 3, 40)]), deterministic=True, num_decodes=2)
            assert torch.equal(together[1], wanted[146])
            assert torch.equal(together[0], wanted[147 + 60])
            assert torch.equal(together[2:], wanted[147 + 3 : 147 + 40])


def check_splits() -> None:
    """The keys of a long row are split. If there are more splits than tiles, the empty splits add nothing."""
    launches: Launches = []
    record_launches(launches)
    lengths = [(300, 1), (1, 1), (0, 1), (33, 1)]
    assert_agrees(make_sample("splits", Draw.seeded(torch.float32), GEOMETRY, lengths, num_decodes=4, **OPTIONS))
    [decode, merge] = [arguments for _, arguments in launches]
    num_tiles = -(-33 // decode["BLOCK_N"])
    assert decode["num_slots"] > 8 > num_tiles
    assert merge["num_slots"] == decode["num_slots"]


def check_one_split() -> None:
    """A grid that is full without splits has neither a workspace nor a merge."""
    launches: Launches = []
    record_launches(launches)
    tiny = replace(TARGETS["sm_90"], num_processors=1)
    sample = make_sample("full", Draw.seeded(torch.float32), GEOMETRY, [(40, 1)] * 5, num_decodes=5, **OPTIONS)
    with patch.object(launcher, "current_target", lambda: tiny):
        assert_agrees(sample)
    [(kernel, arguments)] = launches
    assert kernel.__name__ == "decode_kernel"
    assert arguments["num_slots"] == 1


def check_no_shared_blocks() -> None:
    """The number of shared blocks, which only the GPU knows, may be 0, and all sequences may be padding."""
    sample = make_sample("none", Draw.seeded(torch.float32), GEOMETRY, [(40, 1), (0, 1), (9, 1)], num_decodes=3)
    none = torch.zeros(1, dtype=torch.int32)
    assert_agrees(replace(sample, kwargs={**sample.kwargs, "num_shared": none}))
    padding = make_sample("padding", Draw.seeded(torch.float32), GEOMETRY, [(0, 1), (0, 1)], num_decodes=2)
    assert_agrees(replace(padding, kwargs={**padding.kwargs, "num_shared": none + 3}))


def check_wide_groups() -> None:
    """A group with more heads than a tile has rows is computed in several tiles of heads."""
    geometry = Geometry(num_heads=71, num_kv_heads=1, head_dim=16, block_size=24)
    sample = make_sample("wide", Draw.seeded(torch.float32), geometry, [(50, 1), (30, 3)], num_decodes=1)
    assert_agrees(sample)


def check_bytes() -> None:
    """On a GPU for which Triton does not support 8-bit floats, the caches are read as bytes."""
    launches: Launches = []
    record_launches(launches)
    geometry = replace(GEOMETRY, cache_dtype=torch.float8_e4m3fn)
    sample = make_sample("bytes", Draw.seeded(torch.float32), geometry, [(50, 1), (30, 7)], num_decodes=1)
    with patch.object(launcher, "current_target", lambda: TARGETS["sm_80"]):
        assert_agrees(sample)
    assert {arguments["k_ptr"].dtype for _, arguments in launches if "k_ptr" in arguments} == {torch.uint8}
    assert e4m3_storage(torch.zeros(1, dtype=torch.float8_e4m3fn), TARGETS["sm_90"]).dtype == torch.float8_e4m3fn


def check_scales() -> None:
    """Scales of 1 change no bit, and a cache in the dtype of the query has no scales."""
    ones, lengths = torch.ones(2, 2), [(300, 1), (40, 1), (30, 7)]
    small = replace(GEOMETRY, cache_dtype=torch.float8_e4m3fn)
    sample = make_sample("scales", Draw.seeded(torch.float16), small, lengths, num_decodes=2, **OPTIONS)
    assert torch.equal(run(sample, kv_scales=ones), run(sample))
    sample = make_sample("no scales", Draw.seeded(torch.float16), GEOMETRY, lengths, num_decodes=2)
    with pytest.raises(ValueError, match=r"kv_scales are given for a cache in torch\.float16"):
        run(sample, kv_scales=ones)


CHECKS = (
    check_deterministic,
    check_splits,
    check_one_split,
    check_no_shared_blocks,
    check_wide_groups,
    check_bytes,
    check_scales,
)

if __name__ == "__main__":
    patch_language_once()
    poison(setattr)
    for check in CHECKS:
        check()
        print(check.__name__)
