"""The index of a batch file: lines, chunks, repeated ids; and the dataset read by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.ledger.index import RowIndex
from millrace.pipeline.ledger.row_id import ID_TYPE
from millrace.pipeline.openai_batch import input_index
from millrace.pipeline.openai_batch.duplicates import DuplicateFinder
from millrace.pipeline.openai_batch.input_index import InputIndex
from millrace.pipeline.openai_batch.source import IS_DUPLICATE, LINE, LINE_NUMBER, BatchSource


@given(keys=st.lists(st.text(max_size=2)), buffered=st.integers(1, 50))
def test_later_places_of_a_key_are_found_in_memory_and_on_disk(
    keys: list[str], buffered: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    finder = DuplicateFinder(tmp_path_factory.mktemp("keys"), buffered)
    for place, key in enumerate(keys):
        finder.add(key, place)
    assert finder.places().tolist() == [place for place, key in enumerate(keys) if key in keys[:place]]


def row(custom_id: object, model: str = "m") -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"model": model}}).encode()


LINES = [b"", row("a", "one"), b"  ", row("b", "two"), b"{broken", row("a"), row(5), row("b"), row("c"), row("a")]
"""Lines 1 and 3 are empty; 6, 8 and 10 repeat an id."""


def write(folder: Path, end: bytes = b"\n") -> Storage:
    path = folder / "in.jsonl"
    path.write_bytes(end.join(LINES))
    return Storage.at(path)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_index_counts_and_finds(tmp_path: Path, end: bytes) -> None:
    index = InputIndex.scan(write(tmp_path, end))
    again = InputIndex.from_bytes(index.to_bytes())
    assert (again.num_rows, again.num_empty, again.model) == (8, 2, "one")
    assert again.duplicates.tolist() == [len(end.join(LINES[:number])) + len(end) for number in (5, 7, 9)]
    assert again.chunks.tolist() == index.chunks.tolist()


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n\n")
    index = InputIndex.from_bytes(InputIndex.scan(Storage.at(path)).to_bytes())
    assert (index.num_rows, index.num_empty, index.model, len(index.duplicates)) == (0, 2, None, 0)


def test_the_dataset_holds_every_line_once_with_its_number(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_index, "CHUNK_ROWS", 3)
    file = write(tmp_path)
    source = BatchSource(file, InputIndex.scan(file))
    rows = sorted(source.read(RowIndex()).take_all(), key=lambda one: one[LINE_NUMBER])
    assert [(one[LINE_NUMBER], one[LINE]) for one in rows] == [
        (number, text) for number, text in enumerate(LINES, start=1) if text.strip()
    ]
    assert [one[LINE_NUMBER] for one in rows if one[IS_DUPLICATE]] == [6, 8, 10]
    positions = [one[columns.POSITION] for one in rows]
    assert positions == sorted(positions)
    assert {len(position) for position in positions} == {12}
    done = RowIndex([np.array(positions[:4], ID_TYPE)])
    rest = source.read(done).take_all()
    assert sorted(one[LINE_NUMBER] for one in rest) == [6, 7, 8, 9, 10]
