"""OpenAI's batch files: a line to a request, an answer to a line, at the scale of datasets.

`fields.py` is the table of what a body may hold, `request.py` and `response.py` are pure, `input_index.py` and
`source.py` read the file, `job.py` runs it.
"""

from __future__ import annotations
