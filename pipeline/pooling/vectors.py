"""`VECTOR_FORMS`: the types of numbers in which vectors are written, and how 32-bit floats become each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from ...engine.errors import PoolingParamsError

if TYPE_CHECKING:
    import pyarrow as pa

EmbeddingDtype: TypeAlias = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

CODES = 127
"""Largest code of `int8`. -128 is not used, so that a vector and its negative have codes of the same size."""

BYTE_OFFSET = 128
"""Number that unsigned bytes have more than signed ones, in `uint8` and in `ubinary`."""

Encoded: TypeAlias = tuple[np.ndarray, float | None]
"""The numbers of a vector, and the number to multiply them by; None for 1."""


@dataclass(frozen=True, slots=True)
class VectorForm:
    """A type of numbers in which vectors are written.

    Attributes:
        dtype: Type of the numbers.
        encode: Function that turns a vector, `[size]` float32, into numbers of this type.
        has_scale: Whether each vector has a scale.
        is_packed: Whether a byte holds the signs of eight elements.
    """

    dtype: type[np.generic]
    encode: Callable[[np.ndarray], Encoded]
    has_scale: bool = False
    is_packed: bool = False

    def arrow_type(self, size: int) -> pa.DataType:
        """Returns the Arrow type of a column of vectors: a list of fixed size.

        Args:
            size: Number of elements of a vector before it is encoded.
        """
        import pyarrow as pa

        return pa.list_(pa.from_numpy_dtype(self.dtype), -(-size // 8) if self.is_packed else size)


def _single(vector: np.ndarray) -> Encoded:
    return vector.astype(np.float32, copy=False), None


def _half(vector: np.ndarray) -> Encoded:
    with np.errstate(over="ignore"):
        halves = vector.astype(np.float16)
    if not np.isfinite(halves).all():
        raise PoolingParamsError(
            f"embedding_dtype='float16' has no number as large as {np.abs(vector).max():g}; use 'float32', or leave "
            "use_activation on, which scales a vector to length 1"
        )
    return halves, None


def _signed(vector: np.ndarray) -> Encoded:
    scale = float(np.float32(np.abs(vector).max(initial=0.0) / CODES))
    codes = np.rint(vector / scale) if scale else np.zeros_like(vector)
    return codes.clip(-CODES, CODES).astype(np.int8), scale


def _unsigned(vector: np.ndarray) -> Encoded:
    codes, scale = _signed(vector)
    return (codes.astype(np.int16) + BYTE_OFFSET).astype(np.uint8), scale


def _signs(vector: np.ndarray) -> Encoded:
    return np.packbits(vector > 0), None


def _signed_signs(vector: np.ndarray) -> Encoded:
    return (_signs(vector)[0].astype(np.int16) - BYTE_OFFSET).astype(np.int8), None


VECTOR_FORMS: Mapping[str, VectorForm] = {
    "float32": VectorForm(np.float32, _single),
    "float16": VectorForm(np.float16, _half),
    "int8": VectorForm(np.int8, _signed, has_scale=True),
    "uint8": VectorForm(np.uint8, _unsigned, has_scale=True),
    "binary": VectorForm(np.int8, _signed_signs, is_packed=True),
    "ubinary": VectorForm(np.uint8, _signs, is_packed=True),
}
"""Value of `embedding_dtype` -> the form. The packed forms hold the same bytes as those of sentence-transformers."""
