"""A pool of engines in the middle of a processor."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

from ...actors import EnginePool, PoolConfig, PoolStats, check_leaves_one_cpu
from ...engine.errors import ConfigError
from .. import columns
from .backend import Backend, OperatorKwargs, held_cpus
from .config import EngineProcessorConfig
from .engine_stages import (
    MakeClient,
    gathered_rows,
    generate_kwargs,
    make_generate_stages,
    make_pool_client,
    max_pending_rows,
    pool_config,
)
from .operators import MakeStages
from .stage_plan import StageInfo

StartPool = Callable[[PoolConfig], EnginePool]


class EngineBackend(Backend):
    """Engines in a pool beside Ray Data.

    The pool starts with the first dataset, serves every further one, and ends with `close`. Processors of one job that
    run the same engine share it.

    Args:
        config: Settings of the processor.
        start_pool: Starts the replicas.
        make_client: Connects a worker to them; None for the pool's own client, with the bound of the config.
    """

    def __init__(
        self,
        config: EngineProcessorConfig,
        start_pool: StartPool = EnginePool.share,
        make_client: MakeClient | None = None,
    ) -> None:
        name, params = "GenerateStage", columns.SAMPLING_PARAMS
        if config.pools:
            name, params = "PoolStage", columns.POOLING_PARAMS
        info = StageInfo(name, config, (columns.PROMPT,), (columns.TOKENIZED_PROMPT, params))
        super().__init__(info, generate_kwargs(config), gathered_rows(config))
        self._config = config
        self._start_pool = start_pool
        self._make_client = make_client or functools.partial(make_pool_client, max_pending=max_pending_rows(config))
        self._pool: EnginePool | None = None
        self._pool_config: PoolConfig | None = None
        self._lock = threading.Lock()

    def start(self, operators: Sequence[OperatorKwargs]) -> MakeStages:
        """Starts the pool, once; the models load while the first dataset is read."""
        with self._lock:
            if self._pool is None or self._pool_config is None:
                self._pool_config = pool_config(self._config, operators)
                self._pool = self._start_pool(self._pool_config)
            else:
                # What the pool holds is settled, but this dataset may be resumed from checkpoints, which take a CPU.
                check_leaves_one_cpu(self._pool_config, held_cpus(operators))
            return functools.partial(make_generate_stages, self._config, self._pool.name, self._make_client)

    def stats(self) -> PoolStats | None:
        """Describes the replicas and their engines' counters; None while there are none."""
        return None if self._pool is None else self._pool.stats(with_engines=True)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until the model is loaded.

        Args:
            timeout_s: Seconds to wait at most.

        Raises:
            ConfigError: No dataset was given yet.
            MillraceError: The model cannot be loaded, or it took too long.
        """
        if self._pool is None:
            raise ConfigError("the replicas start with the first dataset: call the processor first")
        self._pool.wait_ready(timeout_s)

    def close(self) -> None:
        """Ends the replicas, or leaves them to the processors that share them."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
