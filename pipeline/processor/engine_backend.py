"""`EngineBackend`: a pool of engines as the backend of a processor."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ...actors import EnginePool, PoolClient, PoolConfig, PoolStats, check_leaves_one_cpu
from ...engine.errors import ConfigError
from .. import columns
from ..stages.backends.engine import EngineClient
from ..stages.backends.generate import GenerateStage
from ..stages.backends.pooling import PoolingStage, ScoreStage
from ..stages.base import Stage
from .backend import Backend
from .config import EngineProcessorConfig
from .default_params import default_params
from .operators import MakeStages
from .pooling_stages import make_pooling_stage
from .resources import (
    OperatorResources,
    gathered_rows,
    generate_resources,
    held_cpus,
    max_pending_rows,
    pool_config,
)
from .stage_spec import StageInfo

MakeClient = Callable[[str], EngineClient]
"""A function that returns a client of the pool with a name."""

StartPool = Callable[[PoolConfig], EnginePool]


class EngineBackend(Backend):
    """A backend whose engines run in a pool of actors beside the operators of Ray Data.

    The pool starts with the first dataset, serves all further datasets, and ends with `close`. Processors of one job
    that run the same engine share a pool.

    Args:
        config: Settings of the processor.
        start_pool: Function that starts a pool with a `PoolConfig`, or joins the pool of the job that runs the same
            engine.
        make_client: Function that connects a worker to the pool; None for a `PoolClient` with the limit on pending
            requests of the config.
    """

    def __init__(
        self,
        config: EngineProcessorConfig,
        start_pool: StartPool = EnginePool.share,
        make_client: MakeClient | None = None,
    ) -> None:
        super().__init__(_stage_info(config), generate_resources(config), gathered_rows(config))
        self._config = config
        self._start_pool = start_pool
        self._make_client = make_client or functools.partial(PoolClient, max_pending=max_pending_rows(config))
        self._pool: EnginePool | None = None
        self._pool_config: PoolConfig | None = None
        self._lock = threading.Lock()

    def start(self, operators: Sequence[OperatorResources]) -> MakeStages:
        """Starts the pool at the first call, without waiting for the model, and returns the maker of the stage."""
        with self._lock:
            if self._pool is None or self._pool_config is None:
                self._pool_config = pool_config(self._config, operators)
                self._pool = self._start_pool(self._pool_config)
            else:
                # The pool's resources stay the same, but the filter of a checkpointed dataset takes one more CPU.
                check_leaves_one_cpu(self._pool_config, held_cpus(operators))
            return functools.partial(make_engine_stages, self._config, self._pool.name, self._make_client)

    def stats(self) -> PoolStats | None:
        """Returns the state of the replicas and the counters of their engines; None while no pool runs."""
        return None if self._pool is None else self._pool.stats(with_engines=True)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until a replica has loaded the model.

        Raises:
            ConfigError: The processor has not been called with a dataset.
            MillraceError: The model cannot be loaded, or it took too long.
        """
        if self._pool is None:
            raise ConfigError("the replicas start with the first dataset: call the processor first")
        self._pool.wait_ready(timeout_s)

    def close(self) -> None:
        """Ends the replicas, unless another processor shares them."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


def _stage_info(config: EngineProcessorConfig) -> StageInfo:
    """Returns the description of the stage: its name, and the columns that it reads."""
    if config.reads_pairs:
        names = config.score_columns or (columns.TEXT_1, columns.TEXT_2)
        return StageInfo(ScoreStage.__name__, config, names, (columns.POOLING_PARAMS, columns.MODEL))
    kind, params = (
        (PoolingStage, columns.POOLING_PARAMS) if config.is_pooling else (GenerateStage, columns.SAMPLING_PARAMS)
    )
    return StageInfo(kind.__name__, config, (columns.PROMPT,), (columns.TOKENIZED_PROMPT, params, columns.MODEL))


def make_engine_stages(config: EngineProcessorConfig, pool_name: str, make_client: MakeClient) -> list[Stage]:
    """Returns a list with one stage, which sends rows to the engines.

    Args:
        config: Settings of the processor.
        pool_name: Name of the pool. An actor with a handle in its arguments cannot restart, so the name is passed.
        make_client: Function that makes the client of the pool with this name.
    """
    settings: dict[str, Any] = {
        "adapters": config.adapter_names,
        "duplicates": config.deduplicate,
        "stop_on_error": config.stop_on_error,
    }
    if config.is_pooling:
        return [make_pooling_stage(config, make_client(pool_name), settings)]
    stage = GenerateStage(
        make_client(pool_name),
        default_params=default_params(config),
        job_seed=config.engine_config.seed,
        detokenize_later=config.detokenize_stage.enabled,
        **settings,
    )
    return [stage]
