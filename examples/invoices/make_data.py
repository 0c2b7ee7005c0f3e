"""Writes the input of the bundled job, and the right answers, as two Parquet files.

    python examples/invoices/make_data.py

Every line is in a layout that training never uses. The script checks that no line is also a training or
validation line.
"""

import argparse
from itertools import islice
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from lines import FIELDS, JOB_SEED, TOKENIZER_SEED, TRAIN_SEED, VALIDATION_SEED, Sample, stream

# How many lines of each stream train.py draws at most.
USED = {TRAIN_SEED: 400_000, TOKENIZER_SEED: 60_000, VALIDATION_SEED: 2_000}


def job_samples(rows: int) -> list[Sample]:
    """Returns distinct held-out samples.

    Args:
        rows: How many to return.

    Raises:
        ValueError: If one of the lines is also used in training or validation.
    """
    found: dict[str, Sample] = {}
    samples = stream(JOB_SEED, held_out=True)
    while len(found) < rows:
        sample = next(samples)
        found.setdefault(sample.line, sample)
    for seed, count in USED.items():
        if shared := found.keys() & {s.line for s in islice(stream(seed, seed == VALIDATION_SEED), count)}:
            raise ValueError(f"{len(shared)} lines are also drawn from seed {seed}: change JOB_SEED and run again.")
    return list(found.values())


def main() -> None:
    """Writes `invoices.parquet` and `expected.parquet`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rows", type=int, default=6000)
    arguments = parser.parse_args()
    samples = job_samples(arguments.rows)
    ids = pa.array(range(len(samples)), pa.int64())
    lines = pa.array([sample.line for sample in samples], pa.string())
    answers = {field: pa.array([sample.answer[field] for sample in samples], pa.string()) for field in FIELDS}
    parquet.write_table(pa.table({"id": ids, "line": lines}), arguments.out / "invoices.parquet")
    parquet.write_table(pa.table({"id": ids, **answers}), arguments.out / "expected.parquet")
    print(f"{len(samples)} rows in {arguments.out}")


if __name__ == "__main__":
    main()
