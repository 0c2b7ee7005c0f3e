"""Datasets through a model: `build_llm_processor` makes a `Processor`, which maps a dataset to a dataset, lazily.

    dataset -> blocks of batch_size rows -> Prepare -> Generate -> Finish -> dataset

The replicas belong to an `EnginePool` beside Ray Data, not to an operator: they live as long as the processor, serve
every dataset it is called with, and end with `close`, with the driver at the latest. Processors of one job that run the
same engine share them.
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
from ray.data import Dataset
from ray.data.dataset import MaterializedDataset

from ..actors import EnginePool, PoolConfig, PoolStats
from ..engine import resolve_model
from ..engine.errors import ConfigError, unknown_key_message
from . import columns
from .config import EngineProcessorConfig, ProcessorConfig
from .operators import Finish, Generate, MakeStages, Prepare
from .plan import (
    MakeClient,
    UserFunction,
    generate_kwargs,
    make_finish_stages,
    make_generate_stages,
    make_pool_client,
    make_prepare_stages,
    operator_kwargs,
    pool_config,
)

logger = logging.getLogger(__name__)

RowFunction = Callable[..., Mapping[str, Any]]
StartPool = Callable[[PoolConfig], EnginePool]

WHOLE_BLOCKS: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""How an operator takes its input: block by block, as Arrow tables."""


@dataclass(frozen=True)
class StageInfo:
    """A stage of a processor.

    Attributes:
        name: Its name.
        config: Its settings; those of the whole processor for the generate stage.
        required: Columns a row must have to enter it: one of each group.
        optional: Columns it makes use of.
    """

    name: str
    config: Any
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operators:
    """What the operators of a processor are made of.

    Attributes:
        make_prepare: Makes the stages before generation.
        prepare_kwargs: Resources of their operator, as arguments of `Dataset.map_batches`.
        make_generate: Makes the stages that generate.
        generate_kwargs: Resources of their operator.
        make_finish: Makes the stages after generation.
    """

    make_prepare: MakeStages
    prepare_kwargs: dict[str, Any]
    make_generate: MakeStages
    generate_kwargs: dict[str, Any]
    make_finish: MakeStages


