"""`Histogram`: counts of values in logarithmic buckets. Its size does not grow with the number of values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS_PER_DOUBLING = 8
"""A bucket is 2**(1/8) times as wide as the one before it, so a percentile is exact to about 9 %."""

SMALLEST_EXPONENT = -20
"""Values under 2**-20 (a microsecond, in seconds) share one bucket with zero."""

ZERO_BUCKET = SMALLEST_EXPONENT * STEPS_PER_DOUBLING - 1


@dataclass(slots=True)
class Histogram:
    """Counts of values that are zero or more, in buckets of equal width on a logarithmic scale.

    Attributes:
        count: Number of values.
        total: Sum of the values.
        smallest: The least value; infinite while there is none.
        largest: The greatest value.
        buckets: Bucket -> number of values in it. Bucket i holds 2**(i/8) up to 2**((i+1)/8); the lowest holds zero.
    """

    count: int = 0
    total: float = 0.0
    smallest: float = math.inf
    largest: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, value: float, times: int = 1) -> None:
        """Counts a value.

        Args:
            value: A number of zero or more.
            times: Number of times that the value occurred.
        """
        bucket = bucket_of(value)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + times
        self.count += times
        self.total += value * times
        self.smallest = min(self.smallest, value)
        self.largest = max(self.largest, value)

    def merge(self, other: Histogram) -> None:
        """Adds the values of another histogram to this one."""
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.count += other.count
        self.total += other.total
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)

    @property
    def mean(self) -> float:
        """The mean; 0 while there is no value."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Returns the value that a share of all values does not exceed, exact to the width of a bucket.

        Args:
            share: From 0 to 1; 0.5 for the median.

        Returns:
            The value, never beyond the smallest or largest one; 0 while there is none.
        """
        wanted, seen = share * self.count, 0
        for low, high, count in self.bars():
            if seen + count >= wanted:
                inside = low + (high - low) * max(0.0, wanted - seen) / count
                return min(max(inside, self.smallest), self.largest)
            seen += count
        return self.largest

    def bars(self) -> Iterator[tuple[float, float, int]]:
        """Yields lower end, upper end and count of each bucket that is not empty, in rising order."""
        for bucket in sorted(self.buckets):
            low = 0.0 if bucket == ZERO_BUCKET else 2 ** (bucket / STEPS_PER_DOUBLING)
            yield low, 2 ** ((bucket + 1) / STEPS_PER_DOUBLING), self.buckets[bucket]

    def as_dict(self) -> dict[str, Any]:
        """Returns the histogram as plain data for JSON."""
        return {
            "count": self.count,
            "total": self.total,
            "smallest": self.smallest if self.count else None,
            "largest": self.largest if self.count else None,
            "buckets": [[bucket, self.buckets[bucket]] for bucket in sorted(self.buckets)],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Histogram:
        """Returns the histogram of which `as_dict` made the plain data."""
        smallest, largest = data["smallest"], data["largest"]
        return cls(
            count_of(data["count"]),
            number_of(data["total"]),
            math.inf if smallest is None else number_of(smallest),
            0.0 if largest is None else number_of(largest),
            {bucket_in(bucket): count_of(count) for bucket, count in data["buckets"]},
        )


def number_of(value: Any) -> Any:
    """Returns a number as it is; raises ValueError for what is no finite number of zero or more."""
    if type(value) not in (int, float) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.100} is no number of zero or more")
    return value


def count_of(value: Any) -> int:
    """Returns a whole number as it is; raises ValueError for what is no whole number of zero or more."""
    if type(value) is not int:
        raise ValueError(f"{value!r:.100} is no whole number")
    return int(number_of(value))


def bucket_in(value: Any) -> int:
    """Returns the number of a bucket as it is; raises ValueError for what is none."""
    if type(value) is not int or not ZERO_BUCKET <= value <= 1024 * STEPS_PER_DOUBLING:
        raise ValueError(f"{value!r:.100} is no bucket")
    return int(value)


def bucket_of(value: float) -> int:
    """Returns the bucket that a value falls into."""
    if value < 2**SMALLEST_EXPONENT:
        return ZERO_BUCKET
    return math.floor(math.log2(value) * STEPS_PER_DOUBLING)
