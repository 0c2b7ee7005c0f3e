"""Types of a column that differ between files: no value is changed by the type of another file without an error."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from millrace.pipeline.arrow_values import UNFIT, cast, plain_type, python_values
from millrace.pipeline.common_type import common_type
from millrace.pipeline.job.template import Template

VALUES: dict[pa.DataType, list[Any]] = {
    pa.int8(): [-128],
    pa.int32(): [-(2**31)],
    pa.int64(): [-(2**63), 2**53 + 1, 7],
    pa.uint32(): [2**32 - 1],
    pa.uint64(): [2**64 - 1, 3],
    pa.float32(): [0.5, 2.0**120],
    pa.float64(): [0.1, 1e300],
    pa.bool_(): [True],
    pa.decimal128(5, 2): [Decimal("123.45")],
    pa.decimal128(38, 10): [Decimal("1234567890123456789012345678.0123456789")],
    pa.decimal256(76, 0): [Decimal(10) ** 75],
    pa.decimal128(3, -2): [Decimal("12300")],
    pa.date32(): [dt.date(2020, 1, 2)],
    pa.timestamp("s"): [dt.datetime(9999, 1, 1), dt.datetime(2020, 1, 1)],
    pa.timestamp("ns"): [dt.datetime(2020, 1, 1, 1, 1, 1, 5)],
    pa.timestamp("us", "UTC"): [dt.datetime(2020, 1, 1, tzinfo=dt.UTC)],
    pa.time64("us"): [dt.time(1, 2, 3, 4)],
    pa.duration("s"): [dt.timedelta(days=5)],
    pa.dictionary(pa.int32(), pa.string()): ["q"],
    pa.null(): [None],
}
NESTED: dict[pa.DataType, list[Any]] = {
    made: [wrap(value) for value in VALUES[kind]]
    for kind in VALUES
    for made, wrap in (
        (pa.list_(kind), lambda value: [value]),
        (pa.large_list(kind), lambda value: [value, None]),
        (pa.struct([("a", kind)]), lambda value: {"a": value}),
        (pa.map_(pa.string(), kind), lambda value: [("key", value)]),
    )
}


def _is_same_or_refused(value: Any, kind: pa.DataType, common: pa.DataType) -> bool:
    try:
        (cell,) = python_values(cast(pa.chunked_array([pa.array([value], kind)]), common))
    except UNFIT:  # Of a float that is no such integer, and of a moment in nanoseconds that ends in the year 2262.
        return any(kind in str(common) for kind in ("float", "double", "timestamp[ns]"))
    is_shown_as_text = pa.types.is_string(common)
    return is_shown_as_text or cell == value


@pytest.mark.parametrize("values", [VALUES, NESTED], ids=["plain", "nested"])
def test_a_value_is_the_same_in_the_common_type_or_is_refused(values: dict[pa.DataType, list[Any]]) -> None:
    for one, other in itertools.combinations(values, 2):
        common = common_type(plain_type(one), plain_type(other))
        for kind in (one, other):
            for value in values[kind]:
                assert _is_same_or_refused(value, kind, common), (one, other, common, value)


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (pa.int8(), pa.uint32(), pa.int64()),
        (pa.int64(), pa.uint64(), pa.decimal128(20)),
        (pa.int64(), pa.decimal128(5, 2), pa.decimal128(21, 2)),
        (pa.uint64(), pa.decimal128(3, -2), pa.decimal128(20)),
        (pa.decimal128(38), pa.decimal128(38, 38), pa.decimal256(76, 38)),
        (pa.decimal256(76), pa.decimal128(5, 2), pa.string()),
        (pa.decimal128(5, 2), pa.float64(), pa.string()),
        (pa.string(), pa.binary(), pa.string()),
        (pa.binary(2), pa.large_string(), pa.string()),
        (pa.list_(pa.uint64()), pa.list_(pa.int64()), pa.list_(pa.decimal128(20))),
        (pa.list_(pa.int64(), 2), pa.large_list(pa.int32()), pa.large_list(pa.int64())),
        (pa.list_(pa.decimal128(5, 2)), pa.list_(pa.float64()), pa.string()),
        (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.string())]), pa.struct({"a": pa.int8(), "b": pa.string()})),
        (pa.struct([("a", pa.uint64())]), pa.struct([("a", pa.int8())]), pa.struct([("a", pa.decimal128(20))])),
        (pa.list_(pa.int64()), pa.int64(), pa.string()),
        (pa.list_(pa.struct([])), pa.list_(pa.null()), pa.list_(pa.struct([]))),
    ],
)  # fmt: skip
def test_the_common_type_has_room_for_both(one: pa.DataType, other: pa.DataType, common: pa.DataType) -> None:
    assert common_type(one, other) == common
    assert common_type(pa.null(), one) == one == common_type(one, pa.null())


def test_uuids_and_tensors_beside_other_types_are_shown_as_python_shows_them() -> None:
    uuids = pa.array([uuid.UUID(bytes=b"0" * 16).bytes, uuid.UUID(int=255).bytes], pa.binary(16)).cast(pa.uuid())
    assert common_type(pa.uuid(), pa.string()) == pa.string()
    assert cast(pa.chunked_array([uuids]), pa.string()).to_pylist() == [
        "30303030-3030-3030-3030-303030303030",
        "00000000-0000-0000-0000-0000000000ff",
    ]
    storage = pa.array([[0.5, 2.0]], pa.list_(pa.float64(), 2))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float64(), (2,)), storage)
    common = common_type(tensors.type, pa.list_(pa.float64()))
    assert cast(pa.chunked_array([tensors]), common).to_pylist() in (["[0.5, 2.0]"], [[0.5, 2.0]])


@pytest.mark.parametrize("kind", [kind for kind in VALUES if kind not in (pa.null(), pa.duration("s"))], ids=str)
def test_a_value_in_a_column_of_text_is_written_as_a_prompt_shows_it_alone(kind: pa.DataType) -> None:
    given = pa.chunked_array([pa.array(VALUES[kind], kind)])
    shown = [Template.parse("{x}").render({"x": value}) for value in given.to_pylist()]
    assert cast(given, pa.string()).to_pylist() == shown


def test_structs_with_fields_of_one_name_keep_both() -> None:
    twice, once = pa.struct([("a", pa.int64()), ("a", pa.int64())]), pa.struct([("a", pa.int64())])
    assert common_type(twice, once) == pa.string()
    column = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], fields=list(twice))
    (text,) = cast(pa.chunked_array([column]), pa.string()).to_pylist()
    assert json.loads(text) == [["a", 1], ["a", 2]]
