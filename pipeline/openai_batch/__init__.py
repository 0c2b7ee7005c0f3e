"""OpenAI's batch files: `run_batch` answers every line of a batch file with the engine, at the scale of datasets.

`lines/fields.py` is the table of the fields that a request body may hold. `lines/request.py` parses a line and
`lines/response.py` writes the answer; both are pure. `input_index.py` and `source.py` read the batch file, and `job.py`
runs it. This module imports a public name only when the name is used (PEP 562).
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
