"""`write_results`: runs a dataset through a processor and writes durable rows; and `write_rows`, which jobs use."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from ..._version import __version__
from ...engine.errors import ConfigError
from ...engine.shown import without_secrets
from .. import columns
from ..arrow_values import quoted
from ..files.storage import Storage
from ..ledger.claim import Claim
from ..ledger.counts import Counts
from ..ledger.epoch import Epoch
from ..ledger.index import RowIndex
from ..ledger.records import check_parts, read_ids, read_records
from ..processor.config import ProcessorConfig
from ..processor.processor import Processor
from ..sinks.formats import FORMATS
from ..sinks.manifest import Manifest
from ..sinks.parts import OutputSpec
from ..sinks.publish import Expected, publish
from .durable import COUNTS, Identity, RowWriter
from .folder import JobFolder, JobState

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LiveCounts:
    """Counts of the rows that all runs of a job have written so far. Any thread may read them."""

    counts: Counts = field(default_factory=Counts)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, more: Counts) -> None:
        """Adds the counts of further rows."""
        with self._lock:
            self.counts.merge(more)

    def update(self) -> Counts:
        """Returns a copy of the counts as they are now."""
        copy = Counts()
        with self._lock:
            copy.merge(self.counts)
        return copy


@dataclass(frozen=True)
class Done:
    """The rows that former runs have left in a work folder.

    Attributes:
        records: Names of the records.
        counts: Counts of all their rows.
        work: The work folder.
    """

    records: tuple[str, ...]
    counts: Counts
    work: Storage

    @classmethod
    def find(cls, work: Storage) -> Done:
        """Begins an epoch, which voids records that former runs still write, and returns the rows finished so far.

        Raises:
            DamagedOutputError: A record or a part is missing or damaged.
        """
        epoch = Epoch.open(work)
        records = read_records(work, epoch.records)
        check_parts(work, records)
        return cls(epoch.records, Counts.sum(one.counts for one in records), work)

    def index(self) -> RowIndex:
        """Returns the ids of the rows that are done."""
        return RowIndex(read_ids(self.work, one) for one in read_records(self.work, self.records))


def write_rows(
    processor: Processor,
    dataset: Dataset,
    identity: Identity,
    spec: OutputSpec,
    done: Done,
    on_counts: Callable[[Counts], None] = lambda counts: None,
    claim: Claim | None = None,
) -> None:
    """Runs the rows of a dataset that are not done, and returns when they are durable in the work folder.

    Args:
        processor: The processor of the rows.
        dataset: Dataset of the rows to run.
        identity: Columns by which the ledger identifies rows.
        spec: Format and place of the output.
        done: The rows that former runs have left in the work folder.
        on_counts: Function that is called with the counts of the rows written since its last call.
        claim: The claim of this process on the output, which is checked whenever a block of rows is durable.

    Raises:
        OutputInUseError: Another run has taken the output over.
        MillraceError: The run failed. The rows that it has written are kept, and do not run again.
    """
    writer = RowWriter(identity, spec, done.records, processor.config.stop_on_error)
    batches = processor.write(dataset, writer)
    table: pa.Table
    for table in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
        if claim is not None:
            claim.check()
        for text in table[COUNTS].to_pylist():
            on_counts(Counts.from_dict(json.loads(text)))


def write_results(
    processor: Processor,
    dataset: Dataset,
    output: str,
    *,
    key: Sequence[str] | None = None,
    output_format: str = "parquet",
    order: str = "any",
    max_rows_per_file: int = 50_000,
    flush_interval_s: float = 5.0,
    endpoint_url: str | None = None,
    take_over: bool = False,
) -> Manifest:
    """Writes the results of a dataset to files, each row once, even if processes die.

    After an interruption, a call with the same output resumes where the first one stopped. A call for a complete output
    does nothing. Both check that the processor has the settings of the first call; the caller ensures that its
    functions and the dataset are the same too.

    Args:
        processor: The processor. Its `postprocess` returns the columns of the output.
        dataset: Any dataset with columns that identify its rows, or one that `Source.read` returned.
        output: Folder to write to; a path or a URL. Failed rows are written into its folder ``_failed``.
        key: Columns whose values identify a row; not needed for rows that have a position. Of several rows with the
            same values, one runs, and a warning says how many were left out. A row without any of these values is
            identified by its position.
        output_format: Name of a format that needs no schema, such as ``"parquet"``; tables need one, so only jobs write
            them.
        order: ``"any"``, or ``"input"`` for the order of the input, for rows that have a position.
        max_rows_per_file: Most rows of a file.
        flush_interval_s: Seconds after which a finished row is durable.
        endpoint_url: Address of the store behind ``s3://``, if it is not Amazon's.
        take_over: Whether to take the output over from another run that writes to it.

    Returns:
        The files that were written, with row counts.

    Raises:
        ConfigError: An argument cannot be used, the output was written with other settings, or a row has neither a key
            nor a position.
        OutputInUseError: Another run writes to the output, or has taken it over.
        MillraceError: The run failed. Call again to go on.
    """
    _check_settings(dataset, key, output_format, order)
    _check_sizes(max_rows_per_file, flush_interval_s)
    folder = JobFolder(Storage.at(output, endpoint_url))
    settings = {"key": None if key is None else list(key), "order": order, "output_format": output_format}
    state = JobState(settings | _settings_of(processor.config), [], None, "", __version__)
    if (manifest := _finished(folder, state)) is not None:
        return manifest
    spec = OutputSpec(
        folder.work,
        output_format,
        is_ordered=order == "input",
        max_rows_per_file=max_rows_per_file,
        flush_interval_s=flush_interval_s,
    )
    identity, live = Identity(None if key is None else tuple(key)), LiveCounts()
    folder.check(state, overwrite=False)  # A wrong folder is refused before anything is written to it.
    with Claim.held(folder.writers, output, take_over) as claim:
        if (manifest := _finished(folder, state)) is not None:  # Another run has just finished it.
            return manifest
        folder.sweep()
        if not folder.check(state, overwrite=False):
            folder.write_state(state)
        if not folder.is_publishing:
            done = Done.find(folder.work)
            live.add(done.counts)
            write_rows(processor, dataset, identity, spec, done, live.add, claim)
        warn_of_left_out(live.update().num_left_out, key)
        return publish(folder.root, spec, None, claim, Expected(live.update().num_rows))


def _finished(folder: JobFolder, state: JobState) -> Manifest | None:
    """Returns the manifest of a complete output, after a check that it is of the same job; None if it is unfinished."""
    manifest = Manifest.read(folder.root)
    if manifest is not None:
        folder.check_same(state)
    return manifest


def warn_of_left_out(num_rows: int, key: Sequence[str] | None) -> None:
    """Warns of rows that did not run because rows with the same key did."""
    if num_rows > 0 and key is not None:
        logger.warning("%d rows have the same values of %s as others and were left out", num_rows, ", ".join(key))


def _check_settings(dataset: Dataset, key: Sequence[str] | None, output_format: str, order: str) -> None:
    names = dataset.columns()
    if key is not None:
        _check_key(key, names)
    has_position = columns.POSITION in (names or [])
    if key is None and not has_position:
        raise ConfigError(
            f"the dataset has no column {columns.POSITION!r}, so its rows cannot be told apart: pass key=[...], the "
            "columns whose values do"
        )
    if FORMATS[output_format].needs_schema:
        raise ConfigError(
            f"output_format {output_format!r} is for jobs, which know the columns of a table before there are rows"
        )
    if order not in ("any", "input") or (order == "input" and key is not None):
        raise ConfigError(f"order must be 'any', or without key 'input'; got {order!r} and key={key!r}")


def _check_key(key: Sequence[str], names: Sequence[str] | None) -> None:
    if isinstance(key, str) or not isinstance(key, list | tuple) or not key:
        raise ConfigError(f"key must be a list of columns, such as ['id']; got {quoted(key)}")
    missing = [name for name in key if not isinstance(name, str) or (names is not None and name not in names)]
    if missing:
        known = ", ".join(names or [])
        raise ConfigError(f"key: the dataset has no column {quoted(missing[0])}; its columns are: {known:.500}")


def _check_sizes(max_rows_per_file: int, flush_interval_s: float) -> None:
    if type(max_rows_per_file) is not int or max_rows_per_file < 1:
        raise ConfigError(f"max_rows_per_file must be a whole number of 1 or more; got {quoted(max_rows_per_file)}")
    if type(flush_interval_s) not in (int, float) or not 0 < flush_interval_s <= threading.TIMEOUT_MAX:
        raise ConfigError(f"flush_interval_s must be a number of seconds above 0; got {quoted(flush_interval_s)}")


def _settings_of(config: ProcessorConfig) -> dict[str, Any]:
    """Returns the settings of a processor that determine its output, under the names of the fields of a job."""
    names = {
        "model": ("model_source", "url", "deployment_name"),
        "engine": ("all_engine_kwargs",),
        "sampling": ("sampling_params",),
        "lora_modules": ("lora_modules",),
        "dynamic_lora_loading_path": ("dynamic_lora_loading_path",),
    }
    settings = {
        ours: next((getattr(config, theirs) for theirs in known if hasattr(config, theirs)), None)
        for ours, known in names.items()
    }
    given = {name: value for name, value in settings.items() if value is not None}
    comparable: dict[str, Any] = without_secrets(json.loads(json.dumps(given, default=str)))
    return comparable
