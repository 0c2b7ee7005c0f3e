"""`Throughput`: the speed of a replica, from the user, the report of a job with the same model, or a short run now."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine import LLM, SamplingParams
from ...engine.errors import ConfigError
from ...engine.shown import without_secrets
from ..files.storage import Storage

WAITING = ("starved", "backpressured", "between_steps")
"""Keys of idle time that count as time of generation, besides the time in steps."""


WARM_UP_ROWS = 8
"""Rows that run before the measurement, because some kernels are compiled or recorded at their first use."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """The speed of one replica.

    Attributes:
        output_tokens_per_s: Tokens that a replica generates in a second.
        output_tokens_per_row: Mean output tokens of a row; None if not known.
        start_up_s: Seconds until a replica is ready; None if not known.
        basis: Description of the source of these numbers.
    """

    output_tokens_per_s: float
    output_tokens_per_row: float | None
    start_up_s: float | None
    basis: str

    @classmethod
    def told(cls, output_tokens_per_s: float) -> Throughput:
        """Returns the throughput for a speed that the user gives; its other numbers are not known."""
        return cls(output_tokens_per_s, None, None, "as given")

    @classmethod
    def of_report(cls, file: Storage, model: str) -> Throughput | None:
        """Reads the throughput from the report of an earlier job.

        Args:
            file: A `report.json`.
            model: The model of the job to forecast.

        Returns:
            The throughput, or None if the job was of another model or generated nothing.

        Raises:
            ConfigError: The file is not a report.
        """
        try:
            report = file.read_json()
            return cls._read(report, file) if report["summary"]["model"] == without_secrets(model) else None
        except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{without_secrets(file.url)} is no report of a job: {error!s:.200}") from error

    @classmethod
    def measure(
        cls, engine_kwargs: Mapping[str, Any], prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> Throughput:
        """Measures the throughput of an engine in this process on some prompts. The start of Ray is not measured.

        Args:
            engine_kwargs: Arguments of `LLM`, including the model.
            prompts: Token ids of each prompt.
            params: Sampling parameters of each prompt.
        """
        started_s = time.monotonic()
        with LLM(**engine_kwargs) as llm:
            llm.generate(prompts[:WARM_UP_ROWS], list(params[:WARM_UP_ROWS]), use_tqdm=False, on_error="return")
            ready_s = time.monotonic()
            outputs = llm.generate(prompts, list(params), use_tqdm=False, on_error="return")
            ended_s = time.monotonic()
        num_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        return cls(
            output_tokens_per_s=num_tokens / (ended_s - ready_s),
            output_tokens_per_row=num_tokens / max(1, sum(output.error is None for output in outputs)),
            start_up_s=ready_s - started_s,
            basis=f"measured now, on {len(outputs):,} rows of the sample in {ended_s - ready_s:.1f} s",
        )

    @classmethod
    def _read(cls, report: Mapping[str, Any], file: Storage) -> Throughput | None:
        replicas, counts = report["replicas"], report["counts"]
        up_s = replicas["busy_s"] + sum(replicas["idle_s"][reason] for reason in WAITING)
        num_rows = counts["num_rows"] - counts["num_failed"]
        if up_s <= 0 or num_rows <= 0 or not counts["num_output_tokens"]:
            return None
        return cls(
            output_tokens_per_s=report["engines"]["num_output_tokens"] / up_s,
            output_tokens_per_row=counts["num_output_tokens"] / num_rows,
            start_up_s=report["summary"]["start_up_s"] / max(1, len(report["runs"])),
            basis=f"what {num_rows:,} rows took, by {file}",
        )
