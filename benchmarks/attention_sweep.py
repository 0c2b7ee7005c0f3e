"""Times the attention kernels with other tiles, stages and splits than those they choose, and a library beside them.

    python benchmarks/attention_sweep.py [--device cuda]

One JSON line per case and variant, for kernels/paged_attention/_configs.py. The variants of a case take turns, so that
a change of the clock affects all. Every variant is compared with the result of the kernel as it is, and one that does
not compile, does not fit or differs says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernel_cases import FP8, GPU, TINY, Call, Case, Cases, Sizes
from kernels import num_sets, rate
from limits import Limits, measure_limits
from millrace.kernels.paged_attention import PromptLibrary, paged_attention
from timing import time_calls

LAUNCHER = "millrace.kernels.paged_attention._plan"
REPEATS = 9
TOLERANCE = 3e-2
"""Relative and absolute difference of two correct results in bfloat16."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A change of what the launcher chooses.

    Attributes:
        name: A few words.
        tile: (block_m, block_n, num_warps, num_stages) of the kernel that the case times; None for its own. A field
            that is None stays as it is.
        num_splits: Splits of the prefix; None for its own.
        function: Another function with the arguments of the op; None for the op.
    """

    name: str
    tile: tuple[int | None, ...] | None = None
    num_splits: int | None = None
    function: Callable[..., Tensor] | None = None


OWN = Variant("own choice")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A call and its variants.

    Attributes:
        case: The call.
        config: The function of the launcher whose result the tiles replace.
        variants: The variants, besides the launcher's own choice.
        lengths: Lengths of the prompts of a case that has no decodes.
    """

    case: Case
    config: str
    variants: Sequence[Variant]
    lengths: Sequence[int] = field(default_factory=list)


