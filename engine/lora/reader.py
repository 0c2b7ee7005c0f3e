"""`read_adapter`: reads the folder of an adapter and checks it against the model."""

from __future__ import annotations

from .adapter import Adapter
from .base import AdapterBase
from .request import LoRARequest

__all__ = ["read_adapter"]


def read_adapter(request: LoRARequest, base: AdapterBase) -> Adapter:
    """Reads the folder of an adapter in PEFT's layout, and checks it against the model.

    Args:
        request: Names the adapter and its folder.
        base: The model that the adapter changes.

    Raises:
        AdapterError: The adapter is missing, damaged or hostile, does not fit the model, or asks for what is not
            implemented.
    """
    raise NotImplementedError
