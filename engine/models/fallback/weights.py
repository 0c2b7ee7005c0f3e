"""`ModuleWeights`: the names of a transformers module's weights in checkpoints, and the memory that each tensor fills.

transformers converts some checkpoints while it loads them: it renames tensors, or joins several to one parameter, such
as the matrices of all experts. It also has the reverse of each conversion. We run the reverse on the parameter itself,
so that it yields views of the parameter, one for each tensor of the checkpoint: the weight slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedModelError
from ...layers import WeightSlot
from ...weights.checkpoint import WeightMap
from ...weights.model_slots import weight_slots

__all__ = ["ModuleWeights", "declare_slots"]


class _ViewsOnly(TorchFunctionMode):
    """Keeps tensors from being copied for their layout in this thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if getattr(func, "__name__", "") == "contiguous" else func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class ModuleWeights(WeightMap):
    """Maps the names of tensors in checkpoints to the names of weights in a module of transformers.

    Attributes:
        names: Names of the weights as checkpoints have them, after renaming.
        renamings: The renamings of transformers, in order; each has a method `rename_source_key`.
        base_prefix: Prefix of the names of the module's body, with the dot; tensors of a body alone lack it.
        ignored_patterns: Patterns of the names of tensors that are not loaded.
    """

    names: frozenset[str] = frozenset()
    renamings: tuple[Any, ...] = ()
    base_prefix: str = ""
    ignored_patterns: tuple[re.Pattern[str], ...] = field(default=())

    def all_ours(self, name: str) -> list[str]:
        """As `WeightMap.all_ours`; a name that the module does not have is returned as it is."""
        renamed = name
        for renaming in self.renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for spelling in (renamed, self.base_prefix + renamed, renamed.removeprefix(self.base_prefix), name):
            if spelling in self.names:
                return [spelling]
        return [] if any(pattern.search(renamed) for pattern in self.ignored_patterns) else [renamed]

    def theirs(self, name: str, forms: Collection[str] = ()) -> str:
        """As `WeightMap.theirs`: the name in the module."""
        return name

    @classmethod
    def of(cls, module: Any, body: nn.Module) -> ModuleWeights:
        """Returns the names of a module's weights.

        Args:
            module: The module, after `declare_slots`.
            body: The module without its head.
        """
        from transformers.core_model_loading import WeightRenaming

        ignored = [re.escape(name) for name in _computed_buffers(module)]
        ignored += list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
        return cls(
            prefixes=(),
            modules={},
            names=frozenset(weight_slots(module)),
            renamings=tuple(one for one in _conversions(module) if isinstance(one, WeightRenaming)),
            base_prefix="" if body is module else f"{module.base_model_prefix}.",
            ignored_patterns=tuple(map(re.compile, [*ignored, r"rotary_emb\.inv_freq$"])),
        )


def declare_slots(module: Any) -> None:
    """Gives each part of a module whose parameters are joined from several tensors a method `slots` with all of them.

    Raises:
        UnsupportedModelError: A conversion copies numbers to other places, which no weight slot can express.
    """
    from transformers.core_model_loading import WeightConverter

    converters = [one.reverse_transform() for one in _conversions(module) if isinstance(one, WeightConverter)]
    for path, part in module.named_modules():
        slots: dict[str, WeightSlot] = {}
        own = [(name, tensor) for name, tensor in part.named_parameters(recurse=False)]
        for name, tensor in own:
            full = f"{path}.{name}".lstrip(".")
            for source, view in _reversed(module, converters, full, tensor).items():
                slots[source.removeprefix(f"{path}.")] = WeightSlot((view,))
        if slots.keys() != {name for name, _ in own}:
            object.__setattr__(part, "slots", lambda slots=slots: iter(slots.items()))


def _reversed(module: Any, converters: Sequence[Any], name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of checkpoints that make up a parameter, as views of it, by their names after renaming."""
    for converter in converters:
        first, pattern = converter.rename_source_key(name)
        if pattern is None:
            continue
        converter.add_tensor(first, name, pattern, parameter)
        with _ViewsOnly():
            found = converter.convert(first, model=module, config=module.config)
        views = {source: view[0] if isinstance(view, list) else view for source, view in found.items()}
        if any(view.untyped_storage()._cdata != parameter.untyped_storage()._cdata for view in views.values()):
            raise UnsupportedModelError(
                f"{type(module).__name__}: {name} is loaded from {', '.join(list(views)[:3])} by a conversion that "
                "moves single numbers, which is not there; save the model once with save_pretrained of transformers "
                "in its new layout"
            )
        return views
    return {name: parameter}


def _conversions(module: Any) -> list[Any]:
    """Returns the conversions that transformers applies to checkpoints of a module: renamings first, then joins."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(module)


def _computed_buffers(module: nn.Module) -> Iterator[str]:
    for path, part in module.named_modules():
        for name in part._non_persistent_buffers_set:
            yield f"{path}.{name}".lstrip(".")
