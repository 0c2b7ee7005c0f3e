"""What a job took: counted as it runs, written at its end as JSON and as a page.

The face is lazy (PEP 562), as that of the pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .counts import Counts, ErrorKind
    from .histogram import Histogram
    from .report import Report
    from .run import Run
    from .summary import JobSummary
    from .writer import ReportWriter

__all__ = [
    "Counts",
    "ErrorKind",
    "Histogram",
    "JobSummary",
    "Report",
    "ReportWriter",
    "Run",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "Counts": "counts",
        "ErrorKind": "counts",
        "Histogram": "histogram",
        "JobSummary": "summary",
        "Report": "report",
        "ReportWriter": "writer",
        "Run": "run",
    },
)
