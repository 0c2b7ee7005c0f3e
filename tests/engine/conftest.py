"""One small engine for the tests that only need any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from millrace.engine.llm import LLM


@pytest.fixture(scope="package")
def shared_llm(tiny_model) -> Iterator[LLM]:
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=16) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The engine, which a test must leave with nothing in it."""
    yield shared_llm
    assert not shared_llm.llm_engine.has_unfinished_requests()
    shared_llm.llm_engine.check_integrity()
