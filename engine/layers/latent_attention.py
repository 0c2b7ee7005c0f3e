"""`LatentAttention`: attention whose keys and values are made of one cached latent for each token.

DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1 (elsewhere: multi-head latent attention, MLA). There are two ways to
attend, with the same result. Prompts without cached context expand their latents to keys and values. All other tokens
attend to the latents themselves, with the up-projections absorbed into the queries and the results
(docs/decisions/0036-latent-attention.md).

Letters in shapes: T tokens of the step, H query heads of this rank, R numbers of a latent of which keys and values are
made, P numbers of its rotated part, N numbers of a head without a position, V numbers of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import latent_attention, paged_attention, rope_and_store_latent
from ..batch import ForwardBatch
from ..parallel.shard import Shard
from .input_format import InputFormat, Rows
from .linear import LinearBase
from .norm import RMSNorm
from .weight_slot import WeightSlot

__all__ = ["LatentAttention", "LatentSizes", "UpProjections"]


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """The heads that one rank computes in an attention layer over latents, and the sizes of their parts.

    Attributes:
        heads: The query heads of this rank among those of the model.
        rank: Numbers of a latent of which keys and values are made (R).
        rope_dim: Numbers of a query, and of a latent, that are rotated (P).
        nope_dim: Numbers of a query or a key that have no position (N).
        value_dim: Numbers of a value (V).
    """

    heads: Shard
    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


class UpProjections(nn.Module):
    """The projections from a latent to the keys and values of this rank's heads: one matrix, used in two ways.

    Args:
        sizes: The heads of this rank.
        dtype: Number type of the matrix.
        device: Device of the matrix. Its memory is not initialised.

    Attributes:
        weight: `[H, N + V, R]`; the rows of a head are those of its keys, then those of its values.
    """

    def __init__(self, sizes: LatentSizes, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        num_rows = sizes.nope_dim + sizes.value_dim
        weight = torch.empty(sizes.heads.length, num_rows, sizes.rank, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._parts = (sizes.heads.times(num_rows), Shard(sizes.rank))
        self._split = (sizes.nope_dim, sizes.value_dim)

    def slots(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yields the name `weight` and its weight slot: a checkpoint has one matrix for all heads."""
        yield "weight", WeightSlot((self.weight.flatten(0, 1),), parts=self._parts)

    def absorb(self, query: Tensor) -> Tensor:
        """Maps parts of queries `[T, H, N]` to `[T, H, R]`, whose products with latents are those with their keys."""
        keys_up, _ = self.weight.split(self._split, dim=1)
        return torch.bmm(query.transpose(0, 1), keys_up).transpose(0, 1)

    def project_values(self, attended: Tensor) -> Tensor:
        """Maps weighted sums of latents `[T, H, R]` to those of their values, `[T, H, V]`."""
        _, values_up = self.weight.split(self._split, dim=1)
        return torch.bmm(attended.transpose(0, 1), values_up.mT).transpose(0, 1)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys without rotated parts, `[T, H, N]`, and the values, `[T, H, V]`, of latents `[T, R]`."""
        expanded = F.linear(latents, self.weight.flatten(0, 1)).view(len(latents), *self.weight.shape[:2])
        keys, values = expanded.split(self._split, dim=-1)
        return keys, values


class LatentAttention(nn.Module):
    """An attention layer over latents: projects down, norms, rotates and stores the latent, attends, projects back.

    Args:
        sizes: The heads of this rank.
        down: Fused projections of the hidden states: to the queries `[H * (N + P)]` or, with `query_up`, to their
            latent; and to the latent of keys and values, `[R + P]`.
        query_norm: Norm of the latent of the queries; None for queries that are projected at once.
        query_up: Projection of that latent to the queries; None if and only if `query_norm` is None.
        latent_norm: Norm of the first R numbers of the latent of keys and values.
        up: The projections from the latent to keys and values.
        out: The output projection, `[H * V] -> [hidden_size]`.
        table: The cosines and sines that `rotary_table` returns.
        interleaved: Whether neighbouring numbers are rotated as a pair, not those of two halves.
        scale: Factor on the product of a query and a key.
        group: Index of the group of layers to which this layer belongs, and whose block tables it reads.
    """

    table: Tensor

    def __init__(
        self,
        sizes: LatentSizes,
        *,
        down: LinearBase,
        query_norm: RMSNorm | None,
        query_up: LinearBase | None,
        latent_norm: RMSNorm,
        up: UpProjections,
        out: LinearBase,
        table: Tensor,
        interleaved: bool,
        scale: float,
        group: int,
    ) -> None:
        super().__init__()
        self.down = down
        self.query_norm = query_norm
        self.query_up = query_up
        self.latent_norm = latent_norm
        self.up = up
        self.out = out
        self.register_buffer("table", table, persistent=False)
        self.interleaved = interleaved
        self.scale = scale
        self.group = group
        self._sizes = sizes
        self._query_split = (sizes.nope_dim, sizes.rope_dim)

    @property
    def input_format(self) -> InputFormat:
        """The form in which the layer reads its input."""
        return self.down.input_format

    def forward(self, hidden: Rows, batch: ForwardBatch, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attends from the tokens of `batch` to their sequences' cached tokens and themselves.

        Args:
            hidden: `[T, hidden_size]`, the T tokens of the step.
            batch: Positions, block tables and slots of the tokens.
            k_cache: `[num_blocks, 1, block_size, R + P]`, latents; those of this step are written to it.
            v_cache: A view of the first R numbers of the latents.

        Returns:
            `[T, hidden_size]`. When ranks share the heads, this is one addend: the result is the sum over the ranks.
        """
        query, latent = self._project(hidden)
        rope_and_store_latent(
            query[..., self._sizes.nope_dim :],
            latent,
            k_cache,
            batch.slot_mappings[self.group],
            batch.positions,
            self.table,
            self.latent_norm.weight,
            self.latent_norm.eps,
            interleaved=self.interleaved,
        )
        return self.out(self._attend(query, batch, k_cache).flatten(1))

    def _project(self, hidden: Rows) -> tuple[Tensor, Tensor]:
        """Returns the queries `[T, H, N + P]` and the latents of keys and values `[T, R + P]`, not rotated yet."""
        sizes, down = self._sizes, self.down(hidden)
        query, latent = down.split((down.shape[1] - sizes.rank - sizes.rope_dim, sizes.rank + sizes.rope_dim), dim=1)
        if self.query_norm is not None and self.query_up is not None:
            normed, _ = self.query_norm(query)
            query = self.query_up(normed)
        return query.unflatten(1, (sizes.heads.length, -1)), latent

    def _attend(self, query: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Attends from all tokens of a batch; returns `[T, H, V]`."""
        if not batch.longest_prompt:
            return self._attend_absorbed(query, batch, cache)
        count = batch.num_decodes
        prompts = self._attend_expanded(query[count:], batch, cache)
        if not count:
            return prompts
        return torch.cat((self._attend_absorbed(query[:count], batch.first_decodes(), cache), prompts))

    def _attend_absorbed(self, query: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Attends to the cached latents themselves."""
        without_position, rotated = query.split(self._query_split, dim=-1)
        attended = latent_attention(
            torch.cat((self.up.absorb(without_position), rotated), dim=-1),
            cache,
            batch.block_tables[self.group],
            batch.seq_lens,
            batch.query_start_loc,
            self.scale,
            self._sizes.rank,
            num_decodes=batch.num_decodes,
        )
        return self.up.project_values(attended)

    def _attend_expanded(self, query: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """Attends from the prompts after the decodes, which have no cached context, to their expanded latents.

        The keys and values are a cache whose blocks have one token each, in the order of the step.
        """
        sizes, count, block_size = self._sizes, batch.num_decodes, cache.shape[2]
        slots = batch.slot_mappings[self.group][count:].clamp(min=0)
        latents, rotated = cache[slots // block_size, 0, slots % block_size].split((sizes.rank, sizes.rope_dim), dim=1)
        keys, values = self.up.expand(latents)
        keys = torch.cat((keys, rotated.unsqueeze(1).expand(-1, sizes.heads.length, -1)), dim=-1)
        values = F.pad(values, (0, keys.shape[-1] - sizes.value_dim))  # The kernel takes values as long as the keys.
        starts = batch.query_start_loc[count:] - count
        tokens = torch.arange(batch.longest_prompt, dtype=torch.int32, device=starts.device)
        attended = paged_attention(
            query,
            keys.unsqueeze(2),
            values.unsqueeze(2),
            starts[:-1, None] + tokens,
            batch.seq_lens[count:],
            starts,
            self.scale,
        )
        return attended[..., : sizes.value_dim]
