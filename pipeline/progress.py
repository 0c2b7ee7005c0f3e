"""How far a running job is: rows from the files it has written, tokens from the engines' counters.

Only reading: a job neither waits for its progress nor fails with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from ..engine.errors import MillraceError
from .processor import Processor
from .report import OutputScan

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
RATE_WINDOW_S = 10.0
"""Rates are those of the last seconds, so that they show what happens now."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A look at a running job.

    Attributes:
        phase: ``"starting"`` until the model is loaded, ``"running"`` from then on.
        num_rows: Rows of the input.
        num_done: Rows written.
        num_failed: Those of them with an error.
        input_tokens_per_s: Prompt tokens per second of late.
        output_tokens_per_s: Generated tokens per second of late.
        elapsed_s: Seconds since the start.
        eta_s: Seconds to go; None while that is unknown.
    """

    phase: str
    num_rows: int
    num_done: int
    num_failed: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    elapsed_s: float
    eta_s: float | None


class ProgressMonitor:
    """Looks at a job from a thread of its own. A context manager: it looks while the block runs.

    Args:
        processor: Runs the job.
        scan: Counts its output.
        num_rows: Rows of the input.
        started_s: When the job began, on `time.monotonic`.
        report: Called with each look.

    Attributes:
        ready_s: When the model was found loaded; None if it never was.
        last_token_s: When the last token was seen.
    """

    def __init__(
        self,
        processor: Processor,
        scan: OutputScan,
        num_rows: int,
        started_s: float,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        self._processor, self._scan, self._num_rows, self._started_s = processor, scan, num_rows, started_s
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="millrace-progress", daemon=True)
        self._samples: list[tuple[float, int, int]] = []
        self.ready_s: float | None = None
        self.last_token_s: float | None = None

    def __enter__(self) -> ProgressMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                progress = self._look()
            except (MillraceError, ray.exceptions.RayError) as error:
                # The pool or the cluster is going; the job itself says why.
                logger.debug("no progress to show: %s", error)
                continue
            if self._report is not None:
                self._report(progress)

    def _look(self) -> Progress:
        stats = self._processor.stats()
        now_s = time.monotonic()
        engines = [replica.engine for replica in stats.replicas if replica.engine is not None] if stats else []
        if engines and self.ready_s is None:
            self.ready_s = now_s
        rates = self._rates(now_s, engines)
        counts = self._scan.update()
        running_s = now_s - self.ready_s if self.ready_s is not None else 0.0
        left = self._num_rows - counts.num_rows
        return Progress(
            phase="running" if self.ready_s is not None else "starting",
            num_rows=self._num_rows,
            num_done=counts.num_rows,
            num_failed=counts.num_failed,
            input_tokens_per_s=rates[0],
            output_tokens_per_s=rates[1],
            elapsed_s=now_s - self._started_s,
            eta_s=left * running_s / counts.num_rows if counts.num_rows else None,
        )

    def _rates(self, now_s: float, engines: list[Any]) -> tuple[float, float]:
        """Returns prompt and output tokens per second since the oldest sample in the window."""
        tokens_in = sum(engine.counters.num_prompt_tokens for engine in engines)
        tokens_out = sum(engine.counters.num_output_tokens for engine in engines)
        if not self._samples or tokens_out != self._samples[-1][2]:
            self.last_token_s = now_s if tokens_out else None
        self._samples = [one for one in self._samples if now_s - one[0] <= RATE_WINDOW_S]
        self._samples.append((now_s, tokens_in, tokens_out))
        then_s, then_in, then_out = self._samples[0]
        if now_s <= then_s or tokens_out < then_out:  # A replica that started again counts from zero.
            return 0.0, 0.0
        return (tokens_in - then_in) / (now_s - then_s), (tokens_out - then_out) / (now_s - then_s)
