"""Tokenizes in stages of their own, in other processes than the engine, or inside the engine.

python examples/ray_data_llm/05_tokenization.py
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
    """Reads the lines both ways; the answers are the same."""
    for apart in (True, False):
        config = vLLMEngineProcessorConfig(
            model_source="bundled:invoices",
            chat_template_stage={"enabled": True},
            tokenize_stage={"enabled": apart},
            detokenize_stage={"enabled": apart},
        )
        with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
            print("apart:" if apart else "in the engine:", processor.list_stage_names())
            for row in processor(ray.data.from_items(LINES)).take_all():
                print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
