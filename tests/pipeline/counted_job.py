"""A driver that is killed: rows of a file through an engine that notes each one, into an output that goes on.

python counted_job.py ADDRESS INPUT OUTPUT LOG SECONDS_A_ROW
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from millrace.engine import GenerateRequest, RequestOutput
from millrace.pipeline import EngineProcessorConfig, Processor
from millrace.pipeline.job.writing import write_results
from millrace.pipeline.processor.engine_backend import EngineBackend
from millrace.pipeline.sources import Source

sys.path.insert(0, str(Path(__file__).parent))

import fake_client

FLUSH_INTERVAL_S = 0.5
MAX_BLOCKS = 8


class CountingClient(fake_client.EchoClient):
    """Takes its time for each row, and notes it when it is done: time, prompt, number of tokens."""

    def __init__(self, log: str, seconds_a_row: float) -> None:
        super().__init__()
        self.log, self.seconds_a_row = log, seconds_a_row

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        for request in requests:
            time.sleep(self.seconds_a_row)
            output = self._answer(request)
            with open(self.log, "a") as log:  # One write of a line: whole, whoever else writes.
                log.write(f"{time.time()} {request.prompt} {len(output.outputs[0].token_ids)}\n")
            yield output


def make_processor(model: Path, log: str, seconds_a_row: float) -> Processor:
    """Makes a processor with such an engine."""
    off: dict[str, Any] = dict.fromkeys(["chat_template_stage", "tokenize_stage", "detokenize_stage"], False)
    config = EngineProcessorConfig(
        model_source=str(model), batch_size=64, should_continue_on_error=True, max_concurrent_batches=MAX_BLOCKS, **off
    )
    backend = EngineBackend(
        config, lambda config: fake_client.FakePool(), lambda name: CountingClient(log, seconds_a_row)
    )
    return Processor(config, [backend], postprocess=lambda row: {"id": row["id"], "text": row["generated_text"]})


def main() -> None:
    address, source, output, log, seconds_a_row = sys.argv[1:]
    for module in (fake_client, sys.modules["__main__"]):
        cloudpickle.register_pickle_by_value(module)
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    processor = make_processor(Path(source).parent, log, float(seconds_a_row))
    write_results(processor, Source.find(source).read(), output, flush_interval_s=FLUSH_INTERVAL_S)


if __name__ == "__main__":
    main()
