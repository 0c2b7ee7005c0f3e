"""Text from plain prompts and from conversations, with parameters that differ by row.

python examples/ray_data_llm/03_text_generation.py
"""

import json
from typing import Any

import ray

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

ROWS: list[dict[str, Any]] = [
    {"id": 0, "line": "Inv #4821 - due 3 March '24 - total USD 1,204.50", "temperature": 0.0, "n": 1},
    {"id": 1, "line": "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR", "temperature": 0.0, "n": 1},
    {"id": 2, "line": "Invoice 77-1032 / 2024-12-01 / ¥12,500", "temperature": 0.8, "n": 3},
]


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the request of a row; that of the second row is a prompt in the form that the chat template gives."""
    sampling = {"temperature": row["temperature"], "max_tokens": 64, "n": row["n"]}
    if row["id"] == 1:
        prompt = f"<|im_start|>user\n{row['line']}<|im_end|>\n<|im_start|>assistant\n"
        return {"prompt": prompt, "messages": None, "sampling_params": sampling}
    return {"messages": [{"role": "user", "content": row["line"]}], "sampling_params": sampling}


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns every answer of a row that asks for several."""
    answers = [one["text"] for one in row["outputs"] or []] or [row["generated_text"]]
    return {"id": row["id"], "answers": answers, "finish_reason": row["finish_reason"]}


def main() -> None:
    """Reads three lines, with three answers to the last line."""
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices", batch_size=64)
    with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        for row in processor(ray.data.from_items(ROWS)).take_all():
            print(json.dumps({**row, "answers": list(row["answers"])}, ensure_ascii=False))


if __name__ == "__main__":
    main()
