"""`match_weights` and `fill_slots`: fill a model from a checkpoint, local or behind a URL, a few tensors at a time.

Each tensor is read, cast, and copied to its weight slot. The module depends on file formats and on names, and not on
layers: the layers declare the names of their weight slots through `slots`, and the `WeightMap` of a family maps the
names in checkpoints to these names. An unknown tensor and a weight slot without a tensor are errors.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..device import share_current_device
from ..errors import CheckpointError, quote
from ..gguf.files import find_gguf
from ..gguf.tensors import iter_gguf_tensors
from ..layers import WeightSlot
from ..storage import Location, read_json_object
from .codes import Codes
from .mapped_pages import MappedPages
from .model_slots import weight_slots
from .quantised_matrix import numbers_of
from .remote import iter_remote_tensors
from .scale_names import scale_names
from .tensor_layout import TensorLayout, misshapen
from .tensor_view import StoredTensor, TensorItem, codes_of, form_of

__all__ = [
    "Join",
    "Sources",
    "StoredTensor",
    "Tensors",
    "WeightMap",
    "checkpoint_files",
    "fill_slots",
    "has_weights",
    "iter_safetensors",
    "iter_tensors",
    "load_dummy_weights",
    "match_tensor",
    "match_weights",
    "read_part",
]

logger = logging.getLogger(__name__)

# In order of preference: safetensors before pickles, a single file before the index of several.
_SOURCES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OLD_GPTQ_SOURCE = re.compile(r"gptq_model-\d+bit-(-1|\d+)g\.safetensors(\.index\.json)?")
_LFS_POINTER = b"version https://git-lfs"
_NUM_THREADS = 8  # While some threads wait for pages of a file, others copy.
_DUMMY_SCALE = 0.02
_PIECE_BYTES = 512 << 10  # Rows of a matrix that a thread copies or quantises at once.

MAX_NAME_CHARS = 80
"""Most characters of a name of a tensor or a file that are shown."""

PREDICTOR_MARKS = ("mtp", "eh_proj")
"""Parts of names that layers which predict further tokens have, and no other layer behind the last one has."""

Tensors: TypeAlias = Iterable[tuple[str, StoredTensor]]
"""The name and the tensor of each stored tensor of a checkpoint."""

Join: TypeAlias = Callable[[Tensors], Tensors]
"""Replaces the tensors of each quantised matrix by one. `iter` leaves all tensors as they are."""

Sources: TypeAlias = Mapping[str, list[tuple[str, StoredTensor]]]
"""Our name of a weight -> names and tensors of the checkpoint for it, which are two or more if weights are tied."""


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Maps names of weights in a family's checkpoints to the names in our models. `*` stands for a layer's index.

    Attributes:
        prefixes: Prefixes of names in checkpoints. The first prefix with which a name begins is removed.
        modules: Name of a module in checkpoints -> our name.
        ignored: Modules and tensors in checkpoints that are not loaded, because we compute their values.
        ignored_starts: Beginnings of names (after the prefix) of tensors that are not loaded, such as those of a layer
            that predicts further tokens.
        unused_heads: Beginnings of names (after the prefix) of tensors that are not loaded, because they belong to a
            head that no model of ours has, such as that of an encoder's training.
        numbered_parts: Parts of names whose number is no index, such as `layer` in `block.3.layer.1`, where a layer of
            the model is a block. This number is written out in the names of `modules`.
        layouts: Layouts of the tensors in checkpoints that are not stored as ours are, by their module or their name.
        tensors: Name of a tensor in checkpoints -> our name, if the names differ in more than the module.
    """

    prefixes: tuple[str, ...]
    modules: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    ignored_starts: tuple[str, ...] = ()
    unused_heads: tuple[str, ...] = ()
    numbered_parts: tuple[str, ...] = ()
    layouts: Mapping[str, TensorLayout] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def ours(self, name: str) -> str | None:
        """Returns our name for a checkpoint's tensor; None for a tensor that is ignored.

        Args:
            name: The checkpoint's name, e.g. `model.layers.0.self_attn.q_proj.weight`.

        Raises:
            KeyError: The family has no tensor of this name.
        """
        module, indices, leaf = self._split(name)
        if self.is_beside(name) or self._rest(name).startswith(self.unused_heads):
            return None
        if module in self.ignored or f"{module}.{leaf}" in self.ignored:
            return None
        return _fill_in(self.tensors.get(f"{module}.{leaf}") or f"{self.modules[module]}.{leaf}", indices)

    def is_beside(self, name: str) -> bool:
        """Returns whether the name of a checkpoint's tensor has one of `ignored_starts`."""
        return self._rest(name).startswith(self.ignored_starts)

    def all_ours(self, name: str) -> list[str]:
        """Returns our names for a checkpoint's tensor.

        Returns:
            No name if the tensor is ignored, two for one scale of keys and values, one for each part of a fused tensor.

        Raises:
            KeyError: The family has no tensor of this name.
        """
        found = [ours for each in scale_names(name) if (ours := self.ours(each)) is not None]
        layout = self.layout(name)
        return found if layout is None else [part for ours in found for part in layout.names(ours)]

    def layout(self, name: str) -> TensorLayout | None:
        """Returns the layout of a checkpoint's tensor; None if the tensor is stored as ours is."""
        module, _, leaf = self._split(name)
        return self.layouts.get(f"{module}.{leaf}") or self.layouts.get(module)

    def theirs(self, name: str, forms: Collection[str] = ()) -> str:
        """Returns the name that a weight of our model has in checkpoints, without the prefix; reverses `ours`.

        Args:
            name: Our name, e.g. `layers.0.attention.qkv.query.weight`.
            forms: The names of a checkpoint's tensors, as `form` returns them, which say how it spells a name that
                families have in several spellings.
        """
        module, indices, leaf = _split_name(name)
        whole = f"{module}.{leaf}"
        spellings = [their for their, our in self.tensors.items() if whole in self._parts_of(their, our)]
        for their, our in self.modules.items():
            if whole in self._parts_of(their, f"{our}.{leaf}"):
                spellings.append(f"{their}.{leaf}")
        # Of stacked experts one may be missing, so the name of one says more.
        spellings = [spelling for spelling in spellings if not self._is_stacked(spelling)] or spellings
        used = [spelling for spelling in spellings if spelling in forms]
        return _fill_in((used or spellings[::-1] or [whole])[0], indices)

    def form(self, name: str) -> str:
        """Returns the name of a checkpoint's tensor without the prefix, with `*` in the place of its indices."""
        module, _, leaf = self._split(name)
        return f"{module}.{leaf}"

    def _is_stacked(self, form: str) -> bool:
        layout = self.layouts.get(form) or self.layouts.get(form.rpartition(".")[0])
        return layout is not None and layout.stacked

    def _parts_of(self, their: str, our: str) -> list[str]:
        """Returns our names of a tensor or a module's tensor: one, or those of its parts."""
        return self.layouts[their].names(our) if their in self.layouts else [our]

    def _split(self, name: str) -> tuple[str, list[str], str]:
        """Returns the module of a checkpoint's tensor without the prefix, its indices, and the leaf of its name."""
        return _split_name(self._rest(name), self.numbered_parts)

    def _rest(self, name: str) -> str:
        """Returns a checkpoint's name without the prefix."""
        return name.removeprefix(next((prefix for prefix in self.prefixes if name.startswith(prefix)), ""))


