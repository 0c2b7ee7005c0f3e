"""Datasets through a model: a `Processor` maps a dataset to a dataset, lazily.

    dataset -> blocks of batch_size rows -> Prepare -> Generate -> Finish -> dataset

Prepare runs `preprocess` and the stages before the backend, Generate the backend's own, Finish those after it and
`postprocess`. What a backend starts (a pool of engines) lives beside Ray Data, not in an operator: as long as the
processor, which serves several datasets with it, or as the driver at the latest.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset
from ray.data.dataset import MaterializedDataset

from ...actors import PoolStats
from ...engine.errors import ConfigError
from .. import columns
from .backend import Backend, check_room
from .config import ProcessorConfig
from .engine_stages import OPERATOR_CPUS, UserFunction, block_rows, make_stages, operator_kwargs
from .operators import Finish, Generate, MakeStages, Prepare
from .stage_plan import CustomStage, StageInfo, StagePlan, index_of

logger = logging.getLogger(__name__)

RowFunction = Callable[..., Mapping[str, Any]]

WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""How an operator takes its input: block by block, as Arrow tables."""


WITHOUT_BACKEND = {"num_cpus": OPERATOR_CPUS, "compute": ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=4)}
"""How the operator of the last stages runs if there is no backend before them."""


@dataclass(frozen=True)
class Operators:
    """What the operators of a processor are made of, if the last one is to write its rows itself.

    Attributes:
        block_rows: Most rows of a block.
        make_prepare: Makes the stages before the backend.
        prepare_kwargs: Resources of their operator, as arguments of `Dataset.map_batches`.
        generate_rows: Rows that small blocks are gathered into for the backend.
        make_generate: Makes the backend's stage.
        generate_kwargs: Resources of its operator.
        make_finish: Makes the stages after it.
    """

    block_rows: int
    make_prepare: MakeStages
    prepare_kwargs: dict[str, Any]
    generate_rows: int
    make_generate: MakeStages
    generate_kwargs: dict[str, Any]
    make_finish: MakeStages


