"""`Sample`: rows spread over the whole input of a job, read without Ray and without the rest of the input."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..arrow_values import to_rows
from ..sources import Source, Unit
from ..sources.formats import FORMATS

MAX_UNITS = 24
"""Most units of the input that are sampled. The first tables of each are read."""

TABLES_PER_UNIT = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows drawn from an input, and the number of rows of the whole input.

    Attributes:
        rows: The rows, in the order of the input.
        num_rows: Rows of the whole input, counted or estimated from the bytes of a row; None if not known.
        is_exact: Whether `num_rows` was counted.
    """

    rows: list[dict[str, Any]]
    num_rows: int | None
    is_exact: bool

    @classmethod
    def take(cls, source: Source, size: int, seed: int = 0) -> Sample:
        """Reads the first tables of units that are spread over an input, and draws rows from these tables.

        Args:
            source: The input.
            size: Rows to draw. If the tables hold fewer, all their rows are taken.
            seed: Seed of the draw.
        """
        rng = random.Random(seed)
        chosen = spread(source.units, MAX_UNITS, rng)
        tables = [table for unit in chosen for table in _first_tables(source, unit, len(chosen))]
        num_read = sum(table.num_rows for table in tables)
        wanted = sorted(rng.sample(range(num_read), min(size, num_read)))
        rows = list(_rows_at(tables, wanted, source.schema))
        if source.num_rows is not None:
            return cls(rows, source.num_rows, True)
        return cls(rows, _guess_num_rows(source, tables), False)


def spread(units: Sequence[Unit], most: int, rng: random.Random) -> list[Unit]:
    """Returns all units if they are at most `most`, or else a random unit of each of `most` equal parts of the list."""
    if len(units) <= most:
        return list(units)
    edges = [index * len(units) // most for index in range(most + 1)]
    return [units[rng.randrange(start, stop)] for start, stop in itertools.pairwise(edges)]


def _first_tables(source: Source, unit: Unit, num_units: int) -> Iterator[pa.Table]:
    """Yields the first `TABLES_PER_UNIT` tables of a unit, or more if the `num_units` units of the sample are few."""
    return itertools.islice(source.tables(unit), TABLES_PER_UNIT * max(1, MAX_UNITS // num_units))


def _rows_at(tables: Sequence[pa.Table], wanted: Sequence[int], schema: pa.Schema) -> Iterator[dict[str, Any]]:
    start = 0
    for table in tables:
        stop = start + table.num_rows
        inside = [index - start for index in wanted if start <= index < stop]
        yield from to_rows(table.take(pa.array(inside, pa.int64())), schema)
        start = stop


def _guess_num_rows(source: Source, tables: Sequence[pa.Table]) -> int | None:
    """Estimates the number of rows of an input: its bytes, divided by the mean bytes of a row of the tables."""
    row_bytes = [FORMATS[source.format].row_bytes(table) for table in tables if table.num_rows > 1]
    total_bytes = sum(unit.num_bytes for unit in source.units)
    return round(total_bytes * len(row_bytes) / sum(row_bytes)) if row_bytes and total_bytes else None
