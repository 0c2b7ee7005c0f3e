"""Input files of any kind, for hypothesis: columns of every type of Arrow, JSON and CSV as strangers write them."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from hypothesis import assume
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

NAMES = st.sampled_from(
    [
        *(
            "text",
            "meta",
            "value",
            "x",
            "a.b",
            "a b",
            "",
            " ",
            "{x}",
            "é\u0301",
            "\ufeffx",
            "N" * 300,
            "\x00",
            "x\n",
            '"',
        ),
        *("messages", "prompt", "tools", "outputs", "chat_template", "sampling_params", "metrics"),
    ]
)
"""Names of columns. Some are those of columns that stages look for."""

FIXED = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.date32(), pa.date64()),
    *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.binary(3), pa.binary(16)),
    *(pa.decimal128(5, 2), pa.decimal128(38, -3), pa.decimal256(76, 10), pa.month_day_nano_interval()),
    *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
    *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "+05:30", "Europe/Oslo")),
]
TEXTS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(), pa.binary_view()]


def _nested(inner: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.DataType]:
    return st.one_of(
        st.builds(pa.list_, inner),
        st.builds(pa.large_list, inner),
        st.builds(pa.list_, inner, st.integers(1, 3)),
        st.builds(pa.list_view, inner),
        st.builds(pa.map_, st.sampled_from([pa.string(), pa.int32()]), inner),
        st.builds(pa.struct, st.lists(st.tuples(st.sampled_from(["a", "b", "", "{"]), inner), max_size=3)),
    )


PLAIN_TYPES = st.sampled_from([*FIXED, *TEXTS, pa.null()])
TYPES = st.one_of(
    PLAIN_TYPES,
    st.recursive(PLAIN_TYPES, _nested, max_leaves=4),
    st.builds(pa.dictionary, st.sampled_from([pa.int8(), pa.int32()]), st.sampled_from([pa.string(), pa.int64()])),
    st.builds(pa.run_end_encoded, st.just(pa.int32()), st.sampled_from([pa.string(), pa.int64()])),
    st.just(pa.uuid()),
)
BYTES = st.one_of(st.text(max_size=8).map(str.encode), st.binary(max_size=6), st.just(b'{"a": 1}'), st.just(b"12"))


def array_of(draw: Draw, kind: pa.DataType, size: int) -> pa.Array:
    """Returns an array of any values that the memory of a type can hold: days after year 9999, text that is none."""
    types = pa.types
    if isinstance(kind, pa.UuidType):
        return pa.ExtensionArray.from_storage(kind, array_of(draw, pa.binary(16), size))
    if types.is_null(kind):
        return pa.nulls(size)
    if types.is_dictionary(kind):
        values = array_of(draw, kind.value_type, 3)
        indices = draw(st.lists(st.none() | st.integers(0, 2), min_size=size, max_size=size))
        return pa.DictionaryArray.from_arrays(pa.array(indices, kind.index_type), values)
    if types.is_run_end_encoded(kind):
        if not size:
            return pa.nulls(0, kind)
        return pa.RunEndEncodedArray.from_arrays(pa.array([size], pa.int32()), array_of(draw, kind.value_type, 1))
    if kind in TEXTS:
        cells = draw(st.lists(st.none() | BYTES, min_size=size, max_size=size))
        is_long = kind in (pa.large_string(), pa.large_binary())
        raw = pa.array(cells, pa.large_binary() if is_long else pa.binary())
        if kind == pa.string_view() or kind == pa.binary_view():
            raw = raw.cast(pa.binary_view())
        return pa.Array.from_buffers(kind, size, raw.buffers())
    if kind.num_fields or pa.types.is_struct(kind):
        return _nested_array(draw, kind, size)
    width = kind.bit_width
    raw = draw(st.binary(min_size=-(-size * width // 8), max_size=-(-size * width // 8)))
    if draw(st.booleans()):  # Small numbers, which most types have values for.
        raw = bytes(at % max(1, width // 8) == 0 and byte for at, byte in enumerate(raw))
    return pa.Array.from_buffers(kind, size, [_mask(draw, size), pa.py_buffer(raw)])


def _mask(draw: Draw, size: int) -> pa.Buffer | None:
    if draw(st.booleans()):
        return None
    return pa.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), pa.bool_()).buffers()[1]


def _nested_array(draw: Draw, kind: pa.DataType, size: int) -> pa.Array:
    types = pa.types
    if types.is_struct(kind):
        children = [array_of(draw, field.type, size) for field in kind]
        mask = pa.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), pa.bool_())
        if not children:
            return pa.array([None if one else {} for one in mask.to_pylist()], kind)
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(array_of(draw, kind.value_type, size * kind.list_size), type=kind)
    lengths = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    offsets = np.cumsum([0, *lengths]).tolist()
    if types.is_map(kind):
        keys = pa.array(range(offsets[-1])).cast(kind.key_type)
        return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), keys, array_of(draw, kind.item_type, offsets[-1]))
    values = array_of(draw, kind.value_type, offsets[-1])
    if types.is_list_view(kind):
        return pa.ListViewArray.from_arrays(pa.array(offsets[:-1], pa.int32()), pa.array(lengths, pa.int32()), values)
    made = pa.LargeListArray if types.is_large_list(kind) else pa.ListArray
    return made.from_arrays(pa.array(offsets, pa.int64() if types.is_large_list(kind) else pa.int32()), values)


@st.composite
def columnar_files(draw: Draw) -> tuple[str, list[bytes], list[int]]:
    """Draws the extension of files of Parquet or Arrow, their bytes, and the numbers in their columns ``id``."""
    extension = draw(st.sampled_from(["parquet", "arrow", "arrows"]))
    files, ids = [], []
    for at in range(draw(st.integers(1, 3))):
        size = draw(st.integers(0, 5))
        names = draw(st.lists(NAMES, max_size=3, unique=draw(st.booleans())))
        own = [10 * at + row for row in range(size)]
        try:
            columns = [array_of(draw, draw(TYPES), size) for _ in names]
            table = pa.table([pa.array(own, pa.int64()), *columns], names=["id", *names])
            files.append(_encoded(table, extension, draw(st.integers(1, 4))))
        except (pa.ArrowException, OSError, ValueError):
            assume(False)  # The library makes no such column, or writes no such file.
        ids += own
    return extension, files, ids


def _encoded(table: pa.Table, extension: str, chunk_rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    if extension == "parquet":
        pq.write_table(table, sink, row_group_size=chunk_rows)
    else:
        opened = pyarrow.ipc.new_file if extension == "arrow" else pyarrow.ipc.new_stream
        with opened(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk_rows)
    return sink.getvalue().to_pybytes()


NUMBERS = st.sampled_from(
    ["0", "-0", "1.5", "2e400", "9007199254740993", "9223372036854775808", "1" * 25, "1e5", "-0.0", "NaN", "Infinity"]
)
JSON_TEXTS = st.one_of(
    st.text(max_size=6).map(json.dumps),
    st.sampled_from(
        ['"\\ud800"', '"\\u0000"', '"2024-01-01"', '"2024-01-01T00:00:00Z"', '"12"', '"{}"', '"[1]"', '""']
    ),
)
JSON_VALUES = st.recursive(
    NUMBERS
    | JSON_TEXTS
    | st.sampled_from(["null", "true", "false", "[]", "{}", "[null]", "[[]]", "[" * 60 + "]" * 60]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        st.lists(
            st.tuples(st.sampled_from(["a", "b", "", "role", "content", "\\ud800", "\\u0000"]), inner), max_size=3
        ).map(lambda pairs: "{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}"),
    ),
    max_leaves=6,
)
ODD_LINES = st.sampled_from(
    [
        b"",
        b"  ",
        b"[1]",
        b"3",
        b"null",
        b'"x"',
        b"{",
        b'{"id": }',
        b"\xff\xfe",
        b"\x00",
        b'{"x": "\xff"}',
        b"{}",
        b"[" * 3000,
    ]
) | st.binary(max_size=8)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@st.composite
def json_files(draw: Draw) -> tuple[str, list[bytes], list[int]]:
    """Draws the extension of files of JSON, their bytes, and the numbers in their columns ``id``."""
    names = draw(st.lists(NAMES.map(json.dumps), max_size=3))
    files, ids = [], []
    for at in range(draw(st.integers(1, 3))):
        lines = []
        for row in range(draw(st.integers(0, 5))):
            if draw(st.integers(0, 5)) == 0:
                lines.append(draw(ODD_LINES))
                continue
            cells = [f"{name}: {draw(JSON_VALUES)}" for name in names if draw(st.integers(0, 4))]
            lines.append(("{" + ", ".join([f'"id": {10 * at + row}', *cells]) + "}").encode())
            ids.append(10 * at + row)
        end = draw(LINE_ENDS)
        files.append(end.join(lines) + draw(st.sampled_from([b"", end])))
    return draw(st.sampled_from(["jsonl", "jsonl.gz", "json"])), files, ids


CELLS = st.one_of(
    st.sampled_from(
        [
            *(
                "1",
                "00501",
                "1.50",
                "12345678901234567890",
                "9007199254740993",
                "true",
                "",
                "NULL",
                "nan",
                "2024-01-01",
            ),
            *("2024-01-01T00:00:00Z", "2024-01-01 00:00:00.123456789", "12:30", "-0", "+1", " 1", "0x10", "inf", "1e5"),
        ]
    ),
    st.text(max_size=6),
    st.text(alphabet='",\n\r\t;x', max_size=5),
)


@st.composite
def csv_files(draw: Draw) -> tuple[str, list[bytes], list[int]]:
    """Draws the extension of files of CSV, their bytes, and the numbers in their columns ``id``."""
    files, ids = [], []
    names = draw(st.lists(NAMES.map(_quoted), max_size=3))
    for at in range(draw(st.integers(1, 3))):
        lines = [",".join(["id", *names]).encode()]
        for row in range(draw(st.integers(0, 5))):
            if draw(st.integers(0, 7)) == 0:
                lines.append(draw(ODD_LINES))
                continue
            cells = [draw(CELLS) for _ in names]
            lines.append(",".join([str(10 * at + row), *map(_quoted, cells)]).encode())
            ids.append(10 * at + row)
        end = draw(LINE_ENDS)
        files.append(end.join(lines) + draw(st.sampled_from([b"", end])))
    return draw(st.sampled_from(["csv", "csv.gz"])), files, ids


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if set(cell) & set('",\n\r') else cell


def damaged(draw: Draw, content: bytes) -> bytes:
    """Returns the bytes of a file after an accident: some are gone, others, doubled, or in another encoding."""
    at = draw(st.integers(0, max(0, len(content) - 1)))
    more = draw(st.integers(1, 40))
    change = draw(st.sampled_from(["cut", "gap", "bits", "twice", "zeros", "utf-16", "latin-1", "mark", "empty"]))
    if change in ("utf-16", "latin-1"):
        return content.decode("utf-8", "replace").encode(change, "replace")
    return {
        "cut": content[:at],
        "gap": content[:at] + content[at + more :],
        "bits": content[:at] + bytes(byte ^ 1 << more % 8 for byte in content[at : at + 1]) + content[at + 1 :],
        "twice": content[: at + more] + content[at:],
        "zeros": content[:at] + bytes(more) + content[at + more :],
        "mark": b"\xef\xbb\xbf" + content,
        "empty": b"",
    }[change]


def packed(content: bytes, extension: str) -> bytes:
    """Returns the bytes of a file as its extension says, compressed or not."""
    return gzip.compress(content) if extension.endswith(".gz") else content


ANY_FILES = functools.cache(lambda: st.one_of(columnar_files(), json_files(), csv_files()))
