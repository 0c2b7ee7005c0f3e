"""`Prices`: the user's price table. Millrace has no prices of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from ..settings import Settings

HOUR_S = 3600.0
MILLION = 1e6
Price = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
"""A finite amount of money. The limit keeps every bill a number that JSON can hold."""


class Prices(Settings):
    """A price table. A price that is missing is not counted. Prices by time and by token make two separate bills.

    Attributes:
        currency: Currency of the prices.
        per_replica_hour: Price of a replica for an hour, on any hardware.
        per_accelerator_hour: Kind of accelerator, as Ray calls it (`H100`) -> price of one for an hour.
        per_million_input_tokens: Price of a million prompt tokens.
        per_million_cached_tokens: Price of a million prompt tokens found in the KV cache; None for the full price.
        per_million_output_tokens: Price of a million generated tokens.
    """

    currency: str = "USD"
    per_replica_hour: Price | None = None
    per_accelerator_hour: dict[str, Price] | None = None
    per_million_input_tokens: Price | None = None
    per_million_cached_tokens: Price | None = None
    per_million_output_tokens: Price | None = None

    def by_time(self, replica_s: float, accelerator_s: Mapping[str, float]) -> float | None:
        """Returns the price of the time of replicas; None if the table has no price for them or their accelerators.

        Args:
            replica_s: Replica seconds.
            accelerator_s: Kind of accelerator -> accelerator seconds.
        """
        prices = self.per_accelerator_hour or {}
        bills = [prices[kind] * seconds / HOUR_S for kind, seconds in accelerator_s.items() if kind in prices]
        if self.per_replica_hour is not None:
            bills.append(self.per_replica_hour * replica_s / HOUR_S)
        return sum(bills) if bills else None

    def by_tokens(self, num_input: float, num_cached: float, num_output: float) -> float | None:
        """Returns the price of tokens; None if the table has no price of tokens.

        Args:
            num_input: Prompt tokens, cached ones included.
            num_cached: Prompt tokens found in the KV cache.
            num_output: Generated tokens.
        """
        per_cached = self.per_million_cached_tokens
        if per_cached is None:
            per_cached = self.per_million_input_tokens
        bill = [
            (num_input - num_cached, self.per_million_input_tokens),
            (num_cached, per_cached),
            (num_output, self.per_million_output_tokens),
        ]
        if all(price is None for _, price in bill):
            return None
        return sum(tokens * price for tokens, price in bill if price is not None) / MILLION

    def without_price(self, kinds: Iterable[str]) -> list[str]:
        """Returns the kinds of accelerator that `per_accelerator_hour` lacks; an empty list if that field is None."""
        prices = self.per_accelerator_hour
        return [] if prices is None else sorted(kind for kind in kinds if kind not in prices)

    def bill(
        self,
        replica_s: float,
        accelerator_s: Mapping[str, float],
        num_input: float,
        num_cached: float,
        num_output: float,
    ) -> dict[str, Any]:
        """Returns the results of `by_time`, `by_tokens` and `without_price`, and the table, as plain data for JSON."""
        by_time, by_tokens = self.by_time(replica_s, accelerator_s), self.by_tokens(num_input, num_cached, num_output)
        return {
            "currency": self.currency,
            "by_time": None if by_time is None else round(by_time, 6),
            "by_tokens": None if by_tokens is None else round(by_tokens, 6),
            "without_price": self.without_price(accelerator_s),
            "prices": self.model_dump(exclude_unset=True),
        }