def _split_name(name: str, numbered_parts: Collection[str] = ()) -> tuple[str, list[str], str]:
    """Splits `layers.3.mlp.up.weight` into `layers.*.mlp.up`, its indices `["3"]`, and `weight`."""
    *parts, leaf = name.split(".")
    is_index = [part.isdigit() and last not in numbered_parts for last, part in itertools.pairwise(("", *parts))]
    indices = list(itertools.compress(parts, is_index))
    return ".".join("*" if index else part for part, index in zip(parts, is_index, strict=True)), indices, leaf


def _fill_in(name: str, indices: Iterable[str]) -> str:
    for index in indices:
        name = name.replace("*", index, 1)
    return name


def match_weights(
    slots: Mapping[str, WeightSlot],
    folder: str | Path | Location,
    weights: WeightMap,
    elsewhere: Collection[str] = (),
    join: Join = iter,
) -> Sources:
    """Returns the tensors of a checkpoint for each weight, after a check of names, shapes and number types.

    No numbers are read yet: local tensors are mapped from their files, whose pages are read when they are copied, and
    remote tensors are read when they are cut. So each rank reads only its part of a tensor.

    Args:
        slots: The weight slots of the model by our names; the model may be on the meta device.
        folder: Folder with `model.safetensors` or `pytorch_model.bin`, or with several files and their index.
        weights: The names of the model's weights in the checkpoint.
        elsewhere: Our names of weights that this model does not have, such as those of other ranks; they are skipped.
        join: The `join` of the checkpoint's format, if it is quantised.

    Returns:
        The name of each weight -> its tensors. There may be two for the same weight (a tied output head).

    Raises:
        CheckpointError: A file is missing or damaged, the checkpoint lacks a weight or has an unknown one, or a tensor
            has a wrong shape or number type.
    """
    sources: dict[str, list[tuple[str, StoredTensor]]] = {}
    known = slots.keys() | set(elsewhere)
    unexpected, beside, forms = [], [], set()
    for name, tensor in join(iter_tensors(folder)):
        forms.add(weights.form(name))
        if weights.is_beside(name):
            beside.append(name)
        try:
            found = match_tensor(slots, weights, name, tensor, known)
        except KeyError:
            unexpected.append(name)
            continue
        for ours, part in found:
            if ours in slots:
                sources.setdefault(ours, []).append((name, part))
            elif ours not in elsewhere and not _adds_nothing(name, part):
                unexpected.append(name if part is tensor else f"{name} ({ours})")
    if not any(mark in name for name in beside for mark in PREDICTOR_MARKS):
        unexpected += beside
    elif beside:
        logger.info("%d tensors of layers that predict further tokens are not loaded", len(beside))
    filled = {slots[ours].key for ours in sources}
    needed = [name for name, slot in slots.items() if not slot.optional]
    missing = [weights.theirs(name, forms) for name in needed if slots[name].key not in filled]
    if missing or unexpected:
        raise CheckpointError(
            f"the weights in {folder} do not match its config.json: missing {_listed(missing)}; unexpected "
            f"{_listed(unexpected)}; check that config.json and the weights belong together"
        )
    for ours, slot in slots.items():
        for name, tensor in sources.get(ours, ()):
            _check_fits(slot, name, tensor)
    return sources


