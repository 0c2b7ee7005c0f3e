"""The tiles and splits of the Triton kernels of `paged_attention`, and checks beyond the samples of the op."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from millrace.kernels._op import Draw
from millrace.kernels.paged_attention import paged_attention
from millrace.kernels.paged_attention.samples import Geometry, make_sample

pytest.importorskip("triton")

from millrace.kernels._triton import TARGETS
from millrace.kernels.paged_attention._configs import MAX_SLOTS, decode_config, num_splits, prefill_config

HERE = Path(__file__).parent
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
H200 = TARGETS["sm_90"]


def test_what_the_samples_do_not_show_in_the_interpreter():
    command = [sys.executable, "-P", str(HERE / "interpret_attention.py")]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 7


@pytest.mark.parametrize("batch", [1, 2, 8, 32, 64])
def test_splits_fill_the_gpu_at_long_contexts(batch):
    splits = num_splits(H200, batch * 8, 32_768, 64)
    assert batch * 8 * splits >= 2 * H200.num_processors


@pytest.fixture
def on_h200(monkeypatch):
    """Lets launchers run up to the launch on a machine without a GPU."""
    launcher = importlib.import_module("millrace.kernels.paged_attention.triton")
    monkeypatch.setattr(launcher, "current_target", lambda: H200)


def test_a_full_grid_is_not_split():
    assert num_splits(H200, 256 * 8, 32_768, 64) == 1


def test_splits_are_no_more_than_tiles_and_than_the_merge_takes():
    assert num_splits(H200, 1, 100, 64) == 2
    assert num_splits(H200, 1, 10**6, 64) == MAX_SLOTS
    assert num_splits(H200, 1, 10**6, 64, limit=5) == 5


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("edited", [False, True])
def test_tiles_are_what_a_matrix_instruction_takes(target, dtype, cache_dtype, head_dim, edited):
    sizes = target, dtype, cache_dtype or dtype, head_dim, edited
    for config in (
        prefill_config(*sizes),
        decode_config(*sizes, 1),
        decode_config(*sizes, 8),
        decode_config(*sizes, 71),
    ):
        assert config.block_m >= 16
        assert config.block_n >= 16
        assert config.num_warps * target.warp_size <= 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 512}, "8 to 256"),
        ({"num_heads": 5}, "must divide"),
        ({"cache_dtype": torch.float16}, "float8_e4m3fn"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(changes, message, on_h200):
    geometry = replace(Geometry(num_heads=4, num_kv_heads=2, head_dim=32, block_size=16), **changes)
    sample = make_sample("refused", Draw.seeded(torch.float32), geometry, [(5, 1)])
    with pytest.raises(ValueError, match=message):
        paged_attention.implementations()["cuda"](*sample.args, **sample.kwargs)


def test_caches_that_are_not_contiguous_within_a_block_are_refused(on_h200):
    sample = make_sample("strided", Draw.seeded(torch.float32), Geometry(4, 2, 32, 16), [(5, 1)])
    query, k_cache, v_cache, *rest = sample.args
    with pytest.raises(ValueError, match="contiguous within a block"):
        paged_attention.implementations()["cuda"](query, k_cache.mT.contiguous().mT, v_cache, *rest)


def assert_agrees_on_the_gpu(geometry: Geometry, lengths: list[tuple[int, int]], **options: object) -> None:
    sample = make_sample("large", Draw.seeded(torch.bfloat16, "cuda"), geometry, lengths, **options)
    rtol, atol = paged_attention.tolerance[torch.bfloat16]
    result = paged_attention(*sample.args, **sample.kwargs)
    wide = [
        arg.float() if isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16 else arg for arg in sample.args
    ]
    wanted = paged_attention.plain(*wide, **sample.kwargs)
    torch.testing.assert_close(result.float(), wanted, rtol=rtol, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_a_batch_of_decodes_on_the_gpu(head_dim, cache_dtype):
    geometry = Geometry(8, 2, head_dim, 16, cache_dtype=cache_dtype)
    lengths = [(1000 + i % 48, 1) for i in range(256)]
    assert_agrees_on_the_gpu(geometry, lengths, num_decodes=256)


@pytest.mark.gpu
def test_few_long_decodes_on_the_gpu():
    assert_agrees_on_the_gpu(Geometry(8, 2, 128, 16), [(9000, 1), (17, 1)], num_decodes=2)


@pytest.mark.gpu
def test_a_shared_prefix_on_the_gpu():
    lengths = [(1025 + 3 * i, 1) for i in range(64)]
    assert_agrees_on_the_gpu(Geometry(8, 2, 128, 16, num_shared=64), lengths, num_decodes=64)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [0, 500])
def test_long_prompts_on_the_gpu(head_dim, window):
    geometry = Geometry(8, 2, head_dim, 16, window=window)
    assert_agrees_on_the_gpu(geometry, [(700, 1), (2048, 2048), (3000, 555)], num_decodes=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_deterministic_on_the_gpu(dtype):
    """The last token of a prompt is the same to the bit as a decode, alone and among others."""
    sample = make_sample("whole", Draw.seeded(dtype, "cuda"), Geometry(8, 2, 128, 16), [(700, 700), (61, 61)])
    query, k_cache, v_cache, tables, seq_lens, _, *rest = sample.args
    whole = paged_attention(*sample.args, deterministic=True)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    rows = query[[699, 760]]
    both = paged_attention(rows, k_cache, v_cache, tables, seq_lens, starts, *rest, num_decodes=2, deterministic=True)
    one = paged_attention(
        rows[:1], k_cache, v_cache, tables[:1], seq_lens[:1], starts[:2], *rest, num_decodes=1, deterministic=True
    )
    assert torch.equal(both, whole[[699, 760]])
    assert torch.equal(one[0], whole[699])
