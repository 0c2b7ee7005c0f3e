"""What is known to be done: row ids, the index of them, records, and who may write."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace import ConfigError
from millrace.engine.errors import DamagedOutputError
from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.durable import Identity
from millrace.pipeline.ledger import row_id
from millrace.pipeline.ledger.counts import Counts
from millrace.pipeline.ledger.epoch import Epoch
from millrace.pipeline.ledger.index import RowIndex
from millrace.pipeline.ledger.records import (
    COMMIT,
    TRAILER,
    Record,
    read_ids,
    read_record,
    read_records,
    write_commit,
    write_flush,
)
from millrace.pipeline.sources.base import position_column

NUMBERS = st.lists(st.integers(0, 300), max_size=40)


def ids(*numbers: int, file: int = 0) -> np.ndarray:
    return row_id.from_arrow(position_column(file, numbers))


def flush(work: Storage, name: str, *numbers: int) -> str:
    rows = pa.table({columns.ROW_ID: row_id.to_arrow(ids(*numbers)), "n": list(numbers)})
    write_flush(work, name, rows, Counts(num_rows=len(numbers)))
    return name


def commit(work: Storage, name: str, *numbers: int, replaces: tuple[str, ...] = ()) -> str:
    counts = Counts(num_rows=len(numbers))
    write_commit(work, Record(name, len(numbers), counts, "part", 9, replaces, b"a", b"b"), ids(*numbers))
    return name


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**62)), max_size=20))
def test_ids_of_positions_have_the_order_of_the_input(places: list[tuple[int, int]]) -> None:
    made = [ids(place, file=file) for file, place in places]
    joined = np.concatenate(made) if made else np.empty(0, row_id.ID_TYPE)
    order = sorted(range(len(places)), key=places.__getitem__)
    assert [places[at] for at in np.argsort(joined, kind="stable")] == [places[at] for at in order]
    assert row_id.as_bytes(joined) == [f.to_bytes(4, "big") + p.to_bytes(8, "big") for f, p in places]
    assert (row_id.from_arrow(row_id.to_arrow(joined)) == joined).all()


def test_an_id_may_end_with_zero_bytes_and_be_part_of_a_longer_column() -> None:
    array = row_id.to_arrow(ids(0, 256, 1))
    assert row_id.as_bytes(row_id.from_arrow(array.slice(1))) == [bytes(10) + b"\1\0", bytes(11) + b"\1"]
    chunks = pa.chunked_array([array, array.slice(2)])
    assert (row_id.from_arrow(chunks) == ids(0, 256, 1, 1)).all()


def test_a_key_tells_values_and_types_apart() -> None:
    rows = [{"a": "1", "b": 2}, {"a": "1", "b": 3}, {"a": "12", "b": None}, {"a": None, "b": 3}]
    found = Identity(("a", "b")).ids_of(pa.Table.from_pylist(rows))
    assert len(set(row_id.as_bytes(found))) == 4
    assert row_id.as_bytes(found[:1]) == row_id.as_bytes(row_id.key_ids(pa.table({"a": ["1"], "b": [2]}), ["a", "b"]))
    assert found[0] != row_id.key_ids(pa.table({"a": [1], "b": [2]}), ["a", "b"])[0]


def test_rows_without_a_key_are_known_by_their_position() -> None:
    table = pa.table({"k": ["x", None, None], columns.POSITION: row_id.to_arrow(ids(0, 1, 2))})
    assert (Identity(("k",)).ids_of(table)[1:] == ids(1, 2)).all()
    floats = pa.table({"k": [1.5, float("nan"), None], columns.POSITION: table[columns.POSITION]})
    assert (Identity(("k",)).ids_of(floats)[1:] == ids(1, 2)).all()


def test_rows_with_neither_key_nor_position_are_refused() -> None:
    with pytest.raises(ConfigError, match="key: a row has no value in k, so it cannot be told from others"):
        Identity(("k",)).ids_of(pa.table({"k": ["x", None, None]}))


@given(st.lists(NUMBERS, max_size=8), NUMBERS)
def test_the_index_is_a_set_that_grows(added: list[list[int]], asked: list[int]) -> None:
    index = RowIndex([ids(*numbers) for numbers in added[:2]])
    for numbers in added[2:]:
        index.add(ids(*numbers))
    known = {number for numbers in added for number in numbers}
    assert index.contains(ids(*asked)).tolist() == [number in known for number in asked]
    everything = sorted(number for numbers in added for number in numbers)
    assert index.count_between(*row_id.as_bytes(ids(10, 100))) == sum(10 <= number < 100 for number in everything)
    assert row_id.as_bytes(index.sorted_ids()) == row_id.as_bytes(ids(*everything))


def test_a_commit_stands_for_the_flushes_that_it_replaces(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    first, second = flush(work, "results/000001-000000.flush", 3, 1), flush(work, "results/000001-000001.flush", 2)
    name = commit(work, "results/000001-000002" + COMMIT, 1, 3, replaces=(first,))
    records = read_records(work, [first, second, name])
    assert [record.name for record in records] == [second, name]
    assert [record.num_rows for record in records] == [1, 2]
    assert [row_id.as_bytes(read_ids(work, record)) for record in records] == [
        row_id.as_bytes(ids(2)),
        row_id.as_bytes(ids(1, 3)),
    ]


def test_a_writer_knows_what_its_predecessors_left_and_not_what_they_add_later(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    first = Epoch.open(work)
    early = flush(work, first.next_name("results") + ".flush", 1)
    second = Epoch.open(work)
    late = flush(work, first.next_name("results") + ".flush", 2)
    own = flush(work, second.next_name("failed") + ".flush", 3)
    third = Epoch.open(work)
    assert second.records == (early,)
    assert third.records == tuple(sorted((early, own)))
    assert late not in third.records
    assert [epoch.is_last() for epoch in (first, second, third)] == [False, False, True]


def test_a_writer_that_died_before_it_looked_changes_nothing(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    first = Epoch.open(work)
    name = flush(work, first.next_name("results") + ".flush", 1)
    (work / "epochs" / "000002.json").write_bytes(b'{"token": "died"}')
    assert Epoch.open(work).records == (name,)


@pytest.mark.parametrize("name", [".results.tmp", "000001-000000.flush.tmp"])
def test_drafts_are_no_records(tmp_path: Path, name: str) -> None:
    work = Storage.at(tmp_path)
    (work / "results" / name).write_bytes(b"half")
    assert Epoch.open(work).records == ()


def test_a_record_of_an_older_version_is_read_without_a_checksum(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    name = flush(work, "results/000001-000000.flush", 1, 2)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: -TRAILER.size])
    (work / "epochs" / "000001.json").write_bytes(b'{"token": "t", "records": []}')
    (record,) = read_records(work, Epoch.open(work).records)
    assert row_id.as_bytes(read_ids(work, record)) == row_id.as_bytes(ids(1, 2))


@pytest.mark.parametrize("place", [0, 3, 100, -1, -9, -20, -40])
@pytest.mark.parametrize("bit", [1, 64])
def test_a_flipped_bit_in_a_record_is_found(tmp_path: Path, place: int, bit: int) -> None:
    work = Storage.at(tmp_path)
    name = flush(work, "results/000001-000000.flush", 1, 2)
    data = bytearray((tmp_path / name).read_bytes())
    data[place] ^= bit
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DamagedOutputError, match=r"000001-000000\.flush"):
        read_records(work, [name])


def test_a_commit_that_names_a_part_outside_its_folder_is_refused(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    write_commit(work, Record("results/a.ids", 1, Counts(), "../../x", 9), ids(1))
    with pytest.raises(DamagedOutputError, match="not inside that folder"):
        read_records(work, ["results/a.ids"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"token": 1}', b'{"token": "t", "records": 3}'])
def test_a_damaged_epoch_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    work = Storage.at(tmp_path)
    (work / "epochs" / "000001.json").write_bytes(content)
    with pytest.raises(DamagedOutputError, match=r"000001\.json' is damaged"):
        Epoch.open(work)


def test_epochs_that_open_at_the_same_moment_have_numbers_of_their_own(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        opened = list(threads.map(lambda _: Epoch.open(work), range(8)))
    assert sorted(epoch.number for epoch in opened) == list(range(1, 9))
    assert sum(epoch.is_last() for epoch in opened) == 1


def test_an_epoch_of_any_name_or_content_is_refused_or_no_epoch(tmp_path: Path) -> None:
    work = Storage.at(tmp_path)
    (tmp_path / "epochs").mkdir()
    for name in ("9" * 250, "\u0663" * 6, "1"):
        (tmp_path / "epochs" / f"{name}.json").touch()
    assert Epoch.open(work).number == 1
    for content in ("[" * 200_000, "5", '{"token": 5}', '{"token": "", "records": [5]}'):
        (tmp_path / "epochs" / "000002.json").write_text(content)
        with pytest.raises(DamagedOutputError, match=r"000002\.json"):
            Epoch.open(work)
        (tmp_path / "epochs" / "000003.json").unlink()


@pytest.mark.parametrize("odd", [{"num_rows": "x"}, {"num_rows": None}, {"counts": 5}, {"replaces": 5}, {"first": "x"}])
def test_a_record_with_odd_values_is_refused_with_its_name(tmp_path: Path, odd: dict[str, Any]) -> None:
    about = {"num_rows": 1, "counts": {}, "part": "results/a.parquet"} | odd
    rows = pa.table({"n": [1]}).replace_schema_metadata({"millrace": json.dumps(about)})
    with pa.ipc.new_file((tmp_path / "a.ids").open("wb"), rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(DamagedOutputError, match=r"a\.ids"):
        read_record(Storage.at(tmp_path), "a.ids")