def _adds_nothing(name: str, tensor: StoredTensor) -> bool:
    """Returns whether a tensor is a bias of zeros, which early writers of GPTQ give to layers that have none."""
    return name.endswith(".bias") and not numbers_of(tensor).any()


def match_tensor(
    slots: Mapping[str, WeightSlot],
    weights: WeightMap,
    name: str,
    tensor: StoredTensor,
    known: Collection[str] = (),
) -> list[tuple[str, StoredTensor]]:
    """Returns our name of every part of a checkpoint's tensor, and the part itself.

    Args:
        slots: The weight slots of the model by our names. A tensor whose parts have none is not cut.
        weights: The names of the model's weights in the checkpoint.
        name: The checkpoint's name.
        tensor: The checkpoint's tensor.
        known: Our names of the weights of all ranks, by which the number of stacked items is checked; empty to check
            the shape of each item alone.

    Raises:
        KeyError: The family has no tensor of this name.
        CheckpointError: A tensor that is to be cut has a wrong shape.
    """
    names, layout = weights.all_ours(name), weights.layout(name)
    if layout is None:
        return [(ours, tensor) for ours in names]
    if not layout.stacked:
        return _cut(slots, layout, name, names, tensor)
    _check_stack(slots, layout, name, names, tensor, known)
    found = []
    for index in range(tensor.shape[0] if tensor.shape else 0):
        own = [ours.replace("*", str(index)) for ours in names]
        found += _cut(slots, layout, f"item {index} of {name}", own, TensorItem(tensor, index))
    return found


