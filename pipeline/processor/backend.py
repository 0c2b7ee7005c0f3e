"""`Backend`: the part of a processor that answers rows: an engine, an HTTP endpoint or a Ray Serve deployment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ...actors import PoolStats
from .operators import MakeStages
from .resources import OperatorResources
from .stage_spec import StageInfo


class Backend(ABC):
    """The part of a processor that answers rows: the stage that waits for answers, and the engines behind the stage.

    A backend has an operator of its own, which works on many blocks at once. The backend of a server starts no engines.

    Args:
        info: Name, settings and columns of the stage.
        resources: Resources of the operator, as arguments of `Dataset.map_batches`.
        batch_size: Number of rows up to which small blocks are joined; None for the processor's `batch_size`.
    """

    def __init__(self, info: StageInfo, resources: OperatorResources, batch_size: int | None = None) -> None:
        self.info = info
        self.resources = resources
        self.batch_size = batch_size

    @abstractmethod
    def start(self, operators: Sequence[OperatorResources]) -> MakeStages:
        """Starts the engines or checks the server, without waiting for a model, and returns the maker of the stage.

        Args:
            operators: Resources of each operator of the processor, the operator of this backend included.

        Returns:
            The function that makes the stages of the backend, in the worker.

        Raises:
            ConfigError: The cluster has no room for the job, or the server does not exist.
        """

    def stats(self) -> PoolStats | None:
        """Returns the state and counters of the engines; None for a backend without engines."""
        return None

    def wait_ready(self, timeout_s: float | None = None) -> None:  # noqa: B027  # most backends have nothing to load
        """Waits until the backend can answer rows; returns at once if the backend loads no model.

        Args:
            timeout_s: Most seconds to wait.
        """

    def close(self) -> None:  # noqa: B027  # most backends have started nothing
        """Ends the engines that `start` has started. A second call does nothing."""
