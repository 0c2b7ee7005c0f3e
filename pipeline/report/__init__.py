"""What a job took: counted as it runs, written at its end as JSON and as a page.

The face is lazy (PEP 562), as that of the pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .counts import Counts as Counts
    from .counts import ErrorKind as ErrorKind
    from .histogram import Histogram as Histogram
    from .report import Report as Report
    from .run import Run as Run
    from .summary import JobSummary as JobSummary
    from .writer import ReportWriter as ReportWriter

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "counts": (
            "Counts",
            "ErrorKind",
        ),
        "histogram": ("Histogram",),
        "report": ("Report",),
        "run": ("Run",),
        "summary": ("JobSummary",),
        "writer": ("ReportWriter",),
    },
)