def _check_stack(
    slots: Mapping[str, WeightSlot],
    layout: TensorLayout,
    name: str,
    names: list[str],
    tensor: StoredTensor,
    known: Collection[str],
) -> None:
    """Raises if a stacked tensor, such as all experts of a layer, has another shape than all items that are known."""
    if not names or any("*" not in ours for ours in names):
        return  # The items of an ignored tensor have no names, and some stacked tensors have one item under one name.
    numbered = ([ours.replace("*", str(index)) for ours in names] for index in itertools.count())
    items = list(itertools.takewhile(lambda own: all(ours in known for ours in own), numbered))
    here = next((own for own in items if all(ours in slots for ours in own)), None)
    if here is not None:
        asked = [len(items), *layout.stored_shape([slots[ours].whole_shape for ours in here])]
        if list(tensor.shape) != asked:
            raise misshapen(name, tensor.shape, asked)


def _cut(
    slots: Mapping[str, WeightSlot], layout: TensorLayout, name: str, names: list[str], tensor: StoredTensor
) -> list[tuple[str, StoredTensor]]:
    """Returns the parts of a tensor with our names of them; the whole tensor for each if the model has none of them."""
    if not all(ours in slots for ours in names):
        return [(ours, tensor) for ours in names]
    parts = layout.cut(name, tensor, [slots[ours].whole_shape for ours in names])
    return list(zip(names, parts, strict=True))


def fill_slots(slots: Mapping[str, WeightSlot], sources: Sources) -> None:
    """Fills weight slots, several at once.

    Args:
        slots: The weight slots by our names.
        sources: The tensors of the checkpoint for each weight; of tied weights, one has some.

    Raises:
        CheckpointError: A tensor has a wrong shape or number type, or tied tensors differ.
    """
    by_key = {slot.key: slot for slot in slots.values()}
    tensors: dict[tuple[int, int], list[tuple[str, StoredTensor]]] = {key: [] for key in by_key}
    for name, found in sources.items():
        tensors[slots[name].key] += found
    with ThreadPoolExecutor(_NUM_THREADS, "millrace-weights", initializer=share_current_device()) as pool:
        for _ in pool.map(functools.partial(_fill, MappedPages()), by_key.values(), tensors.values()):
            pass
    logger.info("loaded %d tensors", len(tensors))


def load_dummy_weights(model: nn.Module) -> None:
    """Fills the parameters of a model with random numbers of standard deviation 0.02, the same ones every time.

    The numbers are made on the model's device, so a model of any size starts quickly without a checkpoint. Parameters
    of integers become zeros, and optional ones stay as they are.

    Args:
        model: The model, on its device and in its dtype.
    """
    slots = {slot.key: slot for slot in weight_slots(model).values() if not slot.optional}.values()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for slot in slots:
        slot.fill(torch.randn(slot.shape, generator=generator, dtype=torch.bfloat16, device=device) * _DUMMY_SCALE)


@torch.inference_mode()  # Threads do not inherit the mode of the caller.
def _fill(pages: MappedPages, slot: WeightSlot, sources: list[tuple[str, StoredTensor]]) -> None:
    """Fills a weight slot from the first source, and checks that the other sources hold the same numbers."""
    for i, (name, tensor) in enumerate(sources):
        _check_fits(slot, name, tensor)
        part = read_part(slot, tensor)
        if i == 0:
            # Only a stored tensor, of which the part is a view, was there when the mapped pages were listed.
            _fill_from(slot, part, pages if isinstance(tensor, Tensor) else None)
        elif not slot.holds(part):
            raise CheckpointError(
                f"{name} differs from the tensor that config.json ties it to; if the output head has weights of its "
                "own, pass hf_overrides={'tie_word_embeddings': False}"
            )


def _fill_from(slot: WeightSlot, part: Tensor | Codes, pages: MappedPages | None) -> None:
    """Fills a weight slot, by a few rows at a time where it can, so that neither they nor copies of them pile up."""
    if isinstance(part, Codes):
        slot.fill(part)
        return
    if not slot.by_row or part.dim() != 2 or slot.targets[0].device.type != "cpu":
        slot.fill(part)
        if pages is not None:
            pages.release(part)
        return
    num_rows = max(1, _PIECE_BYTES // max(1, part[:1].nbytes))
    for first in range(0, len(part), num_rows):
        rows = part[first : first + num_rows]
        slot.fill_rows(first, rows)
        if pages is not None:
            pages.release(rows)


def _check_fits(slot: WeightSlot, name: str, tensor: StoredTensor) -> None:
    """Raises `CheckpointError` if a tensor has not the shape of the weight slot, or a type that it does not take."""
    if not slot.fits(tensor.shape):
        raise misshapen(name, tensor.shape, slot.whole_shape)
    if not slot.accepts(tensor.dtype):
        taken = " or ".join(map(str, slot.dtypes)) or "floating-point numbers"
        raise CheckpointError(f"{name} is of {tensor.dtype}, and its layer takes {taken}; use the unquantised model")


def _listed(names: list[str], limit: int = 12) -> str:
    if not names:
        return "none"
    names = sorted(set(names))  # The parts of a fused tensor have one name.
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:MAX_NAME_CHARS] for name in names[:limit]) + rest


