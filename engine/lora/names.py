"""`sort_tensors` and `find_pieces`: the names of an adapter's tensors, and our parts of the modules that they name.

PEFT names a tensor `base_model.model.` + the module + `.lora_A.weight`. Other trainers write wrappers of the model into
the name, leave the prefix out, or keep the name of the adapter in it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import AdapterError, quote
from ..weights.tensor_layout import TensorLayout
from .base import AdapterBase

__all__ = ["Piece", "Sorted", "find_pieces", "is_unused", "sort_tensors"]

PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that torch.compile, FSDP and activation checkpointing put before the name of what they wrap."""

OUTER = frozenset(("base_model", "model", "module", "language_model", "text_model", "transformer", "decoder"))
"""Modules around the layers that the name of a module may begin with, beyond those of the model's family."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Names of modules that some models and engines fuse -> the modules in the order of their rows."""

PARTS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "gate_proj": "gate", "up_proj": "up"}
"""Names of the separate modules -> the ends of our paths of the same matrices."""

MAX_NAME_CHARS = 300
"""Most characters of the name of a tensor; the time of a match of a pattern grows with a power of it."""

_LORA = re.compile(
    r"(?P<module>.+)\.lora_((?P<kind>[AB])|embedding_(?P<of_table>[AB]))(\.(?P<adapter>[^.]+))??(?(kind)\.weight)"
)


@dataclass(slots=True)
class Sorted:
    """The tensors of an adapter by the modules that they change.

    Attributes:
        a: Name of a module, without the prefix -> its matrix A (`lora_embedding_A` for an embedding).
        b: Name of a module, without the prefix -> its matrix B.
        others: The other tensors by their names without the prefix, such as those of saved modules.
    """

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


def sort_tensors(tensors: Mapping[str, Tensor]) -> Sorted:
    """Sorts the tensors of an adapter's file.

    Raises:
        AdapterError: The file holds several adapters, two tensors of one name, or a name that is too long.
    """
    found, adapters = Sorted(), set[str]()
    for full_name, tensor in tensors.items():
        if len(full_name) > MAX_NAME_CHARS:
            raise AdapterError(
                f"a tensor's name has {len(full_name):,} characters, and at most {MAX_NAME_CHARS} are read"
            )
        name = WRAPPERS.sub("", full_name).removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        kind = found.others if match is None else found.a if "A" in (match["kind"], match["of_table"]) else found.b
        key = name if match is None else match["module"]
        if key in kind:
            raise AdapterError(f"two tensors are called {quote(name)}; save the adapter again with save_pretrained")
        kind[key] = tensor
        if match is not None and match["adapter"] is not None:
            adapters.add(match["adapter"])
    if len(adapters) > 1:
        names = quote(", ".join(sorted(adapters)))
        raise AdapterError(f"the file holds several adapters, {names}; save each of them in a folder of its own")
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint that an adapter changes, and the parts of it that our model has.

    Attributes:
        parts: Our paths of the parts.
        layout: The layout of the tensor in checkpoints; None if it is stored as ours is.
    """

    parts: tuple[str, ...]
    layout: TensorLayout | None

    def cut(self, b: Tensor, base: AdapterBase) -> list[Tensor]:
        """Returns the rows of each part, of a matrix B `[out_features, rank]` with the rows of the whole tensor."""
        if self.layout is None:
            return [b]
        # The matrices of an adapter are never transposed, even where those of the checkpoint are.
        layout, rank = replace(self.layout, transposed=False), b.shape[1]
        shapes = [torch.Size((base.shapes[part][0], rank)) for part in self.parts]
        return [rows.read() for rows in layout.cut(self.parts[0], b, shapes)]

    def num_rows(self, base: AdapterBase) -> int:
        """Returns the number of rows of the whole tensor."""
        return sum(base.shapes[part][0] for part in self.parts)


def find_pieces(module: str, base: AdapterBase) -> list[Piece]:
    """Returns the tensors of the checkpoint that make up a module.

    It is one tensor, or several if only the adapter fuses modules, or a part of one if only the checkpoint does.

    Args:
        module: Name of the module in the adapter, without the prefix.
        base: The model that the adapter changes.

    Raises:
        AdapterError: The model has no such module, or the module cannot take adapters.
    """
    for name in _spellings(module):
        outer, dot, last = name.rpartition(".")
        separate = FUSED.get(last, ())
        for pieces in ([_piece(name, base)], [_piece(f"{outer}{dot}{one}", base) for one in separate]):
            found = [piece for piece in pieces if piece is not None]
            if found and len(found) == len(pieces):
                return found
        whole = next((fused for fused, names in FUSED.items() if last in names), None)
        fused = None if whole is None else _piece(f"{outer}{dot}{whole}", base)
        own = () if fused is None else tuple(part for part in fused.parts if part.endswith(f".{PARTS[last]}"))
        if own:
            return [Piece(own, None)]
    raise _unknown(module, base)


def is_unused(module: str, base: AdapterBase) -> bool:
    """Returns whether checkpoints of the family have a module that the model never runs, such as BERT's pooler."""
    return any(_is_ignored(f"{name}.weight", base) for name in _spellings(module))


def _is_ignored(name: str, base: AdapterBase) -> bool:
    try:
        return base.weights.ours(name) is None
    except KeyError:
        return False


def _spellings(module: str) -> list[str]:
    """Returns the name of a module without its first part, its first two parts, ... as long as these are outer ones."""
    names = [module]
    while (first := names[-1].partition("."))[0] in OUTER and first[2]:
        names.append(first[2])
    return names


def _piece(name: str, base: AdapterBase) -> Piece | None:
    """Returns the tensor of a module's matrix; None if the model has none or adapters cannot change it."""
    parts = _parts(name, base)
    if not parts or not all(part in base.shapes for part in parts):
        return None
    return Piece(tuple(parts), base.weights.layout(f"{name}.weight"))


def _parts(name: str, base: AdapterBase) -> list[str]:
    """Returns our paths of the parts of a module's matrix; none if checkpoints of the family have no such module."""
    try:
        return [ours.removesuffix(".weight") for ours in base.weights.all_ours(f"{name}.weight")]
    except KeyError:
        return []


def _unknown(module: str, base: AdapterBase) -> AdapterError:
    spellings = _spellings(module)
    if ".experts" in module or module.endswith((".gate", ".router", ".shared_expert_gate")):
        return AdapterError(
            f"the adapter changes {quote(module)}; LoRA on experts and routers is not supported yet: train the adapter "
            "without these modules"
        )
    known = {base.weights.theirs(f"{part}.weight").removesuffix(".weight") for part in base.shapes}
    forms = {_form(part) for part in base.shapes}
    found = [part for name in spellings for part in _parts(name, base) if part != name]
    if found and not any(_form(part) in forms for part in found):
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
        return AdapterError(
            f"the adapter changes {quote(module)}, which takes no adapters here; those that do are {ends}: train the "
            "adapter without this module"
        )
    near = difflib.get_close_matches(spellings[-1], known, n=1, cutoff=0.0)
    nearest = f" (the nearest name is {quote(near[0])})" if near else ""
    return AdapterError(
        f"the adapter changes {quote(module)}, and the model has no such module{nearest}; check that the adapter was "
        "trained for this model"
    )


def _form(name: str) -> str:
    """Returns a name with `*` in the place of its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
