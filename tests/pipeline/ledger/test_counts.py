"""What rows add up to: the same when merged and read back; percentiles are exact to the width of a bucket."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.pipeline import columns
from millrace.pipeline.ledger.counts import AdapterRows, Counts
from millrace.pipeline.ledger.histogram import Histogram
from millrace.pipeline.stages.base import Row, RowError

VALUES = st.lists(st.one_of(st.just(0), st.integers(1, 10**7), st.floats(1e-9, 1e6)), max_size=60)


def finished(
    num_in: int, num_out: int, *, cached: int = 0, duplicate: bool = False, reason: str = "stop", **more: Any
) -> Row:
    """A row as generation leaves it."""
    times = {"queue_s": 0.5, "ttft_s": 1.0, "e2e_s": 2.0, "num_preemptions": 0}
    return Row.read(
        {
            columns.NUM_INPUT_TOKENS: num_in,
            columns.NUM_GENERATED_TOKENS: num_out,
            columns.NUM_CACHED_TOKENS: cached,
            columns.FINISH_REASON: reason,
            columns.METRICS: times,
            columns.IS_DUPLICATE: duplicate,
            **more,
        }
    )


def failed(kind: str, message: str, *, retryable: bool = False) -> Row:
    return Row({}, {}, RowError("generate", kind, message, retryable))


ROWS = [
    finished(10, 5, cached=4),
    finished(10, 5, duplicate=True),
    finished(20, 7, reason="length", __adapter="legal"),
    failed("PromptTooLongError", "300 tokens"),
    failed("EngineDeadError", "gone", retryable=True),
    failed("EngineDeadError", "gone again"),
]


def count(rows: list[Row]) -> Counts:
    counts = Counts()
    for row in rows:
        counts.add(row)
    return counts


def test_rows_are_counted() -> None:
    counts = count(ROWS)
    assert (counts.num_rows, counts.num_failed, counts.num_duplicates) == (6, 3, 1)
    assert (counts.num_input_tokens, counts.num_cached_tokens, counts.num_output_tokens) == (40, 4, 17)
    assert (counts.num_duplicate_input_tokens, counts.num_duplicate_output_tokens) == (10, 5)
    assert counts.finish_reasons == {"stop": 2, "length": 1}
    dead = counts.errors["generate: EngineDeadError"]
    assert (dead.num_rows, dead.num_retryable, dead.example) == (2, 1, "generate: EngineDeadError: gone")
    assert (counts.input_tokens.count, counts.e2e_s.count) == (3, 2)  # A duplicate took no time of its own.


def test_rows_and_tokens_are_counted_by_adapter() -> None:
    counts = count([*ROWS, finished(3, 1, __adapter="legal"), finished(2, 2, __adapter="far", duplicate=True)])
    assert counts.adapters == {"legal": AdapterRows(2, 23, 8), "far": AdapterRows(1, 2, 2)}
    assert Counts.from_dict(json.loads(json.dumps(counts.as_dict()))) == counts


def test_a_row_without_the_columns_of_generation_counts_as_a_row() -> None:
    counts = count([Row.read({"anything": 1})])
    assert (counts.num_rows, counts.num_failed, counts.num_output_tokens) == (1, 0, 0)


def test_pieces_add_up_to_the_whole_also_through_json() -> None:
    pieces = Counts()
    for row in ROWS:
        pieces.merge(Counts.from_dict(json.loads(json.dumps(count([row]).as_dict()))))
    assert pieces == count(ROWS)


def test_counts_of_an_older_version_are_read() -> None:
    assert Counts.from_dict({"num_rows": 3}) == Counts(num_rows=3)


@given(VALUES, VALUES)
def test_merged_histograms_equal_the_histogram_of_all_values(some: list[float], others: list[float]) -> None:
    whole, part, other = Histogram(), Histogram(), Histogram()
    for value in [*some, *others]:
        whole.add(value)
    for histogram, values in ((part, some), (other, others)):
        for value in values:
            histogram.add(value)
    part.merge(Histogram.from_dict(json.loads(json.dumps(other.as_dict()))))
    assert part.buckets == whole.buckets
    assert (part.count, part.smallest, part.largest) == (whole.count, whole.smallest, whole.largest)
    assert part.total == pytest.approx(whole.total)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_a_percentile_is_exact_to_the_width_of_a_bucket(share: float) -> None:
    rng = random.Random(7)
    values = sorted(rng.lognormvariate(0, 2) for _ in range(5000))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = values[min(len(values) - 1, int(share * len(values)))]
    assert histogram.quantile(share) == pytest.approx(exact, rel=0.1)


def test_a_histogram_keeps_its_size() -> None:
    histogram = Histogram()
    for tokens in range(200_000):
        histogram.add(tokens)
    assert len(histogram.buckets) < 160


def test_an_empty_histogram_has_no_percentile_and_no_bars() -> None:
    empty = Histogram.from_dict(Histogram().as_dict())
    assert empty == Histogram()
    assert (empty.quantile(0.5), empty.mean, list(empty.bars())) == (0.0, 0.0, [])
