"""Splitting one kernel call over CPU threads, for compiled kernels that release the interpreter lock.

The parallel loops of numba are not used: their threading layer depends on the installed packages, the default layer
fails when two Python threads enter it at once, and the OpenMP layer fails after a fork. On two cores a split costs
about 50 µs, so callers run small calls on their own thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_PARTS_PER_THREAD = 4


class ThreadTeam:
    """Runs kernels of the form `kernel(first, last, *args)` over a range, on as many threads as torch uses.

    The calling thread works too, so with `torch.set_num_threads(1)` no other thread is used. Any number of Python
    threads may call `run` at once, because the workers never wait for each other.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        # A forked child has no thread of its parent, but a copy of the pool object that assumes them.
        os.register_at_fork(after_in_child=self._forget_pool)

    def run(self, kernel: Callable[..., None], num_items: int, *args: Any) -> None:
        """Covers `range(num_items)` by calls of the kernel, and returns when all of them are done.

        Args:
            kernel: Handles items `first` to `last - 1`. Threads help only if it releases the interpreter lock.
            num_items: The length of the range. Items may differ in cost: each thread takes the next part when it is
                free.
            args: Further arguments of the kernel.
        """
        num_threads = min(torch.get_num_threads(), num_items)
        if num_threads <= 1:
            kernel(0, num_items, *args)
            return
        part = -(-num_items // (num_threads * _PARTS_PER_THREAD))
        starts = iter(range(0, num_items, part))  # shared by the threads: taking the next start is atomic
        if self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="millrace-kernels")
        submit = self._pool.submit
        helpers = [submit(_work, kernel, starts, part, num_items, args) for _ in range(num_threads - 1)]
        _work(kernel, starts, part, num_items, args)
        for helper in helpers:
            # A helper that has not begun by now has no part left to compute.
            if not helper.cancel():
                helper.result()

    def _forget_pool(self) -> None:
        self._pool = None


team = ThreadTeam()


def _work(kernel: Callable[..., None], starts: Iterator[int], part: int, num_items: int, args: tuple[Any, ...]) -> None:
    for first in starts:
        kernel(first, min(first + part, num_items), *args)
