"""Errors cross process borders, and a row's error can become the error again."""

from __future__ import annotations

import inspect
import pickle

import pytest

from millrace.engine import errors
from millrace.engine.errors import EngineError, MillraceError, RequestError, StorageError, UserError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MillraceError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_pickles_and_comes_back(kind):
    error = kind("what was given; what is allowed; what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error)
    row_error = RequestError.from_exception(error)
    assert (row_error.kind, row_error.message) == (kind.__name__, str(error))
    assert row_error.retryable == issubclass(kind, EngineError | StorageError)
    assert type(row_error.to_exception()) is kind


def test_user_errors_are_value_errors_and_engine_errors_runtime_errors():
    assert issubclass(UserError, ValueError) and issubclass(EngineError, RuntimeError)


def test_a_foreign_error_keeps_its_name():
    row_error = RequestError.from_exception(KeyError("column"))
    assert row_error.kind == "KeyError" and not row_error.retryable
    assert "KeyError" in str(row_error.to_exception())
