"""`Processor`: maps a dataset to a dataset with answers, lazily.

`assemble.py` builds the chain of operators. The pool of engines that a backend starts runs beside Ray Data, not in an
operator, so one pool serves several datasets. The pool ends when the processor is closed, or at the latest with the
driver.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from ray.data import Dataset

from ...actors import PoolStats
from ...engine.errors import ConfigError
from .. import columns
from ..stages.user_function import PostprocessStage, PreprocessStage, RowFunction, UserFunction
from .assemble import Operators, OperatorSpec, Writer, assemble, make_stages
from .backend import Backend
from .config import ProcessorConfig
from .resources import OperatorResources, block_rows, check_room, operator_resources
from .stage_spec import CustomStage, StageInfo, StageSpec, index_of

logger = logging.getLogger(__name__)


class Processor:
    """A callable that maps a dataset to a dataset of answered rows. `build_llm_processor` makes one.

    A `with` block or a call of `close` ends the replicas; otherwise they end with the driver.

    Args:
        config: Settings of the processor.
        stages: The stages in order, at most one `Backend` among them.
        preprocess: The user's function before the stages.
        postprocess: The user's function after the stages.
        preprocess_map_kwargs: Resources of the operator in which `preprocess` runs, and `fn_args` and `fn_kwargs` for
            `preprocess`.
        postprocess_map_kwargs: Resources and arguments of the same kind for `postprocess`.
        schema: Columns and types of the result; None for the columns that `postprocess` returns.

    Raises:
        ConfigError: An argument cannot be used.
    """

    DATA_COLUMN = columns.DATA

    def __init__(
        self,
        config: ProcessorConfig,
        stages: Sequence[StageSpec | CustomStage | Backend] = (),
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
        preprocess_map_kwargs: Mapping[str, Any] | None = None,
        postprocess_map_kwargs: Mapping[str, Any] | None = None,
        *,
        schema: pa.Schema | None = None,
    ) -> None:
        self.config = config
        self._stages: list[StageSpec | Backend] = []
        self._preprocess = UserFunction(PreprocessStage, preprocess, preprocess_map_kwargs or {})
        self._postprocess = UserFunction(PostprocessStage, postprocess, postprocess_map_kwargs or {})
        self._schema = schema
        self._is_closed = False
        self._lock = threading.Lock()
        for stage in stages:
            self.add_stage(stage)

    def add_stage(self, stage: StageSpec | CustomStage | Backend) -> None:
        """Adds a stage, at the place that it asks for or else as the last one. Datasets returned earlier do not run it.

        Args:
            stage: The stage.

        Raises:
            ConfigError: The processor lacks the stage in `before` or `after`, or has a backend and gets a second one.
        """
        names = self.list_stage_names()
        if isinstance(stage, CustomStage):
            self._stages.insert(stage.index(names), stage.spec(names))
            return
        if isinstance(stage, Backend) and self._backend is not None:
            raise ConfigError(f"a processor has one backend; {self._backend.info.name} is there: chain two processors")
        self._stages.append(stage)

    def __call__(self, dataset: Dataset) -> Dataset:
        """Returns a dataset with the answers to the rows of a dataset.

        The replicas of an engine start with the first call and load the model while the dataset is read; nothing else
        runs before the result is consumed.

        Args:
            dataset: Any dataset.

        Returns:
            A lazy dataset with one row for each row of the input.

        Raises:
            ConfigError: The processor is closed, or the cluster has no room for it.
        """
        return self._put_through(dataset)

    def write(self, dataset: Dataset, writer: Writer) -> Dataset:
        """Returns a dataset that, when consumed, runs the rows and writes each one as it finishes.

        Args:
            dataset: Any dataset.
            writer: Supplier of the operators that run the backend's stage and the stages after it, and write the rows.

        Returns:
            A lazy dataset of the rows that the last operator of the writer returns.

        Raises:
            ConfigError: The processor is closed, or the cluster has no room for it.
        """
        return self._put_through(dataset, writer)

    def list_stage_names(self) -> list[str]:
        """Returns the names of the stages that run, in order, the backend's stage included."""
        return [stage.info.name for stage in self._stages]

    def get_stage_by_name(self, name: str) -> StageInfo:
        """Returns the name, settings and columns of a stage.

        Args:
            name: A name in `list_stage_names`.

        Raises:
            ConfigError: No stage that runs has the name.
        """
        return self._stages[index_of(name, self.list_stage_names())].info

    def log_input_column_names(self) -> None:
        """Logs the columns that the first stage needs, which `preprocess` must return."""
        if not self._stages:
            logger.info("No stages, so no input columns are required")
            return
        first = self._stages[0].info
        logger.info("Required input columns of %s: %s", first.name, ", ".join(first.required))
        logger.info("Optional input columns of %s: %s", first.name, ", ".join(first.optional))

    def stats(self) -> PoolStats | None:
        """Returns the state of the replicas and the counters of their engines; None while no replicas run."""
        return None if self._backend is None else self._backend.stats()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until a replica has loaded the model. Consuming a dataset does not need this call.

        Args:
            timeout_s: Most seconds to wait.

        Raises:
            ConfigError: The processor has not been called with a dataset.
            MillraceError: The model cannot be loaded, or it took too long.
        """
        if self._backend is not None:
            self._backend.wait_ready(timeout_s)

    def close(self) -> None:
        """Ends the replicas. Datasets of this processor cannot be consumed any more. A second call does nothing."""
        with self._lock:
            self._is_closed = True
        atexit.unregister(self.close)
        if self._backend is not None:
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _backend(self) -> Backend | None:
        return next((stage for stage in self._stages if isinstance(stage, Backend)), None)

    def _put_through(self, dataset: Dataset, writer: Writer | None = None) -> Dataset:
        before, after = self._sides()
        prepare = self._operator(before, self._preprocess)
        finish = self._operator(after, self._postprocess, self._finish_rows(after))
        # The operator of a writer also runs the stages after the backend, so there is no Finish to count.
        generate = self._start([prepare.resources] if writer else [prepare.resources, finish.resources])
        rows = block_rows(self.config, _configs(before))
        marks = self.config.should_continue_on_error
        return assemble(dataset, Operators(rows, prepare, generate, finish, marks, self._schema), writer)

    def _sides(self) -> tuple[list[StageSpec], list[StageSpec]]:
        """Returns the stages before the backend and the stages after it."""
        place = next((i for i, stage in enumerate(self._stages) if isinstance(stage, Backend)), len(self._stages))
        before, after = self._stages[:place], self._stages[place:]
        return [s for s in before if isinstance(s, StageSpec)], [s for s in after if isinstance(s, StageSpec)]

    def _operator(self, specs: list[StageSpec], user: UserFunction, gathered_rows: int | None = None) -> OperatorSpec:
        make = functools.partial(make_stages, specs, user, stop_on_error=self.config.stop_on_error)
        return OperatorSpec(make, operator_resources(self.config, user, *_configs(specs)), gathered_rows)

    def _finish_rows(self, after: list[StageSpec]) -> int | None:
        """Returns the rows up to which blocks are joined before `Finish`; None if `batch_size` is enough."""
        rows = block_rows(self.config, _configs(after))
        return rows if rows > self.config.batch_size else None

    def _start(self, operators: list[OperatorResources]) -> OperatorSpec | None:
        """Starts the backend and returns its operator; without a backend, checks that the other operators have room."""
        with self._lock:
            if self._is_closed:
                raise ConfigError("the processor is closed; build another one")
            if (backend := self._backend) is None:
                check_room(operators)
                return None
            make_stages = backend.start([*operators, backend.resources])
            # A lazy dataset does not keep its processor alive, so a pool that was not closed must end with the driver.
            # `atexit` calls a function as often as it was registered, so it is registered once.
            atexit.unregister(self.close)
            atexit.register(self.close)
            # Ray joins small blocks only here, after their rows are packed: blocks in which a column has different
            # types cannot be joined.
            return OperatorSpec(make_stages, dict(backend.resources), backend.batch_size or self.config.batch_size)


def _configs(specs: Sequence[StageSpec]) -> list[Any]:
    return [spec.info.config for spec in specs]
