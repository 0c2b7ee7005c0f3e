"""The job file that `millrace init` writes. It runs unchanged, and shows every other field in a comment."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pyarrow.parquet as pq

from ...engine.loading.model_source import PACKAGE
from .config import JobConfig
from .schema import field_docs

ROWS_FILE = "rows.jsonl"
SCHEMA_FILE = "job.schema.json"
NUM_ROWS = 12
WIDTH = 100

BEGINNING = f"""\
# yaml-language-server: $schema={SCHEMA_FILE}
#
# A job: a model runs over the rows of files, and writes files.
#   millrace plan {{name}}      predict time, memory and price
#   millrace run {{name}}       run the job, or resume it
#
# Paths start at the folder of this file. A field can be overridden by the environment
# (MILLRACE_JOB_REPLICAS=2, MILLRACE_JOB_ENGINE__MAX_NUM_SEQS=64), and both by the command line
# (--set engine.max_num_seqs=64).

# The model: a folder in Hugging Face's layout. This one ships with Millrace: it turns a messy line
# of an invoice into JSON.
model: bundled:invoices

# The input: a file, a folder, a pattern such as data/*.parquet, or a list of these.
input: {ROWS_FILE}

# The folder for the results.
output: out

# The question to the model about a row; {{{{line}}}} is a column of the input. For a model without a
# chat template, give a prompt in place of the messages:
#   prompt: "A line of an invoice: {{{{line}}}}"
messages:
  - role: user
    content: "{{{{line}}}}"

# Sampling parameters. Without them, the model's own recommendation applies.
sampling:
  temperature: 0
  max_tokens: 64
"""

EXAMPLES = {
    "prompt": None,
    "engine": "engine:\n  max_num_seqs: 256\n  max_model_len: 512",
    "prices": "prices:\n  currency: USD\n  per_replica_hour: 2.5\n  per_million_output_tokens: 0.4",
}
"""Field -> lines to show in place of its default; None for a field that the beginning explains."""


def job_template(name: str) -> str:
    """Returns the text of an example job file, whose comments explain the fields and show their defaults.

    Args:
        name: Name of the file, as its comments call it.
    """
    beginning = BEGINNING.format(name=name).replace("{{", "{").replace("}}", "}")
    return "\n".join([beginning, "# ---- Every other field, with its default ----", *_others(beginning)])


def sample_rows() -> str:
    """Returns some lines of invoices as rows for the bundled model: a JSON object per line."""
    table = pq.read_table(PACKAGE / "examples" / "invoices" / "invoices.parquet", columns=["line"])
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.slice(0, NUM_ROWS).to_pylist())


def _others(beginning: str) -> Iterator[str]:
    docs = field_docs(JobConfig)
    given = {line.partition(":")[0] for line in beginning.splitlines()}
    for name, field in JobConfig.model_fields.items():
        if name in given or EXAMPLES.get(name, "") is None:
            continue
        yield ""
        text = " ".join([docs.get(name, ""), *_choices(field.annotation)])
        yield from (f"# {line}" for line in textwrap.wrap(text, WIDTH - 2))
        default = field.get_default(call_default_factory=True)
        text = EXAMPLES.get(name) or f"{name}: {json.dumps(default, ensure_ascii=False)}"
        yield from (f"#{line}" for line in text.splitlines())
    yield ""


def _choices(annotation: Any) -> Iterator[str]:
    """Yields a sentence with the values that a field may have, if its type lists them."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is Literal:
            yield f"One of: {', '.join(get_args(kind))}."
