"""A row that fails becomes a row with the reason of its error; all other rows have results.

python examples/ray_data_llm/07_row_errors.py
"""

import json
from typing import Any

import ray

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "far too long for the model " * 1000,
    "",
    "Invoice 77-1032 / 2024-12-01 / ¥12,500",
]


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the request of a row; an exception raised here is an error of the row too."""
    if not row["item"]:
        raise ValueError("this line is empty")
    return {
        "messages": [{"role": "user", "content": row["item"]}],
        "sampling_params": {"temperature": 0, "max_tokens": 64},
    }


def main() -> None:
    """Reads the lines, then separates good rows from error rows."""
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices", should_continue_on_error=True)
    with build_processor(
        config, preprocess=preprocess, postprocess=lambda row: {"item": row["item"], "answer": row["generated_text"]}
    ) as processor:
        results = processor(ray.data.from_items(LINES)).materialize()
    for row in results.filter(lambda row: not row["__inference_error__"]).take_all():
        print("good", json.dumps(row["answer"], ensure_ascii=False))
    for row in results.filter(lambda row: row["__inference_error__"]).take_all():
        print("bad", json.dumps([row["item"][:30], row["__inference_error__"][:100]], ensure_ascii=False))


if __name__ == "__main__":
    main()
