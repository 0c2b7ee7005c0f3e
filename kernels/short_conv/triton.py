"""The causal convolution over the last few tokens of a sequence on the GPU, in Triton.

    out[t] = silu(bias + sum over j of weight[:, width - 1 - j] · x[t - j])

Grid: (sequences, blocks of channels). A program goes through all tokens of its sequence in tiles, and then writes the
last inputs to the state, whose row it alone reads and writes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor, empty

from .._triton import MAX_PLANS, Launch, Layout, Specialisation, Target, current_target, varying
from .op import short_conv

_TOKENS, _CHANNELS, _NUM_THREADS = 16, 64, 128
_WIDTHS = (2, 3, 4)


@short_conv.register("cuda")
def short_conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Runs `short_conv` in one kernel.

    Raises:
        ValueError: The width is not 2, 3 or 4, or the shapes of x, weight and state do not match.
    """
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    layouts = Layout.of(x), Layout.of(weight), Layout.of(state)
    launch = _plan(layouts, bias is not None, len(rows), current_target())
    if len(x):
        launch.run(x, weight, weight if bias is None else bias, state, rows, query_start_loc, seq_lens, out)
    return out


@functools.lru_cache(MAX_PLANS)
def _plan(layouts: tuple[Layout, Layout, Layout], has_bias: bool, num_seqs: int, target: Target) -> Launch:
    x, weight, state = layouts
    channels, width = weight.shape
    fits = x.shape[1] == channels and state.shape[1:] == (width - 1, channels)
    inner = (x.strides[1], weight.strides[1], state.strides[2], state.strides[1])
    if width not in _WIDTHS or not fits or inner != (1, 1, 1, channels):
        raise ValueError(
            f"short_conv: x is {list(x.shape)}, weight {list(weight.shape)} and state {list(state.shape)}; the width "
            f"of weight must be one of {_WIDTHS}, and state must be [num_rows, width - 1, channels], contiguous"
        )
    options = {"HAS_BIAS": has_bias, "WIDTH": width, **_tile(target)}
    grid = (num_seqs, triton.cdiv(channels, _CHANNELS))
    return Launch(short_conv_kernel, grid, (x.strides[0], channels), options)


def _tile(target: Target) -> dict[str, int]:
    return {"TOKENS": _TOKENS, "CHANNELS": _CHANNELS, "num_warps": _NUM_THREADS // target.warp_size}


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target."""
    tensors = ("x_ptr", "weight_ptr", "bias_ptr", "state_ptr", "out_ptr")
    for dtype in ("fp32", "fp16", "bf16"):
        types = dict.fromkeys(tensors, f"*{dtype}")
        types |= dict.fromkeys(("rows_ptr", "start_ptr", "length_ptr"), "*i32")
        types |= dict.fromkeys(("x_stride", "channels"), "i32")
        for width in _WIDTHS:
            for has_bias in (False, True):
                tile = _tile(target)
                options = {"num_warps": tile.pop("num_warps")}
                constants = {"HAS_BIAS": has_bias, "WIDTH": width, **tile}
                yield Specialisation(short_conv_kernel, types, constants, options, ("x_stride", "channels"))


@triton.jit(**varying(pointers=["x_ptr", "rows_ptr", "start_ptr", "length_ptr"]))
def short_conv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    rows_ptr,
    start_ptr,
    length_ptr,
    out_ptr,
    x_stride,
    channels,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
):
    """Convolves CHANNELS channels of sequence `program_id(0)`, and updates its state."""
    sequence = tl.program_id(0)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    is_channel = channel < channels
    first, end = tl.load(start_ptr + sequence), tl.load(start_ptr + sequence + 1)
    count, row = end - first, tl.load(rows_ptr + sequence)
    # A condition on a sequence becomes a limit on its channels.
    num_old = tl.where((row >= 0) & (tl.load(length_ptr + sequence) > count), channels, 0)
    x_ptr += first.to(tl.int64) * x_stride
    out_ptr += first.to(tl.int64) * channels
    state_ptr += row.to(tl.int64) * (WIDTH - 1) * channels
    for begin in range(0, count, TOKENS):
        token = (begin + tl.arange(0, TOKENS))[:, None]
        total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
        if HAS_BIAS:
            total += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        for j in tl.static_range(WIDTH):
            factor = tl.load(weight_ptr + channel * WIDTH + WIDTH - 1 - j, mask=is_channel, other=0.0)
            at = tl.where(token < count, token - j, -WIDTH)  # no input of either kind for tokens of another sequence
            total += factor.to(tl.float32) * _inputs(x_ptr, state_ptr, at, channel, x_stride, channels, num_old, WIDTH)
        out = total / (1.0 + tl.exp(-total))
        inside = (token < count) & is_channel
        tl.store(out_ptr + token.to(tl.int64) * channels + channel, out.to(out_ptr.dtype.element_ty), mask=inside)
    slot = tl.arange(0, 4)[:, None]
    at = tl.where(slot < WIDTH - 1, count - (WIDTH - 1) + slot, -WIDTH)
    last = _inputs(x_ptr, state_ptr, at, channel, x_stride, channels, num_old, WIDTH)
    tl.debug_barrier()  # every thread has read the old state
    is_kept = (slot < WIDTH - 1) & (channel < tl.where(row >= 0, channels, 0))
    tl.store(state_ptr + slot * channels + channel, last.to(state_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def _inputs(x_ptr, state_ptr, at, channel, x_stride, channels, num_old, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns inputs at offsets from the first token of the step: from the state if negative, zeros before that."""
    now = tl.load(x_ptr + at.to(tl.int64) * x_stride + channel, mask=(at >= 0) & (channel < channels), other=0.0)
    is_old = (at < 0) & (at > -WIDTH) & (channel < num_old)
    before = tl.load(state_ptr + (WIDTH - 1 + at) * channels + channel, mask=is_old, other=0.0)
    return (now + before).to(tl.float32)