def checkpoint_files(folder: str | Path | Location) -> list[Location]:
    """Returns the weight files of a model folder: safetensors, or pickles if there are no safetensors.

    Args:
        folder: The model folder.

    Raises:
        CheckpointError: The folder has no weights, or the index is damaged or names files that do not exist.
    """
    place = _place(folder)
    present = {file.name: file for file in place.list()}
    name = _find_source(present)
    if name is None:
        found = sorted(present) or "no such folder"
        raise CheckpointError(f"{place} holds no weights: looked for {', '.join(_SOURCES)}; found {found}")
    source = present[name]
    if not name.endswith(".json"):
        return [source]
    files = read_json_object(source).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{source} is not an index of weight files: weight_map is {quote(files)}; fetch it again")
    names = sorted(set(files.values()))
    absent = [name for name in names if name not in present]
    if absent:
        raise CheckpointError(f"{source} names files that {place} lacks: {_listed(absent)}; fetch them")
    return [present[name] for name in names]


def has_weights(folder: str | Path | Location) -> bool:
    """Returns whether a model folder has weight files."""
    return _find_source([file.name for file in _place(folder).list()]) is not None


def _find_source(present: Collection[str]) -> str | None:
    """Returns the name of a folder's file of weights, or of the index of several; None if it has none."""
    names = (*_SOURCES, *filter(_OLD_GPTQ_SOURCE.fullmatch, sorted(present)))
    return next((name for name in names if name in present), None)


def iter_tensors(folder: str | Path | Location) -> Iterator[tuple[str, StoredTensor]]:
    """Yields every (name, tensor) of a checkpoint. Local tensors are mapped from their files and must not be changed.

    Args:
        folder: The model folder, or a GGUF file.

    Raises:
        CheckpointError: As in `checkpoint_files`; or a file is damaged, or the weights behind a URL are pickles.
    """
    if gguf := find_gguf(_place(folder)):
        yield from iter_gguf_tensors(gguf)
        return
    yield from _iter_stored(checkpoint_files(folder))


def _iter_stored(files: list[Location]) -> Iterator[tuple[str, StoredTensor]]:
    """Yields every (name, tensor) of weight files, as they are stored."""
    if not files[0].is_local:
        pickles = [file.name for file in files if not file.name.endswith(".safetensors")]
        if pickles:
            raise CheckpointError(f"{files[0]}: of weights behind a URL only safetensors are read; convert them")
        yield from iter_remote_tensors(files)
        return
    for path in (Path(file.url) for file in files):
        with path.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in {path.parent}"
                )
        yield from iter_safetensors(path) if path.suffix == ".safetensors" else _iter_pickle(path)


def read_part(slot: WeightSlot, tensor: StoredTensor) -> Tensor | Codes:
    """Returns the part of a stored tensor that fills a weight slot: a view of a mapped file, or read now."""
    part = slot.cut(tensor)
    if slot.takes_codes and form_of(part) is not None:
        return codes_of(part)
    return part if isinstance(part, Tensor) else part.read()


def _place(folder: str | Path | Location) -> Location:
    return folder if isinstance(folder, Location) else Location.at(folder)


def iter_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields every (name, tensor) of one local safetensors file. The tensors are mapped from the file.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # The file is not a mapping.
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); fetch it again") from error


def _iter_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # A damaged pickle raises errors of any type.
        raise CheckpointError(f"{path} is truncated, damaged or not just tensors ({error}); fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a mapping of names to tensors; save it with model.save_pretrained")
    yield from tensors.items()
