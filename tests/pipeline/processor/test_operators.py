"""Rows to blocks and back: nothing changes its type on the way, and good and bad rows fit one table."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.pipeline.errors import RowFailedError
from millrace.pipeline.job.template import Template
from millrace.pipeline.processor.operators import Finish, Prepare, pack, result_columns, to_columns, to_schema, unpack
from millrace.pipeline.stages.base import Row, RowError
from millrace.pipeline.stages.user_function import PostprocessStage, PreprocessStage

BROKEN = RowError("generate", "PromptTooLongError", "too long")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5))
def test_rows_come_out_as_they_went_in(columns: list[dict[str, Any]]) -> None:
    rows = [Row.read(one) for one in columns]
    assert unpack(pack(rows)) == rows


def test_an_error_travels_with_its_row() -> None:
    assert unpack(pack([Row({"a": 1}, {}, BROKEN)]))[0].error == BROKEN


def test_preprocess_gets_plain_python_values() -> None:
    seen: list[dict[str, Any]] = []
    table = pa.table({"list": [[1, 2]], "chat": [[{"role": "user"}]], "none": [None], "day": [dt.date(2024, 1, 2)]})
    Prepare(lambda: [PreprocessStage(lambda row: seen.append(row) or {})])(table)
    assert seen == [{"list": [1, 2], "chat": [{"role": "user"}], "none": None, "day": dt.date(2024, 1, 2)}]


def test_a_failed_row_keeps_its_input_and_says_why() -> None:
    row = Row({"id": 1, "prompt": 3}, {"id": 1, "prompt": "changed"}, BROKEN)
    assert result_columns(row, mark_success=True) == {
        "id": 1,
        "prompt": 3,
        "__inference_error__": "generate: PromptTooLongError: too long",
        "finish_reason": "error",
    }


def test_a_good_row_says_so_only_where_rows_may_fail() -> None:
    row = Row({}, {"y": 1})
    assert result_columns(row, mark_success=True) == {"y": 1, "__inference_error__": ""}
    assert result_columns(row, mark_success=False) == {"y": 1}


def test_good_and_failed_blocks_read_back_as_one_dataset(tmp_path: Any) -> None:
    good = to_columns([result_columns(Row({"id": 1}, {"id": 1, "finish_reason": "stop"}), mark_success=True)])
    bad = to_columns([result_columns(Row({"id": 2}, {}, BROKEN), mark_success=True)])
    pq.write_table(good, tmp_path / "0.parquet")
    pq.write_table(bad, tmp_path / "1.parquet")
    table = pq.read_table(tmp_path)
    assert table["finish_reason"].to_pylist() == ["stop", "error"]
    assert table["__inference_error__"].to_pylist() == ["", "generate: PromptTooLongError: too long"]


def test_columns_of_results_have_their_type_even_without_a_value() -> None:
    table = to_columns([{"generated_text": None, "num_input_tokens": None, "logprobs": None}])
    assert table.schema.field("generated_text").type == pa.string()
    assert table.schema.field("num_input_tokens").type == pa.int64()
    assert not pa.types.is_null(table.schema.field("logprobs").type)


def test_logprobs_and_sequences_have_columns() -> None:
    logprobs = [{7: {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}, None]
    sequence = {"index": 0, "text": "a", "token_ids": [7], "finish_reason": "stop", "stop_reason": None}
    rows = [{"logprobs": logprobs, "outputs": [{**sequence, "cumulative_logprob": None, "logprobs": logprobs}]}]
    table = to_columns(rows)
    assert table["logprobs"].to_pylist()[0][0] == [(7, logprobs[0][7])]
    assert table["outputs"].to_pylist()[0][0]["token_ids"] == [7]


def test_a_known_name_may_hold_what_the_user_wants() -> None:
    assert to_columns([{"params": 3}])["params"].to_pylist() == [3]


@pytest.mark.parametrize("values", [["a", 3], [np.ones((2, 2)), np.ones((2, 2))], [decimal.Decimal(1), object()]])
def test_what_arrow_cannot_type_is_left_to_ray(values: list[Any]) -> None:
    columns = to_columns([{"x": value, "y": 1} for value in values])
    assert isinstance(columns, dict)
    assert all(given is value for given, value in zip(columns["x"], values, strict=True))


@pytest.mark.parametrize(
    "values",
    [[dt.date(2020, 1, 1), 5], ["a", b"a"], [1.5, True]],
)
def test_values_that_a_column_would_change_are_pickled(values: list[Any]) -> None:
    block = to_columns([{"x": value, "y": 1, "z": object()} for value in values])
    assert isinstance(block, pa.Table)
    assert block["x"].to_pylist() == values
    assert list(map(type, block["x"].to_pylist())) == list(map(type, values))
    assert block["y"].to_pylist() == [1, 1]


def test_a_schema_fixes_columns_order_and_types() -> None:
    schema = pa.schema([("id", pa.int32()), ("text", pa.string()), ("__inference_error__", pa.string())])
    rows = [Row({"id": 1}, {"text": "a", "id": 1, "other": 2}), Row({"id": 2}, {}, BROKEN)]
    table = to_schema(rows, schema)
    assert table.schema == schema
    assert table["text"].to_pylist() == ["a", None]


def test_a_value_that_does_not_fit_its_column_fails_its_row_only() -> None:
    schema = pa.schema([("id", pa.int64()), ("n", pa.int64()), ("__inference_error__", pa.string())])
    rows = [Row({"id": 1}, {"id": 1, "n": 1}), Row({"id": 2}, {"id": 2, "n": "many"})]
    table = to_schema(rows, schema)
    assert table["id"].to_pylist() == [1, 2]
    assert table["n"].to_pylist() == [1, None]
    assert table["__inference_error__"].to_pylist() == [
        "",
        "write: TypeError: column 'n' holds 'many', which is not int64",
    ]


def test_an_empty_block_passes() -> None:
    assert Finish(list, mark_success=True)(pack([])).num_rows == 0


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth - 1):
        value = [value]
    return value


def finish(*values: Any, mark_success: bool = True) -> Any:
    """Passes a column `x` of the given values, as a postprocess returns them, through the last operator."""
    made = [PostprocessStage(lambda row: {"x": values[row["id"]]})]
    return Finish(lambda: made, mark_success)(pack([Row.read({"id": at}) for at in range(len(values))]))


HUGE = [2**63 + 5, {"a": [2**63, None]}, [[1], [2**64 - 1]]]


@pytest.mark.parametrize("value", HUGE)
def test_integers_beyond_int64_get_an_unsigned_column(value: Any) -> None:
    assert finish(value)["x"].to_pylist() == [value]


def test_nanoseconds_stay_in_a_column_without_a_given_type() -> None:
    times = pa.array([10**18 + 1, None], pa.timestamp("ns"))
    assert finish(*times.to_pylist())["x"].to_pylist() == times.to_pylist()


HOPELESS = ["\ud800", [{"b": "\udfff"}], 10**20, {"n": -(2**70)}, nested(600)]


@pytest.mark.parametrize("value", HOPELESS, ids=["half", "nested half", "20 digits", "nested digits", "600 deep"])
def test_a_value_that_no_column_holds_fails_its_row_only(value: Any) -> None:
    table = finish(1, value, 3)
    assert table["x"].to_pylist() == [1, None, 3]
    assert table["id"].to_pylist() == [None, 1, None]
    good, error, _ = table["__inference_error__"].to_pylist()
    assert (good, error[:25]) == ("", "write: " + error[7:25])
    assert "column 'x' holds" in error and len(error) < 500
    with pytest.raises(RowFailedError, match="column 'x' holds"):
        finish(value, mark_success=False)


def test_a_row_that_cannot_be_pickled_fails_alone() -> None:
    table = pa.table({"id": [0, 1]})
    prepare = Prepare(lambda: [PreprocessStage(lambda row: {"x": nested(900) if row["id"] else 0})])
    good, bad = unpack(prepare(table))
    assert (good.error, good.data["x"]) == (None, 0)
    assert str(bad.error).startswith("preprocess: RecursionError")
    assert bad.input == {"id": 1}


def test_an_error_may_quote_any_text() -> None:
    error = RowError.from_exception("postprocess", ValueError("no \ud800"))
    assert to_columns([result_columns(Row({}, {}, error), mark_success=True)]).num_rows == 1


BAD_TEXT = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ok"]).buffers())


@pytest.mark.parametrize(
    "column",
    [
        BAD_TEXT,
        pa.ListArray.from_arrays([0, 1, 2], BAD_TEXT),
        pa.array([253_402_300_800_000_000, 0], pa.timestamp("us", "UTC")),
        pa.array([4_000_000, None], pa.date32()),
        pa.array([10**13 + 1, 1000], pa.time64("ns")),
        pa.array([10**18 + 1, 0], pa.timestamp("ns")),
        pa.array([2**62, 0], pa.duration("s")),
        pa.array([2**63 + 5, 0], pa.uint64()),
    ],
    ids=str,
)
def test_a_value_that_python_lacks_is_carried_as_it_is(column: pa.Array) -> None:
    table = pa.table({"x": column, "id": [0, 1]})
    packed = Prepare(list)(table)
    assert Finish(list, mark_success=False)(packed)["x"].combine_chunks().equals(column)
    typed = Finish(list, True, table.schema)(packed)
    assert typed.equals(table)


def test_a_value_that_python_lacks_fails_the_row_that_uses_it() -> None:
    table = pa.table({"x": BAD_TEXT})
    template = Template.parse("Say {x}")
    prepare = Prepare(lambda: [PreprocessStage(lambda row: {"prompt": template.render(row)})])
    bad, good = unpack(prepare(table))
    assert "column 'x' must be text, a number or a date; got ArrowValue <string \\xff\\xfe>" in str(bad.error)
    assert good.data["prompt"] == "Say ok"
