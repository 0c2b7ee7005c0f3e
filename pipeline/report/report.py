"""`Report`: everything that `report.json` says and `report.html` shows, as one plain dict.

A report has the summary, the counts of all rows, whichever run wrote them, and the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..._version import __version__
from ..ledger.counts import HISTOGRAMS, Counts
from ..ledger.histogram import Histogram
from .idle import REASONS
from .prices import Prices
from .run import Run
from .summary import JobSummary
from .tally import Work

VERSION = 1
"""Version of the form of `report.json`. It rises when a name is removed or changes its meaning."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(slots=True)
class Report:
    """The report of a job.

    Attributes:
        summary: The main numbers of the job.
        counts: Counts of all rows of the job's output.
        runs: Runs of the job, in order.
        prices: The user's price table, if there is one.
    """

    summary: JobSummary
    counts: Counts
    runs: list[Run]
    prices: Prices | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as the dict that `report.json` holds and `report.html` shows."""
        work = sum((run.work for run in self.runs), Work())
        held_s, accelerator_s = sum(run.held_s for run in self.runs), self._accelerator_seconds()
        return {
            "version": VERSION,
            "millrace": __version__,
            "started_at": self.runs[0].started_at if self.runs else None,
            "is_complete": self.summary.is_complete,
            "summary": self.summary.as_dict(),
            "seconds": round(sum(run.seconds for run in self.runs), 3),
            "replicas": {
                "held_s": round(held_s, 3),
                "busy_s": round(sum(run.busy_s for run in self.runs), 3),
                "idle_s": {name: round(sum(run.idle_s.get(name, 0.0) for run in self.runs), 3) for name in REASONS},
                "accelerator_s": {kind: round(seconds, 3) for kind, seconds in accelerator_s.items()},
                "num_restarts": sum(run.num_restarts for run in self.runs),
            },
            "engines": work.as_dict() | {"step_time_s": round(work.step_time_s, 3)},
            "savings": self._savings(),
            "distributions": {name: describe(getattr(self.counts, name)) for name in HISTOGRAMS},
            "cost": None if self.prices is None else self._cost(self.prices, held_s, accelerator_s),
            "counts": self.counts.as_dict(),
            "runs": [run.as_dict() for run in self.runs],
        }

    def as_json(self) -> str:
        """Returns the report as the JSON text of `report.json`."""
        return json.dumps(self.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"

    def _savings(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "num_cached_tokens": counts.num_cached_tokens,
            "cached_share": round(counts.num_cached_tokens / max(1, counts.num_input_tokens), 4),
            "num_duplicates": counts.num_duplicates,
            "num_duplicate_input_tokens": counts.num_duplicate_input_tokens,
            "num_duplicate_output_tokens": counts.num_duplicate_output_tokens,
        }

    def _accelerator_seconds(self) -> dict[str, float]:
        kinds = sorted({kind for run in self.runs for kind in run.accelerator_s})
        return {kind: sum(run.accelerator_s.get(kind, 0.0) for run in self.runs) for kind in kinds}

    def _cost(self, prices: Prices, held_s: float, accelerator_s: Mapping[str, float]) -> dict[str, Any]:
        """Returns the dict of `Prices.bill` with one more entry: `per_row`, the price of a row.

        Duplicates cost no tokens, because no engine ran them.

        Args:
            prices: The prices.
            held_s: Seconds that replicas were held, added over all replicas.
            accelerator_s: Accelerator kind -> seconds that accelerators of this kind were held.
        """
        counts = self.counts
        num_input = counts.num_input_tokens - counts.num_duplicate_input_tokens
        num_output = counts.num_output_tokens - counts.num_duplicate_output_tokens
        bill = prices.bill(held_s, accelerator_s, num_input, counts.num_cached_tokens, num_output)
        totals = [bill[name] for name in ("by_time", "by_tokens") if bill[name] is not None]
        per_row = round(totals[0] / counts.num_rows, 9) if totals and counts.num_rows else None
        return {**bill, "per_row": per_row}


def describe(histogram: Histogram) -> dict[str, Any]:
    """Returns count, mean, percentiles (`p50`, `p90`, `p99`) and largest value of a histogram, by name."""
    quantiles = {name: round(histogram.quantile(share), 4) for name, share in QUANTILES.items()}
    return {
        "count": histogram.count,
        "mean": round(histogram.mean, 4),
        **quantiles,
        "largest": round(histogram.largest, 4),
    }
