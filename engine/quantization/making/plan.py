"""`QuantizationPlan`: which matrices of a checkpoint are quantised, and how config.json says so.

The model decides, not the names: the matrices of linear layers and of experts are quantised; norms, embeddings, routers
and whatever else a model has stay as they are. A matrix that the checkpoint stores transposed, or stacked with those of
other experts, has no form in compressed-tensors and stays as it is too, by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ...errors import ConfigError
from ...layers import ExpertMLP, Experts, LinearBase, Router
from ...models.decoder import Decoder
from ...weights.checkpoint import StoredTensor, WeightMap
from .grid import Grid, QuantisedWeight
from .layout import group_config, stored_tensors
from .recipe import GROUP_SIZES, Recipe

__all__ = ["HEAD", "WEIGHT", "QuantizationPlan", "make_plan", "our_names"]

HEAD, WEIGHT = "lm_head", ".weight"
ROUTERS = ("gate", "router")
"""Names of routers in modules of transformers, whose linear layers all look alike."""


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """Which matrices of a checkpoint are quantised.

    Attributes:
        recipe: The scheme, with its group size.
        head_grid: The grid of the output head; None if it is not quantised.
        modules: Names of the quantised layers in the checkpoint, without the head.
        head: Name of the head in the checkpoint, if it is quantised.
        untied_from: Name of the tensor of the embedding, if the quantised head is a copy of it; None if the checkpoint
            has a head of its own.
        ignored: Names of the other layers with a matrix.
        declined: Reason -> names of layers that cannot be quantised.
    """

    recipe: Recipe
    head_grid: Grid | None
    modules: frozenset[str]
    head: str | None = None
    untied_from: str | None = None
    ignored: tuple[str, ...] = ()
    declined: Mapping[str, list[str]] = field(default_factory=dict)

    def names_of(self, name: str) -> list[str]:
        """Returns the names under which a tensor of the checkpoint is written: its own, and that of an untied head."""
        return [name, f"{self.head}{WEIGHT}"] if name == self.untied_from else [name]

    def grid_of(self, name: str) -> Grid | None:
        """Returns the grid of a tensor of the checkpoint; None if it is written as it is."""
        module = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT):
            return None
        return self.head_grid if module == self.head else self.recipe.grid if module in self.modules else None

    def stored(self, name: str, weight: QuantisedWeight) -> Mapping[str, Any]:
        """Returns the tensors to write for a quantised one, by name."""
        module = name.removesuffix(WEIGHT)
        packed = module == self.head or self.recipe.format == "pack-quantized"
        return {f"{module}.{leaf}": tensor for leaf, tensor in stored_tensors(weight, packed=packed).items()}

    def as_config(self) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json."""
        recipe = self.recipe
        # transformers 5.23 reads all experts as the first group says, so that of the head is the last.
        groups = {"group_0": group_config(recipe.grid, recipe.format, ["Linear"], recipe.activations)}
        if self.head is not None:
            assert self.head_grid is not None
            groups["group_1"] = group_config(self.head_grid, "pack-quantized", [self.head], None)
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(self.ignored),
            "kv_cache_scheme": None,
        }


def make_plan(
    tensors: Mapping[str, StoredTensor], model: Decoder, weights: WeightMap, recipe: Recipe, head_bits: int | None
) -> QuantizationPlan:
    """Decides which matrices of a checkpoint are quantised.

    Args:
        tensors: The tensors of the checkpoint by name.
        model: The model, which may be on the meta device.
        weights: The names of the model's weights in the checkpoint.
        recipe: The scheme; a group size of 0 is replaced by the largest that divides all matrices.
        head_bits: Bits of the output head; None to leave it as it is.

    Raises:
        ConfigError: Nothing can be quantised, or not the head.
    """
    linears, modules, ignored, declined = _linear_weights(model), [], [], dict[str, list[str]]()
    for name, tensor in tensors.items():
        ours = our_names(weights, name)
        module = name.removesuffix(WEIGHT)
        if len(tensor.shape) < 2 or not ours or not all(each in linears for each in _first_items(ours)):
            if len(tensor.shape) == 2 and name.endswith(WEIGHT):
                ignored.append(module)
        elif reason := _reason(name, tensor, weights):
            declined.setdefault(reason, []).append(module)
        else:
            modules.append(module)
    recipe, odd = _with_group_size(recipe, {module: tensors[module + WEIGHT].shape[1] for module in modules})
    if odd:
        declined[f"have widths that {recipe.grid.group_size} does not divide"] = odd
        modules = [module for module in modules if module not in odd]
    if not modules:
        why = "; ".join(f"{len(names)} {reason}" for reason, names in declined.items()) or "it has no linear layers"
        raise ConfigError(f"no layer of this model can be quantised: {why}")
    ignored += [module for names in declined.values() for module in names]
    plan = QuantizationPlan(recipe, None, frozenset(modules), ignored=tuple(ignored), declined=declined)
    return _with_head(plan, tensors, model, weights, head_bits)


