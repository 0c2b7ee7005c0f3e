"""On a machine without a GPU: nothing to say, or, as in a cluster that has both, say it.

python examples/ray_data_llm/09_cpu_only.py
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
    """Say what to ask the model about a row."""
    return {
        "messages": [{"role": "user", "content": row["item"]}],
        "sampling_params": {"temperature": 0, "max_tokens": 64},
    }


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Say what a row of the result holds."""
    return {"line": row["item"], "answer": row["generated_text"]}


def main() -> None:
    """Read the lines with a replica that takes half a CPU of the cluster."""
    config = vLLMEngineProcessorConfig(
        model_source="bundled:invoices",
        engine_kwargs={"device": "cpu", "distributed_executor_backend": "mp"},
        placement_group_config={"bundle_per_worker": {"CPU": 0.5}},
    )
    with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        for row in processor(ray.data.from_items(LINES)).take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
