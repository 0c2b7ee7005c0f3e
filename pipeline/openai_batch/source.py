"""The lines of a batch file as a Ray dataset of raw, numbered lines: `BatchSource`."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from .. import columns
from ..files.storage import Storage
from ..ledger.index import RowIndex
from ..sources.base import position_column
from .input_index import CHUNK, CHUNK_BYTES, InputIndex, read_lines

BLOCK_BYTES = 4 * CHUNK_BYTES

LINE = "line"
LINE_NUMBER = "line_number"
IS_DUPLICATE = "is_duplicate"

SCHEMA = pa.schema([
    (LINE, pa.binary()), (LINE_NUMBER, pa.int64()), (IS_DUPLICATE, pa.bool_()), (columns.POSITION, pa.binary(12)),
])  # fmt: skip


@dataclass(frozen=True)
class BatchSource:
    """A batch file with its index, as an input whose `read` returns the lines as a dataset.

    Attributes:
        file: The batch file.
        index: Index of the lines.
    """

    file: Storage
    index: InputIndex

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the rows that `read` returns, without the column `__position`."""
        return pa.schema([field for field in SCHEMA if field.name != columns.POSITION])

    @property
    def num_rows(self) -> int:
        """Number of lines that are not empty."""
        return self.index.num_rows

    def read(self, done: RowIndex) -> ray.data.Dataset:
        """Returns the dataset of the lines that are not empty, without the chunks whose lines are all done.

        Args:
            done: Index of the ids of finished lines. A chunk with an unfinished line is read whole.
        """
        chunks = [chunk for chunk in self.index.chunks if done.count_between(*_bounds(chunk)) < chunk["num_rows"]]
        index = replace(self.index, chunks=np.array(chunks, CHUNK))
        dataset = ray.data.read_datasource(LineDatasource(self.file, index))
        # With the default of Ray Data, a task holds its lines back until they reach 128 MB.
        dataset.context.target_max_block_size = BLOCK_BYTES
        return dataset


class LineDatasource(Datasource):
    """A Ray datasource that reads a batch file by the chunks of its index.

    Args:
        file: The batch file.
        index: Index of the lines; only the chunks in it are read.
    """

    def __init__(self, file: Storage, index: InputIndex) -> None:
        super().__init__()
        self._file = file
        self._index = index

    def estimate_inmemory_data_size(self) -> int | None:
        """Returns the size of all chunks in bytes."""
        return int(self._index.chunks["num_bytes"].sum())

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Returns at most `parallelism` read tasks for consecutive chunks; a task yields one row block per chunk."""
        tasks = []
        for chunks in np.array_split(self._index.chunks, min(parallelism, len(self._index.chunks)) or 1):
            if len(chunks):
                read = functools.partial(read_chunks, self._file, chunks, self._duplicates_in(chunks))
                size, num_rows = int(chunks["num_bytes"].sum()), int(chunks["num_rows"].sum())
                about = BlockMetadata(num_rows=num_rows, size_bytes=size, input_files=None, exec_stats=None)
                tasks.append(ReadTask(read, about, schema=SCHEMA, per_task_row_limit=per_task_row_limit))
        return tasks

    def _duplicates_in(self, chunks: np.ndarray) -> np.ndarray:
        begin, last = chunks[0]["offset"], chunks[-1]
        low, high = np.searchsorted(self._index.duplicates, [begin, last["offset"] + last["num_bytes"]])
        return self._index.duplicates[low:high]


def read_chunks(file: Storage, chunks: np.ndarray, duplicates: np.ndarray) -> Iterator[pa.Table]:
    """Yields a row block for each chunk, with columns as in `SCHEMA`.

    Args:
        file: The batch file.
        chunks: Chunks to read, with dtype `CHUNK`.
        duplicates: Byte offsets of the lines in the chunks that repeat the `custom_id` of an earlier line, ascending.
    """
    with file.open_input() as opened:
        for chunk in chunks:
            opened.seek(int(chunk["offset"]))
            yield _block(opened.read(int(chunk["num_bytes"])), chunk, duplicates)


def _block(data: bytes, chunk: np.ndarray, duplicates: np.ndarray) -> pa.Table:
    numbered = enumerate(read_lines(io.BytesIO(data), int(chunk["offset"])), start=int(chunk["first_line"]))
    rows = [(number, offset, line.rstrip(b"\r\n")) for number, (offset, line) in numbered if line.strip()]
    offsets = np.array([offset for _, offset, _ in rows], np.uint64)
    return pa.table(
        {
            LINE: pa.array([line for _, _, line in rows], pa.binary()),
            LINE_NUMBER: pa.array([number for number, _, _ in rows], pa.int64()),
            IS_DUPLICATE: np.isin(offsets, duplicates),
            columns.POSITION: position_column(0, offsets),
        },
        schema=SCHEMA,
    )


def _bounds(chunk: np.void) -> tuple[bytes, bytes]:
    """Returns the row position of a line at the first byte of a chunk, and of a line after its last byte."""
    begin = int(chunk["offset"])
    low, high = position_column(0, [begin, begin + int(chunk["num_bytes"])]).to_pylist()
    return low, high