def sweeps(sizes: Sizes, device: torch.device) -> Iterator[Sweep]:
    """Yields decode steps in 16 and 8 bits, prompts, and decode steps with a shared prefix."""
    cases = Cases(sizes, torch.bfloat16, device)
    count, length = sizes.decodes
    long_count, long_length = sizes.long_decodes
    decodes = ((count, length), (max(1, count // 4), length), (long_count, long_length))
    for cache_dtype, variants in ((torch.bfloat16, DECODE), (FP8, DECODE_FP8)):
        for num_seqs, seq_len in decodes:
            name = f"decode {num_seqs} x {seq_len}{', fp8 cache' if cache_dtype == FP8 else ''}"
            case = cases.attend(name, [(seq_len, 1)] * num_seqs, cache_dtype=cache_dtype)
            yield Sweep(case, "decode_config", variants)
    for num_prompts, prompt in ((8, sizes.prompt // 8), (1, sizes.prompt)):
        lengths = [prompt] * num_prompts
        case = cases.attend(f"{num_prompts} prompts of {prompt}", [(n, n) for n in lengths])
        yield Sweep(case, "prefill_config", PREFILL, lengths)
    shared = length * 7 // 8 // 16
    case = cases.attend(f"decode {count} x {length}, {shared * 16} shared", [(length, 1)] * count, num_shared=shared)
    yield Sweep(case, "decode_config", PREFIX)


DECODE = (
    Variant("5 stages", (None, None, None, 5)),
    Variant("16 x 32", (16, 32, 4, 3)),
    Variant("16 x 32, 5 stages", (16, 32, 4, 5)),
    Variant("16 x 128", (16, 128, 4, 3)),
)
DECODE_FP8 = (
    Variant("5 stages", (None, None, None, 5)),
    Variant("16 x 64, 4 warps", (16, 64, 4, 3)),
    Variant("16 x 128, 4 warps", (16, 128, 4, 3)),
    Variant("16 x 128, 4 warps, 5 stages", (16, 128, 4, 5)),
)
PREFILL = (
    Variant("128 x 64, 5 stages", (128, 64, 8, 5)),
    Variant("128 x 64, 2 stages", (128, 64, 8, 2)),
    Variant("128 x 128", (128, 128, 8, 3)),
    Variant("64 x 64, 4 warps", (64, 64, 4, 3)),
)
PREFIX = tuple(Variant(f"prefix in {n}", num_splits=n) for n in (1, 2, 4, 17))


@contextlib.contextmanager
def chosen(sweep: Sweep, variant: Variant) -> Iterator[None]:
    """Makes the launcher choose what a variant says."""
    if variant.function is not None or variant == OWN:
        yield
        return
    launcher = importlib.import_module(LAUNCHER)
    changed: dict[str, Any] = {}
    if variant.tile is not None:
        changed[sweep.config] = partial(_choose, getattr(launcher, sweep.config), variant.tile)
    if variant.num_splits is not None:
        changed["num_splits"] = partial(_split, launcher.num_splits, variant.num_splits)
    launcher.plan_launches.cache_clear()  # It keeps what the launcher chose before.
    with patch.multiple(launcher, **changed):
        yield
    launcher.plan_launches.cache_clear()


def _choose(own: Callable[..., Any], tile: Sequence[int | None], *args: Any, **kwargs: Any) -> Any:
    config = own(*args, **kwargs)
    current = (config.block_m, config.block_n, config.num_warps, config.num_stages)
    return type(config)(*(mine if new is None else new for mine, new in zip(current, tile, strict=True)))


def _split(own: Callable[..., int], wanted: int, *args: Any, **kwargs: Any) -> int:
    """Returns `wanted` for the prefix kernel, the only one that names its number of programs a multiprocessor."""
    return wanted if "programs_per_processor" in kwargs else own(*args, **kwargs)


def flash(lengths: Sequence[int], device: torch.device) -> Callable[..., Tensor]:
    """Returns the library of engines (`PromptLibrary`), with the arguments of the op; it gathers keys and values."""
    prompts = PromptLibrary(torch.ops.aten._flash_attention_forward)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    kept: dict[int, Tensor] = {}

    def attend(query: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, *rest: Any, **_hints: Any) -> Tensor:
        if k_cache.data_ptr() not in kept:  # An engine has the slots at hand.
            kept[k_cache.data_ptr()] = _slots(tables, lengths, k_cache.shape[2])
        slots = kept[k_cache.data_ptr()]
        out = prompts.attend(query, (k_cache, v_cache), slots, starts, max(lengths), rest[2])
        if out is None:
            raise RuntimeError("the library failed")
        return out

    return attend


def _slots(tables: Tensor, lengths: Sequence[int], block_size: int) -> Tensor:
    """Returns the slot of each token of all sequences."""
    offsets = torch.arange(block_size, device=tables.device)
    slots = tables.long()[:, :, None] * block_size + offsets
    return torch.cat([row.flatten()[:length] for row, length in zip(slots, lengths, strict=True)])


def cudnn(lengths: Sequence[int], device: torch.device) -> Callable[..., Tensor]:
    """Returns cuDNN's attention over prompts without cached context, with the arguments of the op.

    Keys and values are those of the queries' own tokens: in a prompt without context they are at hand, contiguous.
    """
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    longest, total = max(lengths), sum(lengths)
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(query: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, *rest: Any, **_hints: Any) -> Tensor:
        if k_cache.data_ptr() not in kept:  # outside of what is timed: the first call is a warm-up
            kept[k_cache.data_ptr()] = _contiguous(k_cache, tables, lengths), _contiguous(v_cache, tables, lengths)
        keys, values = kept[k_cache.data_ptr()]
        out = torch.ops.aten._cudnn_attention_forward(
            query.contiguous(), keys, values, None, offsets, offsets, longest, longest, False, 0.0, True, False,
            scale=rest[2],
        )[0]  # fmt: skip
        return out.view(total, *query.shape[1:])

    return attend


def _contiguous(cache: Tensor, tables: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns the keys or values of all sequences, `[num_tokens, num_kv_heads, head_dim]`."""
    parts = []
    for table, length in zip(tables, lengths, strict=True):
        blocks = cache[table[: -(-length // cache.shape[2])].long()]
        parts.append(blocks.transpose(1, 2).flatten(0, 1)[:length])
    return torch.cat(parts)


def run(sweep: Sweep, limits: Limits, device: torch.device, end: float) -> Iterator[dict[str, Any]]:
    """Yields the line of each variant of a case; those that would be compiled after `end` are skipped."""
    calls = [sweep.case.make()]
    calls += [sweep.case.make() for _ in range(num_sets(calls[0].args, device) - 1)]
    expected = paged_attention(*calls[0].args, **calls[0].kwargs)
    variants = [OWN, *(sweep.variants if device.type == "cuda" else ())]
    if sweep.lengths and device.type == "cuda":
        variants.append(Variant("cuDNN", function=cudnn(sweep.lengths, device)))
        variants.append(Variant("FlashAttention of torch", function=flash(sweep.lengths, device)))
    line = {"benchmark": "attention_sweep", "case": sweep.case.name}
    timed: dict[str, list[Callable[[], Tensor]]] = {}
    for variant in variants:
        if time.monotonic() > end:
            yield line | {"variant": variant.name, "skipped": "no time is left"}
            continue
        bound: list[Callable[[], Tensor]] = [partial(call_variant, sweep, variant, call) for call in calls]
        try:
            torch.testing.assert_close(bound[0](), expected, rtol=TOLERANCE, atol=TOLERANCE)
        except Exception as error:  # noqa: BLE001 - a variant may not compile or not fit, and the others run
            yield line | {"variant": variant.name, "failed": f"{type(error).__name__}: {error}"[:300]}
        else:
            timed[variant.name] = bound
    for name, seconds in time_calls(timed, device, REPEATS).items():
        median = statistics.median(seconds)
        yield line | {"variant": name, "us": round(median * 1e6, 2), **rate(sweep.case, limits, median)}
    if device.type != "cuda":
        yield line | {"variant": "other tiles and splits", "skipped": "they are of the kernels for a GPU"}


def call_variant(sweep: Sweep, variant: Variant, call: Call) -> Tensor:
    """Runs a variant once. On a GPU it is then replayed, without the time of this function."""
    with chosen(sweep, variant):
        return (variant.function or paged_attention)(*call.args, **call.kwargs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    parser.add_argument("--time-limit", type=float, default=75, metavar="SECONDS", help="no variant begins later")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main() -> None:
    """Prints a line per case and variant."""
    options = parse()
    torch.manual_seed(0)
    device, end = torch.device(options.device), time.monotonic() + options.time_limit
    limits = measure_limits(device, is_tiny=options.tiny)
    for sweep in sweeps(TINY if options.tiny else GPU, device):
        for line in run(sweep, limits, device, end):
            print(json.dumps(line), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
