"""`AdapterNames`: the adapters that rows may name, and the request of the engine for the adapter that a row names.

A row names its adapter in the column `model`. The job says where adapters are: in `lora_modules` by name, or below
`dynamic_lora_loading_path`; a row can then make the engine read nothing else. Only where a job sets neither of the two
and turns `enable_lora` on, a row names the folder or the hub repository of its adapter itself, as in Ray Data LLM.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engine import LoRARequest
from ...engine.errors import AdapterError, ConfigError, quote
from .. import columns

__all__ = ["AdapterNames", "absolute_place", "read_modules"]

MAX_LISTED = 10
"""Most names of adapters that an error lists."""

MAX_INT_ID = 2**63 - 1

UNSAFE = re.compile(r"[\\:?#%\x00-\x1f\x7f]|(^|/)\.{0,2}(/|$)|(^|/)~")
"""What a name below a loading path cannot hold: steps such as ``..``, an absolute path, and characters that a path of
another system, a URL or a shell may understand as more than a name."""


@dataclass(frozen=True)
class AdapterNames:
    """The adapters that the rows of a job may name.

    Attributes:
        base_names: Names of the model itself; a row without a name, or with one of these, runs without an adapter.
        modules: Name of an adapter -> its folder, URL or hub repository.
        loading_path: Folder, perhaps behind a URL, whose subfolders are adapters; None if there is none.
        takes_places: Whether a row names the folder or hub repository of its adapter itself.
    """

    base_names: tuple[str, ...]
    modules: Mapping[str, str] = field(default_factory=dict)
    loading_path: str | None = None
    takes_places: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether no row can name an adapter."""
        return not self.modules and self.loading_path is None and not self.takes_places

    def find(self, name: Any) -> LoRARequest | None:
        """Returns the request for the adapter that a row names; None for the model itself. Nothing is read.

        Args:
            name: Value of the column `model`; None or NaN if the row has none.

        Raises:
            AdapterError: The row may not name this adapter, or the value is no name.
        """
        if name is None or (isinstance(name, float) and math.isnan(name)):
            return None
        if not isinstance(name, str):
            raise AdapterError(
                f"column {columns.MODEL!r} must be the name of a model or an adapter; got {type(name).__name__} "
                f"{quote(name)}"
            )
        if name in self.base_names:
            return None
        if not name:
            raise AdapterError(f"column {columns.MODEL!r} is empty; null stands for the model itself")
        return LoRARequest(name, _int_id(name), self._place_of(name))

    def has(self, name: str) -> bool:
        """Returns whether a row may name an adapter so; whether the adapter is there is not looked up."""
        try:
            return self.find(name) is not None
        except AdapterError:
            return False

    def _place_of(self, name: str) -> str:
        if name in self.modules:
            return self.modules[name]
        if self.loading_path is not None:
            if UNSAFE.search(name):
                raise AdapterError(
                    f"column {columns.MODEL!r} holds {quote(name)}, which is no name of a folder below the job's "
                    "dynamic_lora_loading_path"
                )
            return f"{self.loading_path.rstrip('/')}/{name}"
        if not self.takes_places:
            raise AdapterError(self._unknown(name))
        if "\0" in name or "://" in name:
            raise AdapterError(
                f"column {columns.MODEL!r} holds {quote(name)}; a row names a folder or a repository of the hub, and "
                "only the job names a URL: in lora_modules or dynamic_lora_loading_path"
            )
        return name

    def _unknown(self, name: str) -> str:
        asked = f"column {columns.MODEL!r} asks for {quote(name)}, and all rows run on {quote(self.base_names[0])}"
        if not self.modules:
            return f"{asked}; to run adapters, set enable_lora and lora_modules or dynamic_lora_loading_path"
        listed = ", ".join(map(quote, sorted(self.modules)[:MAX_LISTED]))
        more = f" and {len(self.modules) - MAX_LISTED} more" if len(self.modules) > MAX_LISTED else ""
        return f"{asked} or one of the adapters {listed}{more}"


def read_modules(value: Any) -> dict[str, str] | None:
    """Returns adapters by name, from any form in which `lora_modules` may be given; None for None.

    Args:
        value: A dict from names to places; or a list of texts ``"name=place"``, or of dicts with `name` and `path`.

    Raises:
        ConfigError: The value has another form, or names an adapter twice.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        pairs = [_pair(one) for one in value]
    else:
        pairs = [(None, None)]
    if not all(isinstance(part, str) and part for pair in pairs for part in pair):
        raise ConfigError(
            "lora_modules must map names of adapters to folders, URLs or hub repositories, or be a list of "
            f"'name=place'; got {quote(value)}"
        )
    modules = dict(pairs)
    if len(modules) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"lora_modules name {quote(twice)} twice; give each adapter a name of its own")
    return modules


def absolute_place(place: str, folder: Path) -> str:
    """Returns the place of an adapter, as an absolute path if a local folder is there: workers run in other folders.

    Args:
        place: Folder, URL or hub repository.
        folder: Folder from which a relative path starts.
    """
    path = os.path.abspath(folder / os.path.expanduser(place))
    return path if "://" not in place and os.path.exists(path) else place


def _pair(one: Any) -> tuple[Any, Any]:
    """Returns name and place of an item of a list of adapters; (None, None) if the item has another form."""
    if isinstance(one, str):
        name, equals, place = one.partition("=")
        return (name, place) if equals else (None, None)
    return (one.get("name"), one.get("path")) if isinstance(one, Mapping) else (None, None)


def _int_id(name: str) -> int:
    """Returns the number of an adapter, which is the same in every process because it is a hash of the name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % MAX_INT_ID
