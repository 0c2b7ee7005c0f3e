"""The types of numbers of vectors: what comes back from each, and the Arrow types of their columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from millrace.engine.errors import PoolingParamsError
from millrace.pipeline.pooling.vectors import VECTOR_FORMS

VECTOR = np.random.default_rng(0).normal(size=20).astype(np.float32)


def test_floats_are_kept_and_a_half_that_would_be_infinite_is_refused() -> None:
    assert np.array_equal(VECTOR_FORMS["float32"].encode(VECTOR)[0], VECTOR)
    assert np.array_equal(VECTOR_FORMS["float16"].encode(VECTOR)[0], VECTOR.astype(np.float16))
    with pytest.raises(PoolingParamsError, match=r"no number as large as 70000; use 'float32'"):
        VECTOR_FORMS["float16"].encode(np.float32([1, -70_000]))


def test_codes_times_scale_are_within_half_a_code() -> None:
    codes, scale = VECTOR_FORMS["int8"].encode(VECTOR)
    assert scale is not None and codes.dtype == np.int8
    assert np.abs(codes * np.float32(scale) - VECTOR).max() <= scale / 2 * 1.001
    assert np.abs(codes).max() == 127
    negative, same = VECTOR_FORMS["int8"].encode(-VECTOR)
    assert np.array_equal(negative, -codes) and same == scale
    shifted, same = VECTOR_FORMS["uint8"].encode(VECTOR)
    assert shifted.dtype == np.uint8 and same == scale
    assert np.array_equal(shifted.astype(int) - 128, codes)
    nothing, scale = VECTOR_FORMS["int8"].encode(np.zeros(4, np.float32))
    assert not nothing.any() and scale == 0


def test_signs_are_packed_as_sentence_transformers_packs_them() -> None:
    unsigned, _ = VECTOR_FORMS["ubinary"].encode(VECTOR)
    signed, _ = VECTOR_FORMS["binary"].encode(VECTOR)
    assert np.array_equal(np.unpackbits(unsigned)[:20], VECTOR > 0)
    assert unsigned.dtype == np.uint8 and signed.dtype == np.int8
    assert np.array_equal(signed.astype(int), np.packbits(VECTOR > 0).astype(int) - 128)


@pytest.mark.parametrize("name", VECTOR_FORMS)
def test_a_column_of_a_form_takes_its_vectors(name: str) -> None:
    form = VECTOR_FORMS[name]
    vector, scale = form.encode(VECTOR)
    column = pa.array([vector, None], form.arrow_type(20))
    assert pa.types.is_fixed_size_list(column.type) and column.type.list_size == len(vector)
    assert column.type.value_type == pa.from_numpy_dtype(form.dtype)
    assert np.array_equal(column[0].as_py(), vector) and column[1].as_py() is None
    assert (scale is not None) == form.has_scale
