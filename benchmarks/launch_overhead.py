"""The Python between the kernels of an eager step, with a launch plan a step and with one made anew in every layer.

A launcher chooses the grid, the tiles and the arguments of its kernel from the shapes of a call, and keeps the choice
(`Launch` in kernels/_triton.py), because all layers of a step make the same call. To choose in every layer, as the
launchers once did, the functions that plan are called without their caches. Both are timed in turns, on steps whose
numbers of tokens never repeat, so that the first layer of each step makes a plan in either case.

Kernels do nothing here, so no GPU is needed, and the time of Triton's own launch is not included.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from millrace.kernels._op import all_ops
from millrace.kernels._triton import TARGETS

NUM_SEQS, MAX_BLOCKS, BLOCK_SIZE, NUM_BLOCKS = 64, 40, 16, 64
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128
HIDDEN_SIZE, INTERMEDIATE_SIZE = 1024, 3072
"""Qwen3-0.6B, which has 28 layers."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher that each layer calls.

    Attributes:
        op: Name of the op.
        calls: Number of calls in a layer.
        module: The module in `kernels/` with the function that plans.
        plan: The name that the launcher calls this function by.
    """

    op: str
    calls: int
    module: str
    plan: str = "_plan"


LAUNCHERS = (
    Launcher("paged_attention", 1, "paged_attention.triton", "plan_launches"),
    Launcher("rope_and_store", 1, "rope_and_store.triton"),
    Launcher("rms_norm", 2, "rms_norm.triton"),
    Launcher("silu_and_mul", 1, "_gated"),
)


class Step:
    """The arguments of each launcher in one mixed step: 64 sequences that decode, and a chunk of a prompt.

    Args:
        chunk: Number of tokens of the chunk.
    """

    def __init__(self, chunk: int) -> None:
        num_tokens, num_seqs = NUM_SEQS + chunk, NUM_SEQS + 1
        self._hidden = _floats(num_tokens, HIDDEN_SIZE)
        self._gates = _floats(num_tokens, 2 * INTERMEDIATE_SIZE)
        heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        self._qkv = _floats(num_tokens, sum(heads), HEAD_DIM).split(heads, dim=1)
        self._caches = [_floats(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM) for _ in range(2)]
        self._tables = [torch.zeros(shape, dtype=torch.int32) for shape in ((num_seqs, MAX_BLOCKS), num_seqs)]
        self._starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
        self._places = [torch.zeros(num_tokens, dtype=torch.int64) for _ in range(2)]
        self._cos_sin = torch.zeros(BLOCK_SIZE, HEAD_DIM)
        self._weight, self._head_weight = _floats(HIDDEN_SIZE), _floats(HEAD_DIM)

    def arguments(self, op: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with which a layer calls an op."""
        query, key, value = self._qkv
        weights = {"q_weight": self._head_weight, "k_weight": self._head_weight, "eps": 1e-6}
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "paged_attention": (
                (query, *self._caches, *self._tables, self._starts, HEAD_DIM**-0.5),
                {"num_decodes": NUM_SEQS},
            ),
            "rope_and_store": ((query, key, value, *self._caches, *self._places, self._cos_sin), weights),
            "rms_norm": ((self._hidden, self._weight, 1e-6, self._hidden), {"add_unit_offset": False}),
            "silu_and_mul": ((self._gates,), {}),
        }
        return calls[op]


def _floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


@contextmanager
def without_gpu() -> Iterator[None]:
    """Makes launchers plan for an sm_90, and kernels do nothing."""
    target = functools.cache(lambda: TARGETS["sm_90"])
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", lambda *_args, **_options: None))
        for launcher in LAUNCHERS:
            stack.enter_context(patch.object(_module(launcher), "current_target", target))
        yield


@contextmanager
def planning_in_every_layer() -> Iterator[None]:
    """Makes launchers choose anew in each call."""
    with ExitStack() as stack:
        for launcher in LAUNCHERS:
            module = _module(launcher)
            planned = getattr(module, launcher.plan)
            stack.enter_context(patch.object(module, launcher.plan, planned.__wrapped__))
        yield


def _module(launcher: Launcher) -> Any:
    return importlib.import_module(f"millrace.kernels.{launcher.module}")


def time_step(step: Step, num_layers: int) -> list[float]:
    """Returns the milliseconds that each launcher takes in all layers of a step."""
    times_ms = []
    for launcher in LAUNCHERS:
        launch: Callable[..., Any] = all_ops()[launcher.op].implementations()["cuda"]
        args, kwargs = step.arguments(launcher.op)
        start = time.perf_counter()
        for _ in range(num_layers * launcher.calls):
            launch(*args, **kwargs)
        times_ms.append((time.perf_counter() - start) * 1e3)
    return times_ms


def measure(num_layers: int, num_steps: int) -> Iterator[dict[str, Any]]:
    """Yields the medians of each launcher over steps, and their sums, in milliseconds a step."""
    chunks = count(2)  # a chunk of one token would be a decode
    in_turns: dict[bool, list[list[float]]] = {False: [], True: []}
    with without_gpu():
        for _ in range(num_steps + 1):
            for is_anew, times_ms in in_turns.items():
                with planning_in_every_layer() if is_anew else ExitStack():
                    times_ms.append(time_step(Step(next(chunks)), num_layers))
    medians = {
        is_anew: [statistics.median(times) for times in zip(*times_ms[1:], strict=True)]
        for is_anew, times_ms in in_turns.items()
    }
    for index, launcher in enumerate(LAUNCHERS):
        yield _line(launcher.op, num_layers, medians[False][index], medians[True][index])
    yield _line("all of them", num_layers, sum(medians[False]), sum(medians[True]))


def _line(op: str, num_layers: int, once_ms: float, anew_ms: float) -> dict[str, Any]:
    return {
        "case": "host_overhead/launchers",
        "op": op,
        "layers": num_layers,
        "planned_once_ms": round(once_ms, 3),
        "planned_in_every_layer_ms": round(anew_ms, 3),
        "ratio": round(anew_ms / once_ms, 2),
    }
