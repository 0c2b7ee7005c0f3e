"""`ReportWriter`: writes the report of a job to its folder, while the job runs and at its end."""

from __future__ import annotations

import logging

from ...engine.shown import without_secrets
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
    """Writes the report of a job. If the files cannot be written, a warning is logged and the job goes on.

    Args:
        folder: The folder of the report, which may hold a report of earlier runs.
        model: Folder or bundled name of the model.
        output: The output folder, as the report names it.
        prices: The user's price table, if there is one.
    """

    def __init__(self, folder: Storage, model: str, output: str, prices: Prices | None = None) -> None:
        self._folder, self._prices = folder, prices
        self._model, self._output = without_secrets(model), without_secrets(output)
        self._earlier = read_runs(folder)

    def write(self, run: Run, counts: Counts, num_rows_in: int | None) -> Report:
        """Writes `report.json` and `report.html` of the earlier runs and the current run, and returns the report.

        Args:
            run: The current run.
            counts: Counts of all rows written, by earlier runs too.
            num_rows_in: Rows of the input; None while their number is not known.
        """
        runs = [*self._earlier, run]
        summary = JobSummary.of(self._model, self._output, num_rows_in, counts, runs)
        report = Report(summary, counts, runs, self._prices)
        try:
            self._folder.make_folder()
            (self._folder / REPORT_JSON).write_bytes(report.as_json().encode())
            (self._folder / REPORT_HTML).write_bytes(render(report.as_dict()).encode())
        except Exception as error:  # noqa: BLE001  # no failure of a report may end a job
            logger.warning("the report cannot be written to %s: %s", self._folder, error)
        return report


def read_runs(folder: Storage) -> list[Run]:
    """Returns the runs in `report.json`; an empty list if the file is missing, unreadable or of another version.

    Args:
        folder: The folder of the report.
    """
    try:
        data = (folder / REPORT_JSON).read_json()
        runs = [Run.from_dict(run) for run in data["runs"]] if data["version"] == VERSION else []
        # What cannot be shown together with the current run is found now, and not when the job has ended.
        render(Report(JobSummary.of("", "", 0, Counts(), runs), Counts(), runs).as_dict())
        return runs
    except FileNotFoundError:
        return []
    except Exception as error:  # noqa: BLE001  # an old report may hold anything
        logger.warning("the report in %s cannot be read (%.200s); the new one begins with this run", folder, error)
        return []