class Processor:
    """Runs a model over datasets. Make one with `build_llm_processor`.

    Use it as a context manager, or call `close`, to give the replicas back; they end with the driver otherwise.

    Args:
        config: Settings.
        preprocess: The user's function before the stages.
        postprocess: The user's function after them.
        schema: Columns and types of the result; None for what `postprocess` returns.
        start_pool: Starts the replicas.
        make_client: Connects a worker to them.
    """

    DATA_COLUMN = columns.DATA

    def __init__(
        self,
        config: EngineProcessorConfig,
        preprocess: UserFunction,
        postprocess: UserFunction,
        *,
        schema: pa.Schema | None = None,
        start_pool: StartPool = EnginePool.share,
        make_client: MakeClient = make_pool_client,
    ) -> None:
        self.config = config
        self._preprocess = preprocess
        self._postprocess = postprocess
        self._schema = schema
        self._start_pool = start_pool
        self._make_client = make_client
        self._pool: EnginePool | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def __call__(self, dataset: Dataset) -> Dataset:
        """Puts a dataset through the model.

        The replicas start with the first call and load the model while the dataset is read; nothing else runs before
        the result is consumed.

        Args:
            dataset: Any dataset.

        Returns:
            A lazy dataset with one row for each row of the input.

        Raises:
            ConfigError: The processor is closed, or the cluster has no room for it.
        """
        config = self.config
        finish = operator_kwargs(config, self._postprocess, config.detokenize_stage)
        operators = self.operators([finish])
        # Small blocks are not joined before their rows are packed: blocks in which a column has different types cannot
        # be.
        results = (
            without_large_blocks(dataset, config.batch_size)
            .map_batches(
                Prepare,
                fn_constructor_args=[operators.make_prepare],
                **WHOLE_BLOCKS,
                **operators.prepare_kwargs,
            )
            .map_batches(
                Generate,
                fn_constructor_args=[operators.make_generate],
                # Whole blocks too, but Ray first gathers small ones until they have this many rows.
                batch_size=config.batch_size,
                batch_format="pyarrow",
                **operators.generate_kwargs,
            )
            .map_batches(
                Finish,
                fn_constructor_args=[
                    operators.make_finish,
                    config.should_continue_on_error,
                    self._schema,
                ],
                **WHOLE_BLOCKS,
                **finish,
            )
        )
        # Else Ray passes on the text of a worker's exception, and what can be caught is an error of Ray's.
        results.context.raise_original_map_exception = True
        return results

    def operators(self, others: Sequence[Mapping[str, Any]] = ()) -> Operators:
        """Starts the replicas if they are not up, and returns what the operators are made of.

        Args:
            others: Arguments of further operators that run beside prepare and generate.

        Raises:
            ConfigError: The processor is closed, or the cluster has no room for it.
        """
        config = self.config
        prepare = operator_kwargs(config, self._preprocess, config.chat_template_stage, config.tokenize_stage)
        generate = generate_kwargs(config)
        pool = self._ensure_pool([prepare, generate, *map(dict, others)])
        return Operators(
            make_prepare=functools.partial(make_prepare_stages, config, self._preprocess),
            prepare_kwargs=prepare,
            make_generate=functools.partial(make_generate_stages, config, pool.name, self._make_client),
            generate_kwargs=generate,
            make_finish=functools.partial(make_finish_stages, config, self._postprocess),
        )

    def list_stage_names(self) -> list[str]:
        """Returns the names of the stages that run, in order."""
        return [stage.name for stage in self._stages()]

    def get_stage_by_name(self, name: str) -> StageInfo:
        """Returns a stage.

        Args:
            name: One of `list_stage_names`.

        Raises:
            ConfigError: No stage that runs has the name.
        """
        for stage in self._stages():
            if stage.name == name:
                return stage
        raise ConfigError(unknown_key_message("the processor", name, self.list_stage_names()).replace("field", "stage"))

    def log_input_column_names(self) -> None:
        """Logs which columns the first stage needs, so which `preprocess` must return."""
        first = self._stages()[0]
        logger.info("Required input columns of %s: %s", first.name, ", ".join(first.required))
        logger.info("Optional input columns of %s: %s", first.name, ", ".join(first.optional))

    def stats(self) -> PoolStats | None:
        """Describes the replicas and their engines' counters; None before the first call and after `close`."""
        return None if self._pool is None else self._pool.stats(with_engines=True)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Waits until the model is loaded; a dataset that is consumed waits by itself.

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
        """Ends the replicas. Datasets of this processor cannot be consumed any more. A second call does nothing."""
        with self._lock:
            pool, self._pool, self._is_closed = self._pool, None, True
        if pool is not None:
            atexit.unregister(self.close)
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ensure_pool(self, operators: list[dict[str, Any]]) -> EnginePool:
        with self._lock:
            if self._is_closed:
                raise ConfigError("the processor is closed; build another one")
            if self._pool is None:
                self._pool = self._start_pool(pool_config(self.config, operators))
                # A lazy dataset does not keep its processor alive, so the end of the driver is what ends a pool that
                # nobody closed.
                atexit.register(self.close)
            return self._pool

    def _stages(self) -> list[StageInfo]:
        config = self.config
        stages = []
        if config.chat_template_stage.enabled:
            chat = StageInfo("ChatTemplateStage", config.chat_template_stage, (columns.MESSAGES,), (columns.PROMPT,))
            stages.append(chat)
        if config.tokenize_stage.enabled:
            tokenize = (columns.PROMPT,), (columns.TOKENIZED_PROMPT,)
            stages.append(StageInfo("TokenizeStage", config.tokenize_stage, *tokenize))
        generate = (columns.PROMPT,), (columns.TOKENIZED_PROMPT, columns.SAMPLING_PARAMS)
        stages.append(StageInfo("GenerateStage", config, *generate))
        if config.detokenize_stage.enabled:
            stages.append(StageInfo("DetokenizeStage", config.detokenize_stage, (columns.GENERATED_TOKENS,)))
        return stages


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


def build_llm_processor(
    config: ProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """Builds a processor: rows in, generated rows out.

    Args:
        config: Settings, an `EngineProcessorConfig`.
        preprocess: Row -> columns to merge into it: `messages` or `prompt`, and `sampling_params` as a dict. None if
            the dataset has them.
        postprocess: Row with the generated columns -> the row of the result. None keeps all columns.
        preprocess_map_kwargs: Resources of the operator `preprocess` runs in, and `fn_args`, `fn_kwargs` for it.
        postprocess_map_kwargs: The same for `postprocess`.
        builder_kwargs: `chat_template_kwargs`: variables of the chat template.

    Returns:
        A processor; nothing has started yet.

    Raises:
        ConfigError: Something given cannot be used.
    """
    if not isinstance(config, EngineProcessorConfig):
        raise ConfigError(f"config must be an EngineProcessorConfig; got {type(config).__name__}")
    resolve_model(config.model_source)
    return Processor(
        _with_builder_kwargs(config, dict(builder_kwargs or {})),
        UserFunction("preprocess", preprocess, preprocess_map_kwargs or {}),
        UserFunction("postprocess", postprocess, postprocess_map_kwargs or {}),
    )


build_processor = build_llm_processor


def _with_builder_kwargs(config: EngineProcessorConfig, kwargs: dict[str, Any]) -> EngineProcessorConfig:
    template_kwargs = kwargs.pop("chat_template_kwargs", None)
    if kwargs:
        raise ConfigError(unknown_key_message("builder_kwargs", next(iter(kwargs)), ["chat_template_kwargs"]))
    if template_kwargs is None:
        return config
    stage = config.chat_template_stage.model_copy(update={"chat_template_kwargs": dict(template_kwargs)})
    return config.model_copy(update={"chat_template_stage": stage})
