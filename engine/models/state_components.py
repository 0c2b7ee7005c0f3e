"""`make_state_mixer`: makes the layer that keeps states, as the `StateSpec` of a model asks for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import ConfigError
from ..layers import GatedDelta, GatedNorm, LinearBase, Mamba2, NormAndGate, ShortConv, StateHeads, StateMixer
from ..parallel.context import ParallelContext
from .linear_factory import LinearFactory
from .options import ModelOptions
from .spec import DecoderSpec

__all__ = ["make_state_mixer"]


def make_state_mixer(
    name: str,
    spec: DecoderSpec,
    linears: LinearFactory,
    make_summed: Callable[..., LinearBase],
    parallel: ParallelContext,
    options: ModelOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> StateMixer:
    """Makes a layer that keeps states.

    Args:
        name: Path of the layer in the model.
        spec: Description of the decoder.
        linears: Factory of the linear layers.
        make_summed: Makes a linear layer of partial results from a name, input size, output size and `bias`.
        parallel: The place of this rank among all ranks.
        options: The user's options for the model.
        dtype: Number type of the parameters.
        device: Device of the parameters.

    Raises:
        ConfigError: An option cannot be combined with states.
    """
    state = spec.state
    assert state is not None
    if options.deterministic:
        raise ConfigError(
            "deterministic=True is not supported for models with states: they are computed in chunks, which depend on "
            "the other rows of a step; leave it out"
        )
    heads, groups = parallel.shard(state.num_heads), parallel.kv_shard(state.num_groups)
    sizes = StateHeads(heads, state.head_dim, groups, state.state_size)
    inner, vectors = sizes.inner, sizes.vectors
    if state.rule == "mamba2":
        channels = {"x": inner, "b": vectors, "c": vectors}
        parts = {"gate": inner, **channels, "dt": heads}
    else:
        channels = {"query": vectors, "key": vectors, "value": inner}
        parts = {**channels, "gate": inner, "beta": heads, "decay": heads}
    in_proj = linears.make_linear(f"{name}.in_proj", spec.hidden_size, parts, bias=state.bias)
    conv = ShortConv(channels, state.conv_width, bias=state.conv_bias, dtype=dtype, device=device)
    out_proj = make_summed(f"{name}.out_proj", inner, spec.hidden_size, bias=state.bias)
    if state.rule == "gated_delta":
        norm = NormAndGate(state.head_dim, eps=spec.norm_eps, dtype=dtype, device=device)
        return GatedDelta(sizes, in_proj=in_proj, conv=conv, norm=norm, out_proj=out_proj, device=device)
    gated = GatedNorm(inner, groups, eps=spec.norm_eps, dtype=dtype, device=device, reduce=parallel.all_reduce)
    return Mamba2(sizes, in_proj=in_proj, conv=conv, norm=gated, out_proj=out_proj, device=device)
