"""Compiling the Triton kernels of a step ahead of their first launch, in threads.

A kernel takes a second or more to compile, mostly in code that does not hold Python's lock. A step on the meta device
launches what the same step launches on the GPU, but no tensor has memory there: `launch` only compiles. So no list of
kernels is written down, and none can be forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["compile_launches"]

logger = logging.getLogger(__name__)


def compile_launches(run: Callable[[], None], num_threads: int, enter_thread: Callable[[], None]) -> int:
    """Compiles every kernel that a function launches, in threads, and keeps it where its first launch finds it.

    Args:
        run: The function; it calls ops with tensors on the meta device.
        num_threads: Number of threads.
        enter_thread: Called first in each thread; it makes the GPU current that the kernels are compiled for.

    Returns:
        The number of kernels. One that could not be compiled is counted too; a warning was logged about the first one,
        and its first launch compiles it again.
    """
    from triton import AsyncCompileMode

    with _Compilers(num_threads, initializer=enter_thread) as compilers, AsyncCompileMode(compilers):
        run()
    return compilers.num_kernels


class _Compilers(ThreadPoolExecutor):
    """Threads for `AsyncCompileMode`, in which a compilation that fails returns None.

    Triton stores the result in the cache of the kernel, where None stands for a form that is not compiled yet.
    """

    num_kernels = 0
    num_failures = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queues a compilation."""
        self.num_kernels += 1
        return super().submit(self._try, fn)

    def _try(self, compile_form: Callable[[], Any]) -> Any:
        try:
            return compile_form()
        except Exception as error:  # noqa: BLE001  # The first launch compiles the form again, and raises if it must.
            self.num_failures += 1
            if self.num_failures == 1:
                logger.warning("a kernel could not be compiled ahead: %s: %s", type(error).__name__, error)
            return None