class Processor:
    """Runs rows of datasets through stages. Make one with `build_llm_processor`.

    Use it as a context manager, or call `close`, to give the replicas back; they end with the driver otherwise.

    Args:
        config: Settings.
        stages: The stages in order, at most one `Backend` among them.
        preprocess: The user's function before the stages.
        postprocess: The user's function after them.
        preprocess_map_kwargs: Resources of the operator `preprocess` runs in, and `fn_args`, `fn_kwargs` for it.
        postprocess_map_kwargs: The same for `postprocess`.
        schema: Columns and types of the result; None for what `postprocess` returns.

    Raises:
        ConfigError: Something given cannot be used.
    """

    DATA_COLUMN = columns.DATA

    def __init__(
        self,
        config: ProcessorConfig,
        stages: Sequence[StagePlan | CustomStage | Backend] = (),
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
        preprocess_map_kwargs: Mapping[str, Any] | None = None,
        postprocess_map_kwargs: Mapping[str, Any] | None = None,
        *,
        schema: pa.Schema | None = None,
    ) -> None:
        self.config = config
        self._stages: list[StagePlan | Backend] = []
        self._preprocess = UserFunction("preprocess", preprocess, preprocess_map_kwargs or {})
        self._postprocess = UserFunction("postprocess", postprocess, postprocess_map_kwargs or {})
        self._schema = schema
        self._is_closed = False
        self._lock = threading.Lock()
        for stage in stages:
            self.add_stage(stage)

    def add_stage(self, stage: StagePlan | CustomStage | Backend) -> None:
        """Adds a stage: at the place it asks for, else as the last one. Datasets put through before go without it.

        Args:
            stage: The stage.

        Raises:
            ConfigError: The stage it is to stand by is not there, or it would be a second backend.
        """
        names = self.list_stage_names()
        if isinstance(stage, CustomStage):
            planned = stage.plan(names, stop_on_error=self.config.stop_on_error)
            self._stages.insert(stage.index(names), planned)
            return
        if isinstance(stage, Backend) and self._backend is not None:
            raise ConfigError(f"a processor has one backend; {self._backend.info.name} is there: chain two processors")
        self._stages.append(stage)

    def __call__(self, dataset: Dataset) -> Dataset:
        """Puts a dataset through the stages.

        The replicas of an engine start with the first call and load the model while the dataset is read; nothing else
        runs before the result is consumed.

        Args:
            dataset: Any dataset.

        Returns:
            A lazy dataset with one row for each row of the input.

        Raises:
            ConfigError: The processor is closed, or the cluster has no room for it.
        """
        before, after = self._plans()
        prepare = operator_kwargs(self.config, self._preprocess, *_settings(before))
        finish = operator_kwargs(self.config, self._postprocess, *_settings(after))
        make_backend = self._start([prepare, finish])
        blocks = without_large_blocks(dataset, block_rows(self.config, _settings(before)))
        results = blocks.map_batches(
            Prepare, fn_constructor_args=[self._make(before, self._preprocess)], **WHOLE_BLOCKS, **prepare
        )
        if self._backend is not None:
            # Whole blocks too, but Ray first gathers small ones until they have this many rows. Not before their rows
            # are packed: blocks in which a column has different types cannot be joined.
            results = results.map_batches(
                Generate,
                fn_constructor_args=[make_backend],
                batch_size=self._gathered_rows,
                batch_format="pyarrow",
                **self._backend.kwargs,
            )
        arguments = [self._make(after, self._postprocess), self.config.should_continue_on_error, self._schema]
        num_rows = block_rows(self.config, _settings(after))
        gathered = {"batch_size": num_rows if num_rows > self.config.batch_size else None}
        results = results.map_batches(Finish, fn_constructor_args=arguments, **{**WHOLE_BLOCKS, **gathered}, **finish)
        # Else Ray passes on the text of a worker's exception, and what can be caught is an error of Ray's.
        results.context.raise_original_map_exception = True
        return results

    def operators(self) -> Operators:
        """Starts the backend if it does not run yet, and returns what operators are made of that write their rows.

        Raises:
            ConfigError: The processor is closed, or the cluster has no room for it.
        """
        before, after = self._plans()
        prepare = operator_kwargs(self.config, self._preprocess, *_settings(before))
        make_backend = self._start([prepare])
        return Operators(
            block_rows=block_rows(self.config, _settings(before)),
            make_prepare=self._make(before, self._preprocess),
            prepare_kwargs=prepare,
            generate_rows=self._gathered_rows,
            make_generate=make_backend or list,
            generate_kwargs=WITHOUT_BACKEND if self._backend is None else dict(self._backend.kwargs),
            make_finish=self._make(after, self._postprocess),
        )

    def list_stage_names(self) -> list[str]:
        """Returns the names of the stages that run, in order."""
        return [stage.info.name for stage in self._stages]

    def get_stage_by_name(self, name: str) -> StageInfo:
        """Returns a stage.

        Args:
            name: One of `list_stage_names`.

        Raises:
            ConfigError: No stage that runs has the name.
        """
        return self._stages[index_of(name, self.list_stage_names())].info

    def log_input_column_names(self) -> None:
        """Logs which columns the first stage needs, so which `preprocess` must return."""
        if not self._stages:
            logger.info("No stages, so no input columns are required")
            return
        first = self._stages[0].info
        logger.info("Required input columns of %s: %s", first.name, ", ".join(first.required))
        logger.info("Optional input columns of %s: %s", first.name, ", ".join(first.optional))

    def stats(self) -> PoolStats | None:
        """Describes the replicas and their engines' counters; None before the first call and after `close`."""
        return None if self._backend is None else self._backend.stats()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until the model is loaded; a dataset that is consumed waits by itself.

        Args:
            timeout_s: Seconds to wait at most.

        Raises:
            ConfigError: No dataset was given yet.
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

    @property
    def _gathered_rows(self) -> int:
        return (self._backend and self._backend.batch_size) or self.config.batch_size

    def _plans(self) -> tuple[list[StagePlan], list[StagePlan]]:
        """Returns the stages before the backend and those after it."""
        place = next((i for i, stage in enumerate(self._stages) if isinstance(stage, Backend)), len(self._stages))
        before, after = self._stages[:place], self._stages[place:]
        return [s for s in before if isinstance(s, StagePlan)], [s for s in after if isinstance(s, StagePlan)]

    def _make(self, plans: list[StagePlan], user: UserFunction) -> MakeStages:
        return functools.partial(make_stages, plans, user, stop_on_error=self.config.stop_on_error)

    def _start(self, operators: list[dict[str, Any]]) -> MakeStages | None:
        """Starts the backend, or, where there is none, checks that the other operators have room."""
        with self._lock:
            if self._is_closed:
                raise ConfigError("the processor is closed; build another one")
            if self._backend is None:
                check_room(operators)
                return None
            make_stages = self._backend.start([*operators, dict(self._backend.kwargs)])
            # A lazy dataset does not keep its processor alive, so the end of the driver is what ends a pool that
            # nobody closed. Registered once: `atexit` calls a function as often as it was registered.
            atexit.unregister(self.close)
            atexit.register(self.close)
            return make_stages


def _settings(plans: Sequence[StagePlan]) -> list[Any]:
    return [plan.info.config for plan in plans]


def without_large_blocks(dataset: Dataset, max_rows: int) -> Dataset:
    """Splits blocks, so that the first rows generate while the last are still being read.

    Splitting is a task for each block, also for those that stay whole, and a task costs as much as many rows. So blocks
    that exist already and are small are left alone.

    Args:
        dataset: Any dataset.
        max_rows: Of a block.
    """
    if isinstance(dataset, MaterializedDataset):
        sizes = [bundle.num_rows() for bundle in dataset.iter_internal_ref_bundles()]
        if all(size is not None and size <= max_rows for size in sizes):
            return dataset
    return dataset.repartition(target_num_rows_per_block=max_rows)
