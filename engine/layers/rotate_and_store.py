"""`RotateAndStore`: rotates queries and keys by their positions, and writes keys and values to the KV cache.

This is done between the projections and the attention. The rotary position embedding is that of Su et al., 2021
(arXiv:2104.09864), in half-split or in neighbouring pairs. The frequencies come from the model's spec, which has scaled
them for long contexts already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...kernels import rope_and_store, store_kv
from .norm import HeadLayerNorm, HeadNorm, LayerNormPerHead, ProjectionNorm

__all__ = [
    "CacheWriter",
    "ClampAndStore",
    "NormAndStore",
    "RotateAndStore",
    "ScaleAndStore",
    "StoreOnly",
    "rotary_table",
]


def rotary_table(
    inv_freq: Sequence[float], *, scaling: float, max_positions: int, device: torch.device
) -> torch.Tensor:
    """Computes the cosines and sines of every position. One table serves all layers with the same frequencies.

    Args:
        inv_freq: Radians per position of each rotated pair, `rot_dim / 2` numbers.
        scaling: Factor on cosine and sine (YaRN's attention scaling; 1 otherwise).
        max_positions: Number of positions of the table.
        device: Device of the table.

    Returns:
        `[max_positions, rot_dim]` float32: the cosines of a position, then its sines.
    """
    frequencies = torch.tensor(inv_freq, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(scaling)


class RotateAndStore(nn.Module):
    """Norms query and key heads if it has norms for them, rotates queries and keys, and stores keys and values.

    One kernel does this in one pass over memory.

    Args:
        table: The cosines and sines that `rotary_table` returns.
        q_norm: Norm of each query head; None if the model has none.
        k_norm: Norm of each key head; None if and only if `q_norm` is None.
        interleaved: Whether neighbouring numbers of a head are a pair, not the numbers of its two halves.
    """

    table: Tensor

    def __init__(
        self,
        table: Tensor,
        q_norm: HeadNorm | None = None,
        k_norm: HeadNorm | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.interleaved = interleaved
        self._eps = 0.0 if q_norm is None else q_norm.eps

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        *,
        kv_scales: Tensor | None = None,
    ) -> None:
        """Rotates the queries in place, and writes the rotated keys and the values to the cache.

        Args:
            query: `[num_tokens, num_heads, head_dim]`; changed in place.
            key: `[num_tokens, num_kv_heads, head_dim]`.
            value: `[num_tokens, num_kv_heads, head_dim]`.
            k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`; changed in place.
            v_cache: A cache of the same shape for values; changed in place.
            slot_mapping: `[num_tokens]` int64, the slot of the KV cache for each token's key and value.
            positions: `[num_tokens]` int64, the index of each token in its sequence.
            kv_scales: `[2, num_kv_heads]` float32, the scales of an 8-bit cache; None for another cache.
        """
        rope_and_store(
            query,
            key,
            value,
            k_cache,
            v_cache,
            slot_mapping,
            positions,
            self.table,
            q_weight=None if self.q_norm is None else self.q_norm.weight,
            k_weight=None if self.k_norm is None else self.k_norm.weight,
            eps=self._eps,
            kv_scales=kv_scales,
            interleaved=self.interleaved,
        )

    def stored_peaks(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Returns the largest absolute numbers that `forward` would store without scales.

        The plain body of the kernel runs, so that a GPU compiles no kernel for the measurement.

        Args:
            key: As in `forward`, like the others.
            value: The values.
            positions: The index of each token in its sequence.

        Returns:
            `[2, num_kv_heads]` float32, of the keys of each head, then of its values.
        """
        num_tokens, num_kv_heads, head_dim = key.shape
        shape = (2, 1, num_kv_heads, num_tokens, head_dim)  # two caches of one block each
        caches = torch.empty(shape, dtype=torch.float32, device=key.device)
        slots = torch.arange(num_tokens, device=key.device)
        weight = None if self.k_norm is None else self.k_norm.weight
        args = (key.clone(), key, value, *caches, slots, positions, self.table)  # queries would be changed in place
        options: dict[str, Any] = {"eps": self._eps, "interleaved": self.interleaved}
        rope_and_store.plain(*args, q_weight=weight, k_weight=weight, **options)
        return caches.abs().amax((1, 3, 4))


class StoreOnly(nn.Module):
    """Stores keys and values unchanged, in models whose positions are added to the embeddings."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        *,
        kv_scales: Tensor | None = None,
    ) -> None:
        """Writes keys and values to the cache; the arguments are those of `RotateAndStore.forward`."""
        store_kv(key, value, k_cache, v_cache, slot_mapping, kv_scales=kv_scales)

    def stored_peaks(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """As `RotateAndStore.stored_peaks`."""
        return torch.stack((key, value)).float().abs().amax((1, 3))


class NormAndStore(nn.Module):
    """Norms queries and keys by modules of their own, then rotates and stores.

    Args:
        q_norm: Norms all queries of a token, in place.
        k_norm: Norms all keys of a token, in place.
        store: The module that rotates and stores.
    """

    def __init__(
        self,
        q_norm: ProjectionNorm | HeadLayerNorm | LayerNormPerHead,
        k_norm: ProjectionNorm | HeadLayerNorm | LayerNormPerHead,
        store: RotateAndStore | StoreOnly,
    ) -> None:
        super().__init__()
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.store = store

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, **options: Any) -> None:
        """As `RotateAndStore.forward`, which describes the arguments; keys are changed in place too."""
        self.q_norm(query)
        self.k_norm(key)
        self.store(query, key, value, *rest, **options)

    def stored_peaks(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """As `RotateAndStore.stored_peaks`."""
        key = key.clone(memory_format=torch.contiguous_format)
        self.k_norm(key)
        return self.store.stored_peaks(key, value, positions)


class ClampAndStore(nn.Module):
    """Clamps queries, keys and values, then rotates and stores.

    Args:
        limit: The largest absolute value.
        store: The module that rotates and stores.
    """

    def __init__(self, limit: float, store: RotateAndStore | StoreOnly) -> None:
        super().__init__()
        self.limit = limit
        self.store = store

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, **options: Any) -> None:
        """As `RotateAndStore.forward`, which describes the arguments; keys and values are changed in place too."""
        for heads in (query, key, value):
            heads.clamp_(-self.limit, self.limit)
        self.store(query, key, value, *rest, **options)

    def stored_peaks(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """As `RotateAndStore.stored_peaks`."""
        key, value = (heads.clamp(-self.limit, self.limit) for heads in (key, value))
        return self.store.stored_peaks(key, value, positions)


class ScaleAndStore(nn.Module):
    """Multiplies queries by a factor that depends on their position, then rotates and stores.

    Args:
        factors: `[max_positions]` float32, the factor of each position.
        store: The module that rotates and stores.
    """

    factors: Tensor

    def __init__(self, factors: Tensor, store: RotateAndStore | StoreOnly) -> None:
        super().__init__()
        self.register_buffer("factors", factors, persistent=False)
        self.store = store

    def forward(self, query: Tensor, *rest: Tensor, **options: Any) -> None:
        """As `RotateAndStore.forward`, which describes the arguments; the last one is the positions."""
        query.mul_(self.factors[rest[-1], None, None])
        self.store(query, *rest, **options)

    def stored_peaks(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """As `RotateAndStore.stored_peaks`."""
        return self.store.stored_peaks(key, value, positions)


CacheWriter: TypeAlias = RotateAndStore | StoreOnly | NormAndStore | ClampAndStore | ScaleAndStore
"""Any module that writes keys and values to the cache, after what the model does to them and to the queries."""
