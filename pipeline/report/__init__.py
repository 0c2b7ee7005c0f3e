"""The report of a job: times, tokens, errors and prices of its runs, as JSON and as an HTML page.

This module imports a public name only when the name is used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .report import Report as Report
    from .run import Run as Run
    from .summary import JobSummary as JobSummary
    from .writer import ReportWriter as ReportWriter

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "report": ("Report",),
        "run": ("Run",),
        "summary": ("JobSummary",),
        "writer": ("ReportWriter",),
    },
)
