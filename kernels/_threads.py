"""Splitting one kernel call over CPU threads.

For compiled kernels that release the interpreter lock. numba's own parallel loops are not used: which threading layer
they get depends on what is installed, the default one may not be entered from two Python threads at once, and OpenMP's
dies after a fork. Measured on two cores, a split costs about 50 µs, so callers keep small work on their own thread.
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

    The calling thread works too, so `torch.set_num_threads(1)` means that no other thread is touched. Any number of
    Python threads may call `run` at once: the workers never wait for each other.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        # A forked child has none of its parent's threads, though the pool in its memory believes so.
        os.register_at_fork(after_in_child=self._forget_pool)

    def run(self, kernel: Callable[..., None], num_items: int, *args: Any) -> None:
        """Covers `range(num_items)` by calls of the kernel, and returns when all are done.

        Args:
            kernel: Handles items `first` to `last - 1`; it must release the interpreter lock to gain anything.
            num_items: The length of the range. Items may differ in cost: parts go to whoever is free.
            args: Passed on as they are.
        """
        num_threads = min(torch.get_num_threads(), num_items)
        if num_threads <= 1:
            kernel(0, num_items, *args)
            return
        part = -(-num_items // (num_threads * _PARTS_PER_THREAD))
        starts = iter(range(0, num_items, part))  # shared: taking the next one is atomic
        if self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="millrace-kernels")
        submit = self._pool.submit
        helpers = [submit(_work, kernel, starts, part, num_items, args) for _ in range(num_threads - 1)]
        _work(kernel, starts, part, num_items, args)
        for helper in helpers:
            # One that has not begun by now has nothing left to do.
            if not helper.cancel():
                helper.result()

    def _forget_pool(self) -> None:
        self._pool = None


team = ThreadTeam()


def _work(kernel: Callable[..., None], starts: Iterator[int], part: int, num_items: int, args: tuple[Any, ...]) -> None:
    for first in starts:
        kernel(first, min(first + part, num_items), *args)
