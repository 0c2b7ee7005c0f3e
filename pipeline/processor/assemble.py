"""`assemble`: the chain of Ray Data operators that a dataset passes.

    dataset -> Prepare -> Generate -> Finish -> dataset                        a result for each row
    dataset -> Prepare -> the operator of a writer -> counts of rows           rows that are written as they finish

Prepare runs `preprocess` and the stages before the backend. Generate runs the backend's stage. Finish runs the stages
after the backend and `postprocess`. A processor without a backend has no Generate. A writer replaces these operators by
operators of its own, which run the same stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from ray.data import Dataset
from ray.data.dataset import MaterializedDataset

from ..stages.base import Stage
from ..stages.user_function import PreprocessStage, UserFunction
from .operators import Finish, Generate, MakeStages, Prepare
from .stage_spec import StageSpec


@dataclass(frozen=True)
class OperatorSpec:
    """The stages of one operator, and the resources that the operator takes.

    Attributes:
        make_stages: Function that makes the stages, in the worker.
        resources: Resources of the operator, as arguments of `Dataset.map_batches`.
        gathered_rows: Number of rows up to which small blocks are joined before they reach the operator; None to take
            blocks as they are.
    """

    make_stages: MakeStages
    resources: dict[str, Any]
    gathered_rows: int | None = None


@dataclass(frozen=True)
class Operators:
    """The operators of a processor, and the settings of the chain that `assemble` makes of them.

    Attributes:
        block_rows: Most rows of a block of the dataset; larger blocks are split before the first operator.
        prepare: Operator that runs `preprocess` and the stages before the backend.
        generate: Operator that runs the backend's stage; None if there is no backend.
        finish: Operator that runs the stages after the backend and `postprocess`.
        mark_success: Whether rows without an error get an empty `__inference_error__`.
        schema: Columns and types of the result; None for the columns that the rows hold.
    """

    block_rows: int
    prepare: OperatorSpec
    generate: OperatorSpec | None
    finish: OperatorSpec
    mark_success: bool
    schema: pa.Schema | None = None


Link = tuple[type, list[Any], OperatorSpec]
"""One operator of a chain: its class, the arguments of its constructor, and its stages and resources."""


class Writer(Protocol):
    """The interface of an object that supplies the operators which write rows as they finish."""

    def links(self, operators: Operators) -> Iterator[Link]:
        """Yields the writer's operators in order.

        Args:
            operators: The operators of the processor, whose stages the writer's operators run.
        """


def assemble(dataset: Dataset, operators: Operators, writer: Writer | None = None) -> Dataset:
    """Adds a chain of operators to a dataset. Nothing runs before the result is consumed.

    Args:
        dataset: Any dataset.
        operators: The operators of a processor.
        writer: Supplier of the operators that write the rows; None for one row of the result per row of the input.

    Returns:
        A lazy dataset of the rows that the last operator returns.
    """
    result = without_large_blocks(dataset, operators.block_rows)
    for kind, arguments, spec in _links(operators) if writer is None else writer.links(operators):
        result = result.map_batches(
            kind,
            fn_constructor_args=arguments,
            batch_size=spec.gathered_rows,
            batch_format="pyarrow",
            **spec.resources,
        )
    # Without this setting, Ray raises an error of its own that holds the worker's exception only as text.
    result.context.raise_original_map_exception = True
    return result


def _links(operators: Operators) -> Iterator[Link]:
    """Yields the operators of a chain without a writer, which return a result for each row, in order."""
    yield Prepare, [operators.prepare.make_stages], operators.prepare
    if operators.generate is not None:
        yield Generate, [operators.generate.make_stages], operators.generate
    yield Finish, [operators.finish.make_stages, operators.mark_success, operators.schema], operators.finish


def make_stages(specs: Sequence[StageSpec], user: UserFunction, *, stop_on_error: bool) -> list[Stage]:
    """Makes the stages of one operator on the CPU and returns them in order, with the stage of the user's function.

    Args:
        specs: Specs of the stages, in order.
        user: The function `preprocess`, which runs before the stages, or `postprocess`, which runs after them.
        stop_on_error: Whether the first failed row stops the job.
    """
    made = [_made(spec) for spec in specs]
    stages = [*user.stages(), *made] if user.kind is PreprocessStage else [*made, *user.stages()]
    for stage in stages:
        # The attribute is set from outside, because the constructor of a user's stage may not pass it on.
        stage.stop_on_error = stop_on_error
    return stages


def _made(spec: StageSpec) -> Stage:
    stage = spec.make()
    if spec.info.config.batch_size is not None:
        stage.batch_size = spec.info.config.batch_size
    return stage


def without_large_blocks(dataset: Dataset, max_rows: int) -> Dataset:
    """Returns the dataset in blocks of at most `max_rows` rows.

    With small blocks, the engine starts on the first rows while the last rows are still being read. Splitting takes a
    Ray task per block, even for a block that stays whole, and a task costs as much as many rows. A dataset whose
    blocks exist already and are small is therefore returned unchanged.

    Args:
        dataset: Any dataset.
        max_rows: Most rows of a block.
    """
    if isinstance(dataset, MaterializedDataset):
        sizes = [bundle.num_rows() for bundle in dataset.iter_internal_ref_bundles()]
        if all(size is not None and size <= max_rows for size in sizes):
            return dataset
    return dataset.repartition(target_num_rows_per_block=max_rows)
