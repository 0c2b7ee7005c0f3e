"""`AdaptedEmbedding`: a token embedding whose table the adapters of the tokens change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...kernels import invariant_linear
from ..device import to_device
from .adapter import LowRank, NewRows
from .slots import EMBEDDING, DeviceSlots

__all__ = ["AdaptedEmbedding"]


class AdaptedEmbedding(nn.Module):
    """Looks up the embeddings of token ids, each in the table as the adapter of its token has changed it.

    An adapter replaces rows of the table, and adds `b a` to it, where column v of `a` belongs to token v. Few adapters
    do so, and `a` is as long as the vocabulary, so a slot takes memory only while its adapter changes the embedding.
    Every rank has all new rows and all of `a`; so the ranks need no further sum.

    Args:
        base: Looks up the embeddings in the model's own table. It keeps its name in the model (`weight_slots`).
        num_tokens: Number of rows of the table.
        size: Length of a row.
        scale: Factor on the embeddings.
        slots: The adapter slots of the model, which the embedding joins.
        dtype: Number type of the embeddings.
        device: Device of the adapters' matrices.

    Attributes:
        unadapted: The embedding `base`.
    """

    def __init__(
        self,
        base: nn.Module,
        num_tokens: int,
        size: int,
        *,
        scale: float,
        slots: DeviceSlots,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.unadapted = base
        self._shape = (size, num_tokens)
        self._scale = torch.tensor(scale, dtype=dtype).item()
        self._slots = slots
        self._device = device
        self._updates: dict[int, LowRank] = {}
        self._new_rows: dict[int, NewRows] = {}
        slots.layers.append(self)
        slots.tables.append(self)

    @property
    def name(self) -> str:
        """Our path of the embedding."""
        return EMBEDDING

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """Our path of the embedding, -> length of an embedding and number of tokens."""
        return {EMBEDDING: self._shape}

    def load(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Fills a slot with the update of the table; without one, the slot becomes empty."""
        self._updates.pop(slot, None)
        if (update := updates.get(EMBEDDING)) is not None:
            a = to_device(update.a, update.a.dtype, self._device).t().contiguous()  # A row for each token.
            self._updates[slot] = LowRank(a, to_device(update.b, update.b.dtype, self._device))

    def load_rows(self, slot: int, new_rows: Mapping[str, NewRows]) -> None:
        """Fills a slot with the rows that replace some of the table; without any, the slot becomes empty."""
        self._new_rows.pop(slot, None)
        if (new := new_rows.get(EMBEDDING)) is not None:
            indices = to_device(new.indices, torch.int64, self._device)
            self._new_rows[slot] = NewRows(indices, to_device(new.rows, new.rows.dtype, self._device))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Maps `token_ids` `[num_tokens]` int64 to `[num_tokens, size]`."""
        embeddings: Tensor = self.unadapted(token_ids)
        routing = self._slots.routing
        for slot, tokens in routing.groups.items() if routing is not None else ():
            embeddings[tokens] = self._adapt(slot, token_ids[tokens], embeddings[tokens])
        return embeddings

    def _adapt(self, slot: int, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        """Returns the embeddings of tokens of one slot, from those in the model's own table."""
        if (new := self._new_rows.get(slot)) is not None:
            found = torch.searchsorted(new.indices, token_ids).clamp(max=len(new.indices) - 1)
            is_new = (new.indices[found] == token_ids).unsqueeze(1)
            embeddings = torch.where(is_new, new.rows[found] * self._scale, embeddings)
        if (update := self._updates.get(slot)) is not None:
            product = invariant_linear(update.a[token_ids].float(), update.b.float(), None)
            embeddings = (embeddings.float() + product * self._scale).to(embeddings.dtype)
        return embeddings
