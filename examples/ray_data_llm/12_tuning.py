"""The settings that keep engines busy: rows in flight, and row blocks under way.

python examples/ray_data_llm/12_tuning.py
"""

import json
from typing import Any

import ray

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR",
    "Invoice 77-1032 / 2024-12-01 / ¥12,500",
]


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the conversation and the sampling parameters of a row."""
    return {
        "messages": [{"role": "user", "content": row["item"]}],
        "sampling_params": {"temperature": 0, "max_tokens": 64},
    }


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row of the result."""
    return {"line": row["item"], "answer": row["generated_text"]}


def main() -> None:
    """Reads the lines with every limit set by hand; the defaults follow from `max_num_seqs` of the engine."""
    config = vLLMEngineProcessorConfig(
        model_source="bundled:invoices",
        batch_size=32,
        max_pending_requests=512,
        max_concurrent_batches=16,
        max_tasks_in_flight_per_actor=32,
    )
    with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        for row in processor(ray.data.from_items(LINES)).take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
