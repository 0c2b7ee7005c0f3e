"""Errors that end a job, and `find_millrace_error`, which finds our errors inside the errors of Ray."""

from __future__ import annotations

from collections.abc import Iterator

from ..engine.errors import MillraceError

RAY_NOTE = "\nFailed to apply UDF transform after"
"""Beginning of the text that Ray Data appends to the message of a worker's exception."""


class RowFailedError(MillraceError):
    """A row failed, and the processor stops at the first failed row (`should_continue_on_error=False`)."""


class DeploymentError(MillraceError):
    """A deployment of Ray Serve died, is overloaded or cannot be reached. No row is at fault, so the job stops."""


def find_millrace_error(error: BaseException) -> MillraceError | None:
    """Returns the error of this package inside an error that Ray raised on the driver; None if there is none.

    Ray wraps an exception of a worker in its own (`RayTaskError`, `UserCodeException`), several layers deep, and keeps
    the original in `cause`, `__cause__` or `__context__`. Some wrappers also have the class of the error they wrap, and
    a whole traceback for a message; the search skips these wrappers.

    Args:
        error: The exception caught on the driver.

    Returns:
        The outermost error of this package that is not a wrapper, with its own message.
    """
    from ray.exceptions import RayError

    for one in _unwrap(error):
        if isinstance(one, MillraceError) and not isinstance(one, RayError):
            message, note, _ = str(one).partition(RAY_NOTE)
            return type(one)(message) if note else one
    return None


def find_cause(error: BaseException) -> BaseException:
    """Returns the exception of a worker inside the errors of Ray around it; an error of Ray if there is no other.

    Args:
        error: The exception caught on the driver.
    """
    from ray.exceptions import RayError

    found = list(_unwrap(error))
    return next((one for one in found if not isinstance(one, RayError)), found[-1])


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and every exception that it was raised from, each once, outermost first."""
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        links = (getattr(current, "cause", None), current.__cause__, current.__context__)
        waiting += [link for link in links if isinstance(link, BaseException)]
