"""`route_head`, `routed_head`: which rows of an output head have which adapter.

A head computes some tokens of a step only, so the routing of the forward pass does not fit its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ..lora.routing import Routing
from ..models.decoder import Decoder
from .tables import Tables

__all__ = ["route_head", "routed_head"]


def route_head(model: Decoder, tables: Tables, rows: Sequence[int]) -> Routing | None:
    """Returns the routing of the rows of an output head; None if no adapter among them changes a head.

    Args:
        model: The last pp stage of a model.
        tables: Tables of the running sequences.
        rows: The row in the tables of each row of the head.
    """
    if model.adapters is None:
        return None
    return model.adapters.route_head(tables.adapter_slots[list(rows)], tables.tokens.device)


def routed_head(model: Decoder, routing: Routing | None) -> AbstractContextManager[None]:
    """Makes the output head of a model add the products of adapters in a block, as `DeviceSlots.routed`."""
    return nullcontext() if model.adapters is None or routing is None else model.adapters.routed(routing)
