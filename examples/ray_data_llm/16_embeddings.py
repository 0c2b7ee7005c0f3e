"""Embeds rows and finds the row that is nearest to a question, with a decoder as the embedding model.

python examples/ray_data_llm/16_embeddings.py
"""

import json
from typing import Any

import ray

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR",
    "Thank you for your visit!",
    "Invoice 77-1032 / 2024-12-01 / ¥12,500",
]
QUESTION = "Inv #4822 - due 4 March '24 - total USD 1,300.00"


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the text to embed and its pooling parameters, which may differ by row."""
    return {"prompt": row["item"], "pooling_params": {"dimensions": 64}}


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the line and its vector, which has length 1."""
    return {"line": row["item"], "num_tokens": row["num_input_tokens"], "embedding": row["embeddings"]}


def main() -> None:
    """Embeds the lines and the question, and shows how near each line is to it."""
    config = vLLMEngineProcessorConfig(
        model_source="bundled:invoices",
        task_type="embed",
        engine_kwargs={"max_model_len": 256},
        chat_template_stage=False,
    )
    with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        rows = processor(ray.data.from_items([QUESTION, *LINES])).take_all()
    (question,) = (row["embedding"] for row in rows if row["line"] == QUESTION)
    for row in rows:
        if row["line"] != QUESTION:
            cosine = sum(a * b for a, b in zip(question, row["embedding"], strict=True))
            print(json.dumps({"line": row["line"], "dimensions": len(row["embedding"]), "cosine": round(cosine, 2)}))


if __name__ == "__main__":
    main()
