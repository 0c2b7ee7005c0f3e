"""Lance tables as output: one version for each job, whatever dies, and a message where the package is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace import ConfigError
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.folder import JobFolder
from millrace.pipeline.ledger import row_id
from millrace.pipeline.sinks.formats import FORMATS
from millrace.pipeline.sinks.formats import lance as lance_format
from millrace.pipeline.sinks.manifest import Manifest
from millrace.pipeline.sinks.parts import OutputSpec
from millrace.pipeline.sinks.publish import PLAN, RETRY, publish
from millrace.pipeline.sinks.writer import ResultWriter
from millrace.pipeline.sources.base import position_column
from millrace.pipeline.stages.base import Row, RowError

SCHEMA = pa.schema([("n", pa.int64()), ("v", pa.list_(pa.float16(), 4)), ("words", pa.list_(pa.string()))])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ConfigError, match=r"Lance tables need the package pylance: pip install 'millrace\[lance\]'"):
        FORMATS["lance"].fit_schema(SCHEMA)


def rows_of(folder: JobFolder, version: int | None = None) -> dict[int, Any]:
    lance = pytest.importorskip("lance")
    rows = lance.dataset(folder.root.url, version=version).to_table().to_pylist()
    assert len({row["n"] for row in rows}) == len(rows)
    return {row["n"]: row["v"] for row in rows}


def write(spec: OutputSpec, numbers: list[int], failed: tuple[int, ...] = ()) -> None:
    """Makes rows durable in the work folder."""
    writer = ResultWriter(spec, max_blocks=1)
    ids = row_id.from_arrow(position_column(0, numbers))
    with writer.block(ids) as block:
        for number, known in zip(numbers, row_id.as_bytes(ids), strict=True):
            values = {"n": number, "v": np.full(4, number, np.float16), "words": ["a"] * (number % 3)}
            error = RowError("generate", "NumericalError", "NaN") if number in failed else None
            writer.append(block, known, Row({"n": number}, values, error), Row({"n": number}, values, error))


def test_a_job_is_one_version_of_a_table_whatever_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lance = pytest.importorskip("lance")
    folder = JobFolder(Storage.at(tmp_path / "out"))
    spec = OutputSpec(folder.work, "lance", FORMATS["lance"].fit_schema(SCHEMA), max_rows_per_file=3)
    write(spec, [0, 1, 2, 3, 4], failed=(4,))
    commit = lance_format.FORMAT.publisher.commit

    def dies(*args: Any) -> None:
        commit(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:  # The process dies after the commit, before the manifest.
        dying.setattr(type(lance_format.FORMAT.publisher), "commit", lambda self, *args: dies(*args))
        with pytest.raises(KeyboardInterrupt):
            publish(folder.root, spec)
    assert (folder.work / PLAN).exists() and Manifest.read(folder.root) is None
    manifest = publish(folder.root, spec)
    assert (manifest.table_version, manifest.num_rows, manifest.num_failed, len(manifest.files)) == (1, 4, 1, 2)
    expected = {number: [float(number)] * 4 for number in range(4)}
    assert rows_of(folder) == expected
    table = lance.dataset(folder.root.url)
    assert len(table.versions()) == 1 and table.schema.field("v").type == pa.list_(pa.float16(), 4)

    folder.work.remove()  # The dead letter runs again: its row is added by a version of its own.
    (folder.work / RETRY).write_bytes(b"{}")
    write(spec, [4])
    again = publish(folder.root, spec, manifest)
    assert (again.table_version, again.num_rows, again.num_failed) == (2, 5, 0)
    assert rows_of(folder) == {**expected, 4: [4.0] * 4}

    folder.clear(lance_format.FORMAT.publisher)  # Another job replaces the content, and old versions stay readable.
    assert publish_numbers(spec, folder, [7]).table_version == 3
    assert rows_of(folder) == {7: [7.0] * 4}
    assert rows_of(folder, version=1) == expected


def publish_numbers(spec: OutputSpec, folder: JobFolder, numbers: list[int]) -> Manifest:
    write(spec, numbers)
    return publish(folder.root, spec)
