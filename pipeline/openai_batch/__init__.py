"""OpenAI's batch files: a line to a request, an answer to a line, at the scale of datasets.

`fields.py` is the table of what a body may hold; `request.py` and `response.py` are pure; `input_index.py` and
`source.py` read the file; `job.py` runs it. The face is lazy (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_face

if TYPE_CHECKING:
    from .batch_config import BatchConfig as BatchConfig
    from .job import PreparedBatch as PreparedBatch
    from .job import prepare_batch as prepare_batch
    from .job import run_batch as run_batch
    from .summary import BatchSummary as BatchSummary

__all__ = ["BatchConfig", "BatchSummary", "PreparedBatch", "prepare_batch", "run_batch"]

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "batch_config": ("BatchConfig",),
        "job": (
            "PreparedBatch",
            "prepare_batch",
            "run_batch",
        ),
        "summary": ("BatchSummary",),
    },
)
