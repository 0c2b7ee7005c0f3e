"""Keeps a job's report in its folder, while it runs and at its end."""

from __future__ import annotations

import json
import logging

from ...engine.errors import MillraceError
from ..files.storage import Storage
from ..ledger.counts import Counts
from .page import render
from .prices import Prices
from .report import VERSION, Report
from .run import Run
from .summary import JobSummary

logger = logging.getLogger(__name__)

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


class ReportWriter:
    """Writes the report of a job. A job does not fail with its report: what cannot be written warns.

    Args:
        folder: Where to, and where a report of earlier runs of the job may be.
        model: The model.
        output: The output folder, as the report names it.
        prices: What things cost; None if nobody said.
    """

    def __init__(self, folder: Storage, model: str, output: str, prices: Prices | None = None) -> None:
        self._folder, self._model, self._output, self._prices = folder, model, output, prices
        self._earlier = read_runs(folder)

    def write(self, run: Run, counts: Counts, num_rows_in: int | None) -> Report:
        """Writes the report as things stand.

        Args:
            run: The run that is under way, or has ended.
            counts: Of everything written, by earlier runs too.
            num_rows_in: Rows of the input; None while nobody knows.
        """
        runs = [*self._earlier, run]
        summary = JobSummary.of(self._model, self._output, num_rows_in, counts, runs)
        report = Report(summary, counts, runs, self._prices)
        try:
            self._folder.make_folder()
            (self._folder / REPORT_JSON).write_bytes(report.as_json().encode())
            (self._folder / REPORT_HTML).write_bytes(render(report.as_dict()).encode())
        except (OSError, MillraceError) as error:
            logger.warning("the report cannot be written to %s: %s", self._folder, error)
        return report


def read_runs(folder: Storage) -> list[Run]:
    """Returns the runs that the report in a folder tells of, for a job that goes on.

    Args:
        folder: Where the report is. None there, one of another version or a broken one tells of none.
    """
    try:
        data = json.loads((folder / REPORT_JSON).read_bytes())
        return [Run.from_dict(run) for run in data["runs"]] if data["version"] == VERSION else []
    except FileNotFoundError:
        return []
    except (OSError, MillraceError, ValueError, KeyError, TypeError) as error:
        logger.warning("the report in %s cannot be read (%s); the new one begins with this run", folder, error)
        return []
