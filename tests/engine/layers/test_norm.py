"""Norms of queries and keys."""

from __future__ import annotations

import pytest
import torch

from millrace.engine.layers import ProjectionNorm
from millrace.engine.parallel.context import ParallelContext


@pytest.mark.parametrize(("num_heads", "tp_size"), [(4, 2), (4, 4), (2, 4)], ids=["halves", "one each", "shared"])
@torch.inference_mode()
def test_ranks_norm_their_heads_as_one_rank_norms_all(num_heads: int, tp_size: int) -> None:
    head_dim, places = 6, [ParallelContext.of_rank(rank, tp_size, 1) for rank in range(tp_size)]
    options = {"eps": 1e-5, "dtype": torch.float32, "device": torch.device("cpu")}
    alone = ProjectionNorm(ParallelContext().shard(num_heads), head_dim, **options)
    alone.weight.normal_()
    fused = torch.randn(5, num_heads + 3, head_dim)  # of which the heads are a view
    shards = [place.kv_shard(num_heads) for place in places]
    parts = [fused[:, shard.start : shard.start + shard.length].clone() for shard in shards]
    gathered = torch.cat([part.flatten(1) for part in parts], dim=1)
    for shard, part in zip(shards, parts, strict=True):
        norm = ProjectionNorm(shard, head_dim, **options, gather=lambda _: gathered)
        norm.weight.copy_(alone.weight)
        norm(part)
    heads = fused[:, :num_heads]
    wide = heads.flatten(1)
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * alone.weight
    untouched = fused[:, num_heads:].clone()
    alone(heads)
    torch.testing.assert_close(heads.flatten(1), expected)
    assert torch.equal(fused[:, num_heads:], untouched)
    for shard, part in zip(shards, parts, strict=True):
        assert torch.equal(part, heads[:, shard.start : shard.start + shard.length])
