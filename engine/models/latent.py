"""`make_latent_attention`: makes the attention layer of a model whose keys and values are made of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers import LatentAttention, LatentSizes, LinearBase, RMSNorm, UpProjections
from ..parallel.context import ParallelContext
from ..parallel.shard import Dimension
from .linear_factory import LinearFactory
from .spec import DecoderSpec

__all__ = ["make_latent_attention"]


def make_latent_attention(
    name: str,
    spec: DecoderSpec,
    parallel: ParallelContext,
    linears: LinearFactory,
    *,
    out: LinearBase,
    table: Tensor,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LatentAttention:
    """Makes the layer: every rank projects to whole latents, and has the up-projections of its heads.

    Args:
        name: Path of the layer in the model.
        spec: Description of the decoder, with `latent` and `rope`.
        parallel: The place of this rank among all ranks.
        linears: Factory of the linear layers.
        out: The output projection.
        table: The cosines and sines of all positions.
        group: Index of the group of layers to which the layer belongs.
        dtype: Number type of the parameters.
        device: Device of the parameters.
    """
    latent, heads = spec.latent, parallel.shard(spec.num_heads)
    assert latent is not None and spec.rope is not None
    sizes = LatentSizes(heads, latent.rank, latent.rope_dim, latent.nope_dim, latent.value_dim)
    queries, rank = heads.times(spec.head_dim), latent.query_rank
    blocks: dict[str, Dimension] = {"latent": latent.rank + latent.rope_dim}
    down: dict[str, Dimension] = {"query": queries, **blocks} if rank is None else {"query_latent": rank, **blocks}

    def norm(size: int, reader: LinearBase | None = None) -> RMSNorm:
        output: dict[str, Any] = {} if reader is None else {"output": reader.input_format}
        return RMSNorm(size, eps=latent.norm_eps, dtype=dtype, device=device, **output)

    query_up = None if rank is None else linears.make_linear(f"{name}.query_up", rank, queries, bias=False)
    return LatentAttention(
        sizes,
        down=linears.make_linear(f"{name}.down", spec.hidden_size, down, bias=latent.down_bias),
        query_norm=None if rank is None else norm(rank, query_up),
        query_up=query_up,
        latent_norm=norm(latent.rank),
        up=UpProjections(sizes, dtype=dtype, device=device),
        out=out,
        table=table,
        interleaved=spec.rope.interleaved,
        scale=spec.head_dim**-0.5 if spec.attention.scale is None else spec.attention.scale,
        group=group,
    )
