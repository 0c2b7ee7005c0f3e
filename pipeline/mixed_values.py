"""Values of several types in one column: which values Arrow would change, and which tables go together."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

JSON = {b"holds": b"json"}
"""Metadata of a column of lists and objects that came as JSON, or that are written as JSON into a column of text."""

MAX_DEPTH = 48
"""Most levels of lists and structs. Arrow reads no deeper tables: its own format ends at 63, Parquet at 49 lists."""

MAX_FIELDS = 256
"""Most keys that the objects of a column may have together in a struct, which has a place for each key in each row."""

PYTHON_TYPES: dict[pa.DataType, set[type]] = {
    pa.string(): {str},
    pa.int64(): {int},
    pa.float64(): {float, int},
    pa.bool_(): {bool},
}
"""Type of a column -> the types of Python whose values it gives back, if it takes them."""


class MixedTypesError(TypeError):
    """Values of several types are at one place, and a column of them would change some."""


@dataclass(slots=True)
class Survey:
    """The objects in the values of a column, found before a column is made of the values.

    Attributes:
        has_objects: Whether the values are, or hold, objects.
        num_keys: Number of keys of all objects together; keys at different places count apart.
        examples: A value of each type that is no list and no object.
    """

    has_objects: bool = False
    num_keys: int = 0
    examples: dict[type, Any] = field(default_factory=dict)

    def visit(self, values: Iterable[Any], level: int = 0) -> None:
        """Looks at values that stand at the same place of several rows, and at all values in them."""
        given = [value for value in values if value is not None]
        types = set(map(type, given))
        if not types:
            return
        if level > MAX_DEPTH:
            raise RecursionError(f"the value has more than {MAX_DEPTH} levels of lists and objects")
        if all(issubclass(one, list | tuple) for one in types):
            self.visit(itertools.chain.from_iterable(given), level + 1)
        elif all(issubclass(one, dict) for one in types):
            self._visit_objects(given, level)
        else:
            self.examples |= {type(value): value for value in given} if len(types) > 1 else {type(given[0]): given[0]}
            _check_types(types, given)

    def _visit_objects(self, given: Sequence[dict[Any, Any]], level: int) -> None:
        self.has_objects = True
        by_key: dict[Any, list[Any]] = {}
        for value in given:
            for name, one in value.items():
                by_key.setdefault(name, []).append(one)
        odd = next((name for name in by_key if not isinstance(name, str)), None)
        if odd is not None:
            raise TypeError(f"a key of an object is {odd!r:.80}, which is no text")
        self.num_keys += len(by_key)
        for values in by_key.values():
            self.visit(values, level + 1)


def survey(values: Iterable[Any]) -> Survey:
    """Returns what the values of a column are.

    Raises:
        MixedTypesError: Arrow would change a value to fit it beside the others.
        TypeError: A value has a part that no column keeps: a key that is no text, or the time zone of a time of day.
        RecursionError: A value has too many levels.
    """
    found = Survey()
    found.visit(values)
    return found


def _check_types(types: set[type], given: Sequence[Any]) -> None:
    if types <= {int, float}:  # Arrow refuses the integers that are no exact fractions.
        return
    only = next(iter(types)) if len(types) == 1 else object
    if issubclass(only, dt.time) and any(value.tzinfo is not None for value in given):
        raise TypeError("a time of day has a time zone")
    several_zones = issubclass(only, dt.datetime) and len({value.tzinfo for value in given}) > 1
    several_kinds = hasattr(only, "dtype") and (len({value.dtype for value in given}) > 1 or given[0].dtype == object)
    if len(types) > 1 or several_zones or several_kinds:
        _check_given_back(given)


def _check_given_back(given: Sequence[Any]) -> None:
    if not _read_alike(given, pa.array(given)):
        kinds = ", ".join(sorted({type(one).__name__ for one in given}))
        raise MixedTypesError(f"values of several types ({kinds:.100}) are in one column")


def _read_alike(given: Sequence[Any], column: pa.Array) -> bool:
    """Returns whether each value reads from a column of all values as from a column of its own."""
    return all(_is_same(pa.array([one])[0].as_py(), read) for one, read in zip(given, column.to_pylist(), strict=True))


def _is_same(alone: Any, read: Any) -> bool:
    if isinstance(alone, list) and isinstance(read, list):
        return len(alone) == len(read) and all(map(_is_same, alone, read))
    if {type(alone), type(read)} <= {int, float}:
        return alone == read or alone != alone
    if type(alone) is not type(read) or alone != read:
        return False
    return not isinstance(alone, dt.datetime) or alone.utcoffset() == read.utcoffset()


def keeps(values: Iterable[Any], kind: pa.DataType) -> bool:
    """Returns whether a column of a given type gives values back: no key is lost, and no number is cut.

    A struct may have fields that an object lacks. Values that Arrow refuses are not looked for.
    """
    given = [value for value in values if value is not None]
    types = set(map(type, given))
    if not types:
        return True
    if pa.types.is_struct(kind):
        known = set(kind.names)
        are_objects = all(isinstance(value, dict) and known.issuperset(value) for value in given)
        return are_objects and all(keeps((value.get(one.name) for value in given), one.type) for one in kind)
    if pa.types.is_map(kind):
        pairs = [pair for value in given for pair in (value.items() if isinstance(value, dict) else value)]
        items = [item for _, item in pairs]
        return keeps([key for key, _ in pairs], kind.key_type) and keeps(items, kind.item_type)
    if pa.types.is_list(kind):
        lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in given]
        return types <= {list, tuple, np.ndarray} and keeps(itertools.chain.from_iterable(lists), kind.value_type)
    if kind == pa.float32():
        return types <= {float} and _are_singles(given)
    return types <= PYTHON_TYPES.get(kind, set()) or _read_alike(given, pa.array(given, kind))


def _are_singles(given: Sequence[float]) -> bool:
    numbers = np.asarray(given, np.float64)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(numbers.astype(np.float32).astype(np.float64), numbers, equal_nan=True))


def join_exactly(tables: Sequence[pa.Table], max_fields: int = MAX_FIELDS) -> pa.Table:
    """Returns the rows of all tables in columns of common types, which give each value back.

    Columns of equal types are not copied. A struct has the fields of all tables.

    Args:
        tables: The tables.
        max_fields: Most fields that a table may have more than each of the given ones.

    Raises:
        TypeError: Types do not go together, as the other errors of `UNFIT` say of values.
    """
    schemas = [table.schema for table in tables]
    if all(schema.equals(schemas[0], check_metadata=True) for schema in schemas):
        return pa.concat_tables(tables)
    joint = schemas[0]
    for schema in schemas[1:]:
        joint = joint_schema(joint, schema)
    if num_fields(joint) > max(max_fields, *map(num_fields, schemas)):
        raise TypeError(f"the objects of the rows have more than {max_fields} keys together")
    joined = pa.concat_tables(tables, promote_options="permissive")
    return pa.table([joined[one.name].cast(one.type) for one in joint], schema=joint)


def joint_schema(one: pa.Schema, other: pa.Schema, *, are_numbers_alike: bool = True) -> pa.Schema:
    """Returns the columns of both schemas, in types that give the values of both back.

    Args:
        one: Columns and types.
        other: Columns and types.
        are_numbers_alike: Whether integers and fractions go together; Arrow refuses the values that do not.

    Raises:
        TypeError: The types of a column do not go together.
    """
    fields = {name: one.field(name) for name in one.names}
    for field_ in other:
        known = fields.get(field_.name, field_)
        if not _go_together(known, field_, are_numbers_alike):
            raise TypeError(f"column {field_.name!r} is {known.type!s:.100} here and {field_.type!s:.100} there")
        fields[field_.name] = _joint_field(known, field_)
    return pa.schema(list(fields.values()))


def holds_json(field: pa.Field) -> bool:
    """Returns whether a column holds objects that came as JSON, each with keys of its own."""
    return field.metadata is not None and JSON.items() <= field.metadata.items()


def num_fields(schema: pa.Schema) -> int:
    """Returns the number of columns of a schema, and of all fields in them."""
    return sum(map(_num_fields, schema.types))


def _num_fields(kind: pa.DataType) -> int:
    return 1 + sum(_num_fields(kind.field(at).type) for at in range(kind.num_fields))


def _joint_field(one: pa.Field, other: pa.Field) -> pa.Field:
    if one.type == other.type:
        return one
    schemas = [pa.schema([field.remove_metadata()]) for field in (one, other)]
    unified = pa.unify_schemas(schemas, promote_options="permissive").field(0)
    return unified.with_metadata(JSON) if holds_json(one) or holds_json(other) else unified


def _go_together(one: pa.Field, other: pa.Field, are_numbers_alike: bool) -> bool:
    if pa.null() in (one.type, other.type):
        return True
    return holds_json(one) == holds_json(other) and _types_go_together(one.type, other.type, are_numbers_alike)


def _types_go_together(one: pa.DataType, other: pa.DataType, are_numbers_alike: bool) -> bool:
    if one == other or pa.null() in (one, other):
        return True
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        pairs = [(field.type, other.field(field.name).type) for field in one if other.get_field_index(field.name) >= 0]
    elif one.num_fields and one.num_fields == other.num_fields and one.id == other.id:
        pairs = [(one.field(at).type, other.field(at).type) for at in range(one.num_fields)]
    else:
        are_numbers = are_numbers_alike and _is_number(one) and _is_number(other)
        return are_numbers or (not one.num_fields and not other.num_fields and _alike(one, other))
    return all(_types_go_together(*pair, are_numbers_alike) for pair in pairs)


def _alike(one: pa.DataType, other: pa.DataType) -> bool:
    """Returns whether two types differ in their precision or size only."""
    if pa.types.is_decimal(one) and pa.types.is_decimal(other):
        return True
    is_same = one.id == other.id and pa.types.is_temporal(one)
    return is_same and getattr(one, "tz", None) == getattr(other, "tz", None)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
