"""`common_type`: the type of a column whose types differ between the files of an input."""

from __future__ import annotations

import pyarrow as pa

__all__ = ["common_type"]

MAX_DECIMAL128, MAX_DECIMAL256 = 38, 76
"""Most digits of Arrow's decimals."""


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Returns a type to which the values of both types can be cast, so that each value is the same or is refused.

    Types without such a type, for example decimals and floats, become text, which holds lists and structs as JSON.
    An integer that no float is equal to is refused beside floats, because most columns of both hold small integers.
    """
    exact = _exact_type(one, other)
    return pa.string() if exact is None else exact


def _exact_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Returns the common type of both; None if text alone can hold their values."""
    if one == other or pa.null() in (one, other):
        return other if pa.types.is_null(one) else one
    for is_kind, join in ((_is_list, _join_lists), (pa.types.is_struct, _join_structs), (pa.types.is_map, _join_maps)):
        if is_kind(one) and is_kind(other):
            return join(one, other)
    if _is_text(one) != _is_text(other) and (_is_bytes(one) or _is_bytes(other)):
        return pa.string()  # Arrow chooses bytes, which no prompt can quote.
    if _need_decimal(one, other):
        return _decimal(one, other)
    if pa.types.is_decimal(one) or pa.types.is_decimal(other):
        return None  # Arrow chooses a float for a decimal and a float, and cuts digits without an error.
    try:
        schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("value").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _join_lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    value = _exact_type(one.value_type, other.value_type)
    if value is None:
        return None
    is_large = pa.types.is_large_list(one) or pa.types.is_large_list(other)
    return pa.large_list(value) if is_large else pa.list_(value)


def _join_structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if any(len(set(kind.names)) < kind.num_fields for kind in (one, other)):
        return None  # Arrow takes one of the fields that share a name.
    types = {field.name: field.type for field in one}
    for field in other:
        types[field.name] = _exact_type(types.get(field.name, pa.null()), field.type)
    return None if None in types.values() else pa.struct(list(types.items()))


def _join_maps(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    key, item = _exact_type(one.key_type, other.key_type), _exact_type(one.item_type, other.item_type)
    return None if key is None or item is None else pa.map_(key, item)


def _need_decimal(one: pa.DataType, other: pa.DataType) -> bool:
    """Returns whether both are integers or decimals, and no type of integers holds both."""
    if not all(pa.types.is_integer(kind) or pa.types.is_decimal(kind) for kind in (one, other)):
        return False
    has_signed = pa.types.is_signed_integer(one) or pa.types.is_signed_integer(other)
    return pa.types.is_decimal(one) or pa.types.is_decimal(other) or (pa.uint64() in (one, other) and has_signed)


def _decimal(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Returns a decimal with room for the digits before and after the point of both types; None if there is none."""
    (digits, scale), (other_digits, other_scale) = _num_digits(one), _num_digits(other)
    after = max(scale, other_scale, 0)
    precision = max(digits - scale, other_digits - other_scale) + after
    if precision > MAX_DECIMAL256:
        return None
    return pa.decimal128(precision, after) if precision <= MAX_DECIMAL128 else pa.decimal256(precision, after)


def _num_digits(kind: pa.DataType) -> tuple[int, int]:
    """Returns the number of digits of an integer or a decimal, and how many of them are after the point."""
    if pa.types.is_decimal(kind):
        return kind.precision, kind.scale
    return len(str(2 ** (kind.bit_width - pa.types.is_signed_integer(kind)))), 0
