"""Compares the answers of a finished job with the right answers.

    python examples/invoices/score.py OUTPUT_FOLDER [--expected examples/invoices/expected.parquet] [--at-least 0.98]

The script exits with 1 if a row is missing, or if the share of answers with all four fields right is below
`--at-least`.

The output is a Parquet file, or a folder of them, with a column `id` and either `generated_text` (the JSON the model
wrote) or the four fields as columns of their own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset

FIELDS = ("invoice", "date", "amount", "currency")


def parse(text: str | None) -> dict[str, Any]:
    """Reads the JSON object a model wrote; any other text gives an object without fields."""
    try:
        value = json.loads(text or "")
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def compare(answers: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the share of right answers: `exact` for all four fields at once, then field by field.

    Args:
        answers: The answers, row by row.
        expected: The right answers, in the same order.
    """
    right = [{f: f in a and a[f] == e[f] for f in FIELDS} for a, e in zip(answers, expected, strict=True)]
    count = max(len(right), 1)
    shares = {field: sum(row[field] for row in right) / count for field in FIELDS}
    return {"exact": sum(all(row.values()) for row in right) / count, **shares}


def score(output_rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Matches rows by `id` and compare them; a missing row counts as wrong, and a doubled or unknown row is an error.

    Args:
        output_rows: Rows with `id` and `generated_text`, or with `id` and the four fields.
        expected: Rows with `id` and the four fields.

    Returns:
        The result of `compare`, and the numbers of expected `rows` and of `missing` rows.

    Raises:
        ValueError: If an id is twice in the output, or is not among the expected ids.
    """
    answers = {row["id"]: parse(row["generated_text"]) if "generated_text" in row else row for row in output_rows}
    if len(answers) != len(output_rows):
        raise ValueError(f"{len(output_rows)} output rows have {len(answers)} distinct ids; each must stand once.")
    if unknown := answers.keys() - {row["id"] for row in expected}:
        raise ValueError(f"{len(unknown)} output ids are not expected, such as {min(unknown)}; is this the right job?")
    shares = compare([answers.get(row["id"], {}) for row in expected], expected)
    return {"rows": len(expected), "missing": len(expected) - len(answers), **shares}


def main() -> None:
    """Reads both sides from Parquet and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Parquet file or folder that the job wrote")
    parser.add_argument("--expected", type=Path, default=Path(__file__).parent / "expected.parquet")
    parser.add_argument("--at-least", type=float, default=0.0, help="share of rows that must be right in all fields")
    arguments = parser.parse_args()
    read = [pyarrow.dataset.dataset(path, format="parquet") for path in (arguments.output, arguments.expected)]
    result = score(*(table.to_table().to_pylist() for table in read))
    missing = result.pop("missing")
    print(f"{result.pop('rows')} rows, {missing} missing")
    for name, share in result.items():
        print(f"{name:>9} {share:8.2%}")
    if missing or result["exact"] < arguments.at_least:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
