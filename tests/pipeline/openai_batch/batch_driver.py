"""A driver that is killed: runs a batch file on a cluster that is there.

python batch_driver.py ADDRESS INPUT OUTPUT
"""

from __future__ import annotations

import sys

import ray

from millrace.pipeline.openai_batch.batch_config import BatchConfig
from millrace.pipeline.openai_batch.job import run_batch


def batch_config(source: str, output: str) -> BatchConfig:
    """Returns the batch that is killed and goes on."""
    return BatchConfig(model="bundled:invoices", input=source, output=output, batch_size=16, flush_interval_s=0.2)


if __name__ == "__main__":
    ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
    run_batch(batch_config(*sys.argv[2:]))