def _linear_weights(model: nn.Module) -> set[str]:
    """Returns our names of the matrices of linear layers and experts, without those of heads and routers."""
    small = {id(module.linear) for module in model.modules() if isinstance(module, Router)}
    small |= {id(module.shared_gate) for module in model.modules() if isinstance(module, ExpertMLP)}
    found = set()
    for path, module in model.named_modules():
        is_router = id(module) in small or path.rpartition(".")[2] in ROUTERS
        if isinstance(module, LinearBase | Experts) and not is_router and path not in (HEAD, "score"):
            found |= {f"{path}.{name}" for name, _ in module.slots() if name.endswith("weight")}
    return found


def our_names(weights: WeightMap, name: str) -> list[str]:
    """Returns our names of a checkpoint's tensor; none if the tensor is ignored or unknown."""
    try:
        return weights.all_ours(name)
    except KeyError:
        return []


def _first_items(names: Iterable[str]) -> list[str]:
    """Returns our names of the parts of the first item, where a tensor is a stack."""
    return [name.replace("*", "0") for name in names]


def _reason(name: str, tensor: StoredTensor, weights: WeightMap) -> str:
    """Returns why the matrix of a linear layer cannot be quantised; empty if it can."""
    layout = weights.layout(name)
    if layout is not None and layout.stacked:
        return "are experts in one stacked tensor"
    if layout is not None and layout.transposed:
        return "are stored transposed"
    if len(tensor.shape) != 2 or not name.endswith(WEIGHT):
        return "have no matrix called 'weight'"
    return ""


def _with_group_size(recipe: Recipe, widths: Mapping[str, int]) -> tuple[Recipe, list[str]]:
    """Returns the scheme with a group size, and the names of the layers that it does not divide."""
    grid = recipe.grid
    if grid.group_size is None:
        return recipe, []
    smallest = GROUP_SIZES[-1]
    common = math.gcd(*(width for width in widths.values() if width % smallest == 0))
    size = grid.group_size or next(size for size in GROUP_SIZES if common % size == 0)
    odd = [name for name, width in widths.items() if width % size]
    return replace(recipe, grid=replace(grid, group_size=size)), odd


def _with_head(
    plan: QuantizationPlan,
    tensors: Mapping[str, StoredTensor],
    model: Decoder,
    weights: WeightMap,
    bits: int | None,
) -> QuantizationPlan:
    """Returns a plan that quantises the head, or ignores it by name, also where it is tied to the embedding."""
    own = [name for name in tensors if our_names(weights, name) == [HEAD + WEIGHT]]
    tied = [name for name in tensors if our_names(weights, name) == ["embed_tokens" + WEIGHT]]
    head = (own or [weights.theirs(HEAD + WEIGHT)])[0].removesuffix(WEIGHT)
    others = tuple(module for module in plan.ignored if module != head)
    if bits is None:
        return replace(plan, ignored=(*others, head))
    source = (own or tied or [""])[0]
    if not hasattr(model, HEAD) or not source or weights.layout(source) is not None:
        raise ConfigError("this model has no output head that can be quantised; leave the bits of the head out")
    width, size = tensors[source].shape[1], plan.recipe.grid.group_size or GROUP_SIZES[-1]
    if bits == 4 and width % size:
        raise ConfigError(
            f"the output head has {width} columns, which groups of {size} do not divide; use 8 bits for it"
        )
    grid = Grid(bits, size if bits == 4 else None)
    return replace(plan, head_grid=grid, head=head, untied_from=None if own else source, ignored=others)
