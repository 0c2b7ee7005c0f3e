"""The backend of a processor: the engine, HTTP endpoint or deployment of Ray Serve that answers its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ...actors import PoolStats
from .operators import MakeStages
from .resources import OperatorResources
from .stage_spec import StageInfo


class Backend(ABC):
    """The stage in the middle of a processor, which waits for answers, and the life of what gives the answers.

    A backend has an operator of its own, in which many blocks are under way at once.

    Args:
        info: Name, settings and columns of the stage.
        resources: What its operator takes.
        batch_size: Rows that small blocks are joined into; None for the processor's `batch_size`.
    """

    def __init__(self, info: StageInfo, resources: OperatorResources, batch_size: int | None = None) -> None:
        self.info = info
        self.resources = resources
        self.batch_size = batch_size

    @abstractmethod
    def start(self, operators: Sequence[OperatorResources]) -> MakeStages:
        """Starts what the stage needs, if it does not run yet, and returns without waiting for it.

        Args:
            operators: What each operator of the processor takes, this backend's included.

        Returns:
            The function that makes the stage, in the worker.

        Raises:
            ConfigError: The cluster has no room for the job, or the server is not there.
        """

    def stats(self) -> PoolStats | None:
        """Describes the engines; None where there are none."""
        return None

    def wait_ready(self, timeout_s: float | None = None) -> None:  # noqa: B027  # most backends have nothing to load
        """Waits until a row could be answered.

        Args:
            timeout_s: Most seconds to wait.
        """

    def close(self) -> None:  # noqa: B027  # most backends have started nothing
        """Ends what `start` started. A second call does nothing."""
