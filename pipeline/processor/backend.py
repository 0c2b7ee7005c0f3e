"""What answers the rows of a processor: engines, an HTTP endpoint, a deployment of Ray Serve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.data import DataContext

from ...actors import PoolStats
from ...engine.errors import ConfigError
from .operators import MakeStages
from .stage_plan import StageInfo

CHECKPOINT_CPUS = 1.0
"""CPUs of the operator that Ray Data puts behind the reader to leave out rows that are done."""

OperatorKwargs = Mapping[str, Any]
"""How an operator runs: arguments of `Dataset.map_batches`, `num_cpus` and `compute` among them."""


class Backend(ABC):
    """The stage in the middle of a processor, which waits for someone else, and the life of who is waited for.

    It gets an operator of its own, in which many blocks are under way at once.

    Args:
        info: Name, settings and columns of the stage.
        kwargs: How its operator runs.
        batch_size: Rows that small blocks are gathered into; None for the processor's `batch_size`.
    """

    def __init__(self, info: StageInfo, kwargs: OperatorKwargs, batch_size: int | None = None) -> None:
        self.info = info
        self.kwargs = kwargs
        self.batch_size = batch_size

    @abstractmethod
    def start(self, operators: Sequence[OperatorKwargs]) -> MakeStages:
        """Starts what the stage needs, where it does not run yet, and returns without waiting for it.

        Args:
            operators: How each operator of the processor runs, this one's included.

        Returns:
            What makes the stage, in the worker.

        Raises:
            ConfigError: The cluster has no room for the job, or what the stage needs is not there.
        """

    def stats(self) -> PoolStats | None:
        """Describes the engines; None where there are none."""
        return None

    def wait_ready(self, timeout_s: float | None = None) -> None:  # noqa: B027  # nothing to wait for, by default
        """Waits until a row could be answered.

        Args:
            timeout_s: Seconds to wait at most.
        """

    def close(self) -> None:  # noqa: B027  # nothing to end, by default
        """Ends what `start` started. A second call does nothing."""


def held_cpus(operators: Sequence[OperatorKwargs]) -> float:
    """Returns the CPUs that are held while a job runs, by our operators and by the filter of Ray Data's checkpoints.

    Args:
        operators: How they run.
    """
    held = float(sum(kwargs["num_cpus"] * kwargs["compute"].max_size for kwargs in operators))
    resumes = DataContext.get_current().checkpoint_config is not None
    return held + (CHECKPOINT_CPUS if resumes else 0.0)


def check_room(operators: Sequence[OperatorKwargs]) -> None:
    """Checks that a read task, which takes a whole CPU, can run beside the operators.

    Args:
        operators: How they run.

    Raises:
        ConfigError: There is none, so the job would wait forever.
    """
    held, have = held_cpus(operators), ray.cluster_resources().get("CPU", 0.0)
    if held and have - held < 1 - 1e-6:  # Whoever holds nothing waits for nobody, and a cluster may still grow.
        raise ConfigError(
            f"the operators of the job hold {held:g} of the cluster's {have:g} CPUs and leave less than a whole one to "
            "read with: the job would wait forever; lower num_cpus or concurrency of the stages and functions"
        )
