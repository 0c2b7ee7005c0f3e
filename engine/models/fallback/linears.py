"""`replace_linears`: puts linear layers of ours in the place of those of a transformers module, whole or divided.

Ours have the quantization scheme, the fast layouts, and the shards of tensor parallelism. How the layers are divided
among ranks follows from the plan that the module brings along. The ranks of a `colwise` layer have some of its rows
(the name speaks of the transposed matrix) and go on with some of its outputs. Those of a `rowwise` layer take such
inputs, have the columns for them, and add their results up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import LinearBase
from ...parallel.context import ParallelContext
from ..linear_factory import LinearFactory

__all__ = ["replace_linears", "replace_tied", "tensor_plan"]

Forward = Callable[[Tensor], Tensor]

WHOLE = frozenset({"embedding_rowwise", "replicated_with_grad_allreduce"})
"""Styles of a plan whose results are the same on each rank, so that each may have the whole part."""

DIVIDED = frozenset({"colwise", "colwise_gather_output", "rowwise", "rowwise_split_input"})
"""Styles of linear layers that the ranks divide."""


def tensor_plan(module: Any, linears: frozenset[str], tp_size: int) -> dict[str, str]:
    """Returns how each divided linear layer of a module is divided, by its path; empty for one rank.

    Args:
        module: The module.
        linears: Paths of the linear layers that may be replaced.
        tp_size: Number of ranks.

    Raises:
        ConfigError: The module has no plan, or one that asks for more than we divide.
    """
    if tp_size == 1:
        return {}
    body, prefix = module.base_model, module.base_model_prefix
    inner = getattr(body.config.get_text_config(), "base_model_tp_plan", None) or {}
    named = {name if body is module else f"{prefix}.{name}": style for name, style in inner.items()}
    named |= dict(getattr(type(module), "_tp_plan", None) or {})
    paths = [path for path, _ in module.named_modules()] + [path for path, _ in module.named_parameters()]
    plan = {path: named[found] for path in paths if (found := re.sub(r"\b\d+\b", "*", path)) in named}
    odd = {path: style for path, style in plan.items() if style not in WHOLE and not _is_divided(path, style, linears)}
    if not inner or odd:
        why = "has no plan for it" if not inner else f"asks for {', '.join(f'{p}: {s}' for p, s in [*odd.items()][:2])}"
        raise ConfigError(
            f"tensor_parallel_size={tp_size}: {type(module).__name__} runs as a module of transformers, which {why}; "
            "use 1, or a model of a family that Millrace has"
        )
    return {path: style for path, style in plan.items() if style in DIVIDED}


def _is_divided(path: str, style: str, linears: frozenset[str]) -> bool:
    return style in DIVIDED and path in linears


def replace_linears(
    module: Any,
    names: frozenset[str],
    plan: Mapping[str, str],
    factory: LinearFactory,
    parallel: ParallelContext,
) -> None:
    """Puts linear layers of ours, without content, in the place of linear layers of a module.

    Args:
        module: The module.
        names: Paths of the layers.
        plan: How some of them are divided, see `tensor_plan`.
        factory: Makes the layers.
        parallel: The place of this rank among all ranks.
    """
    head = module.get_output_embeddings()
    for name in sorted(names):
        old, style = module.get_submodule(name), plan.get(name, "")
        columns = parallel.shard(old.in_features) if style.startswith("rowwise") else old.in_features
        rows = parallel.shard(old.out_features) if style.startswith("colwise") else old.out_features
        # The ranks add their results up, and the bias must be added once.
        bias = old.bias is not None and not (style.startswith("rowwise") and parallel.tp_rank)
        linear = factory.make_linear("lm_head" if old is head else name, columns, rows, bias=bias)
        _put(module, name, linear, _with_ranks(linear.forward, style, parallel, old.out_features))


def replace_tied(module: nn.Module, names: frozenset[str], factory: LinearFactory) -> None:
    """Puts linear layers of ours, which use the matrix of another layer, in the place of those of a module.

    Layers with a bias stay. The matrices must be in memory.

    Args:
        module: The module.
        names: Paths of the layers.
        factory: Makes the layers.
    """
    for name in sorted(names):
        old = module.get_submodule(name)
        assert isinstance(old, nn.Linear)
        if old.bias is None:
            linear = factory.make_tied(name, old.in_features, old.out_features, old.weight)
            _put(module, name, linear, linear.forward)


def _with_ranks(forward: Forward, style: str, parallel: ParallelContext, out_features: int) -> Forward:
    """Returns the forward function of a divided layer, from that of this rank's part of it."""
    if style == "colwise_gather_output":
        return lambda x: _gather(forward(x), parallel)[:, :out_features]
    if style == "rowwise":
        return lambda x: parallel.all_reduce(forward(x))
    if style == "rowwise_split_input":

        def split(x: Tensor) -> Tensor:
            own = parallel.shard(x.shape[1])
            return parallel.all_reduce(forward(x.narrow(1, own.start, own.length)))

        return split
    return forward


def _gather(columns: Tensor, parallel: ParallelContext) -> Tensor:
    """Joins the columns of all ranks; without connections, as in a trial, the result has only the right shape."""
    return parallel.all_gather(columns) if parallel.tensor is not None else torch.cat([columns] * parallel.tp_size, 1)


def _put(module: nn.Module, name: str, linear: LinearBase, forward: Forward) -> None:
    """Puts a linear layer in the place of one of a module; it takes inputs of any number of dimensions."""
    object.__setattr__(linear, "forward", lambda x: forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]))
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, linear)
