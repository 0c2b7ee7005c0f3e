"""A script for Ray Data LLM with the import changed: rows of a dataset through a model, rows out.

python examples/ray_data_llm.py
"""

import json
from typing import Any

import ray

from millrace.pipeline import build_llm_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR",
    "Invoice 77-1032 / 2024-12-01 / ¥12,500",
]


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Say what to ask the model about a row."""
    return {
        "messages": [{"role": "user", "content": row["item"]}],
        "sampling_params": {"temperature": 0, "max_tokens": 64},
    }


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Say what a row of the result holds."""
    return {"line": row["item"], "answer": row["generated_text"], "finish_reason": row["finish_reason"]}


def main() -> None:
    """Read three lines."""
    config = vLLMEngineProcessorConfig(
        model_source="bundled:invoices",
        engine_kwargs={"max_num_seqs": 64},
        concurrency=1,
        batch_size=64,
    )
    ray.init(include_dashboard=False, log_to_driver=False)
    with build_llm_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        for row in processor(ray.data.from_items(LINES)).take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
