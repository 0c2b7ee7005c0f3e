"""`ProgressMonitor`: the progress of a running job, from the counts of written rows and the counters of the engines.

The monitor only reads. A job does not wait for the monitor, and does not fail if the monitor fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import ray

from ...actors import ReplicaStats, accelerator_of
from ...engine.errors import MillraceError
from ..ledger.counts import Counts
from ..processor.processor import Processor
from ..report.recorder import Recorder
from ..report.run import Run
from ..report.timeline import Interval

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5
SAVE_INTERVAL_S = 10.0
ETA_WINDOW_S = 60.0
"""Duration of the window from whose rate the remaining time is computed, so that a slow start is soon forgotten."""


class CountsReader(Protocol):
    """An object that counts the rows that a job has written."""

    def update(self) -> Counts:
        """Returns the counts of all rows written, by earlier runs too."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a running job.

    Attributes:
        phase: ``"starting"`` until the model is loaded, ``"running"`` from then on.
        num_rows: Rows of the input; None if their number is not known before they are read.
        num_done: Rows written.
        num_failed: Rows written with an error.
        input_tokens_per_s: Prompt tokens per second, over the last seconds.
        output_tokens_per_s: Generated tokens per second, over the last seconds.
        elapsed_s: Seconds since the start.
        eta_s: Remaining seconds; None while they are not known.
        eta_basis: The rate that `eta_s` follows from, in words; empty while it is not known.
        num_ready: Replicas that have loaded the model.
        num_replicas: Replicas of the job, ready or not.
        num_restarts: Number of restarts of replicas.
        num_running: Requests that hold KV cache.
        num_waiting: Requests that wait for KV cache.
        kv_cache_usage: Share of the KV cache in use.
        cache_hit_rate: Share of the prompt tokens found in the KV cache.
    """

    phase: str
    num_rows: int | None
    num_done: int
    num_failed: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    elapsed_s: float
    eta_s: float | None
    eta_basis: str = ""
    num_ready: int = 0
    num_replicas: int = 0
    num_restarts: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    cache_hit_rate: float = 0.0


class ProgressMonitor:
    """A context manager that follows a job from another thread while its block runs.

    Args:
        processor: The processor of the job.
        reader: Source of the counts of the output.
        num_rows: Rows of the input; None if their number is not known.
        started_s: Start of the job, on `time.monotonic`.
        show: Function called with the progress every `INTERVAL_S`.
        save: Function called every `SAVE_INTERVAL_S` with the record of the run and the counts, so that a killed run
            leaves a record.
    """

    def __init__(
        self,
        processor: Processor,
        reader: CountsReader,
        num_rows: int | None,
        started_s: float,
        *,
        show: Callable[[Progress], None] | None = None,
        save: Callable[[Run, Counts], object] | None = None,
    ) -> None:
        self._processor, self._reader, self._num_rows, self._started_s = processor, reader, num_rows, started_s
        self._show, self._save = show, save
        self._saved_s = started_s
        self._recorder = Recorder(started_s, accelerator_of)
        self._replicas: list[ReplicaStats] = []
        self._done: deque[tuple[float, int]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="millrace-progress", daemon=True)

    def __enter__(self) -> ProgressMonitor:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:  # The last rows have finished since the thread last read the counts.
            self._try_to_look()

    def finish(self, counts: Counts) -> Run:
        """Ends the record of the run and returns it.

        Args:
            counts: Counts of all rows that the job has written.
        """
        return self._recorder.finish(self._replicas, counts, time.monotonic())

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            progress = self._look()
            if self._show is not None:
                self._show(progress)
        except (MillraceError, ray.exceptions.RayError, OSError) as error:
            # The pool or the cluster is closing, or the storage does not answer. The job itself reports that.
            logger.debug("no progress to show: %s", error)
        except Exception as error:  # noqa: BLE001  # a monitor that fails must not keep results from being published
            logger.warning("the progress of the job cannot be shown: %s: %s", type(error).__name__, error)

    def _look(self) -> Progress:
        stats = self._processor.stats()
        self._replicas = stats.replicas if stats else []
        counts = self._reader.update()
        now_s = time.monotonic()
        interval = self._recorder.look(self._replicas, counts, now_s)
        if self._save is not None and now_s - self._saved_s >= SAVE_INTERVAL_S:
            self._saved_s = now_s
            self._save(self._recorder.record(now_s), counts)
        return self._progress(counts, interval, now_s)

    def _progress(self, counts: Counts, interval: Interval, now_s: float) -> Progress:
        tokens_in, tokens_out = self._recorder.rates()
        eta_s, basis = self._eta(counts.num_rows, now_s)
        return Progress(
            phase="starting" if self._recorder.ready_s is None else "running",
            num_rows=self._num_rows,
            num_done=counts.num_rows,
            num_failed=counts.num_failed,
            input_tokens_per_s=tokens_in,
            output_tokens_per_s=tokens_out,
            elapsed_s=now_s - self._started_s,
            eta_s=eta_s,
            eta_basis=basis,
            num_ready=int(interval.num_ready),
            num_replicas=len(self._replicas),
            num_restarts=self._recorder.num_restarts,
            num_running=int(interval.num_running),
            num_waiting=int(interval.num_waiting),
            kv_cache_usage=interval.kv_cache_usage,
            cache_hit_rate=self._recorder.cache_hit_rate,
        )

    def _eta(self, num_done: int, now_s: float) -> tuple[float | None, str]:
        """Returns the remaining seconds and their basis, a rate, in words; None and "" while they are not known."""
        if self._recorder.ready_s is None or self._num_rows is None:
            return None, ""
        if not self._done:
            self._done.append((self._recorder.ready_s, self._recorder.rows_before or 0))
        self._done.append((now_s, num_done))
        while now_s - self._done[1][0] >= ETA_WINDOW_S:
            self._done.popleft()
        then_s, then = self._done[0]
        if num_done <= then or now_s <= then_s:
            return None, ""
        rows_per_s, window_s = (num_done - then) / (now_s - then_s), now_s - then_s
        return (self._num_rows - num_done) / rows_per_s, f"{rows_per_s:,.3g} rows/s over the last {window_s:.0f} s"
