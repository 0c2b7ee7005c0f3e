"""The rows of distances are those of DeBERTa-v2, and the buckets of distances those of T5, in sizes of real models."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position
from transformers.models.t5.modeling_t5 import T5Attention

from millrace.engine.layers import DistanceVectors, NoNorm, RelativeBias
from millrace.engine.parallel.shard import Shard

LENGTH = 1500
CPU = torch.device("cpu")


@pytest.mark.parametrize(("max_distance", "num_buckets"), [(512, 256), (512, None), (128, 64), (24, 32)])
def test_rows_of_distances(max_distance: int, num_buckets: int | None) -> None:
    vectors = DistanceVectors(8, max_distance, num_buckets, norm=NoNorm(), dtype=torch.float32, device=CPU)
    side, text = num_buckets or max_distance, torch.empty(LENGTH, 1)
    wanted = build_relative_position(text, text, num_buckets or -1, max_distance)[0]
    tokens = torch.arange(LENGTH)
    distances = (tokens[:, None] - tokens).clamp(-max_distance, max_distance)
    assert torch.equal(vectors.rows[distances + max_distance], (wanted + side).clamp(0, 2 * side - 1))
    assert vectors.weight.shape == (2 * side, 8)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 300), (4, 2), (6, 9)])
def test_buckets_of_distances(num_buckets: int, max_distance: int) -> None:
    bias = RelativeBias(Shard(3), num_buckets, max_distance, dtype=torch.float32, device=CPU)
    bias.weight.copy_(torch.randn(num_buckets, 3))
    distances = torch.arange(-LENGTH, LENGTH + 1)
    buckets = T5Attention._relative_position_bucket(distances, num_buckets=num_buckets, max_distance=max_distance)
    found = bias()[:, distances.clamp(-max_distance, max_distance) + max_distance]
    assert torch.equal(found, bias.weight[buckets].T)
