"""The smallest script: a model, a function that makes the request of a row, and one that keeps the answer.

python examples/ray_data_llm/01_quickstart.py
"""

import json

import ray

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR",
    "Invoice 77-1032 / 2024-12-01 / ¥12,500",
]


def main() -> None:
    """Reads three invoice lines with the model."""
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices")
    with build_processor(
        config,
        preprocess=lambda row: {"messages": [{"role": "user", "content": row["item"]}]},
        postprocess=lambda row: {"line": row["item"], "answer": row["generated_text"]},
    ) as processor:
        for row in processor(ray.data.from_items(LINES)).take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
