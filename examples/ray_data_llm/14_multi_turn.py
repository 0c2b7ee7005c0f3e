"""Asks a second question about the first answer: two processors, one after the other, share one engine.

python examples/ray_data_llm/14_multi_turn.py
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

SAMPLING = {"temperature": 0, "max_tokens": 64}


def first_turn(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the request of the first question."""
    return {"messages": [{"role": "user", "content": row["item"]}], "sampling_params": SAMPLING}


def keep_first(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the conversation with the first answer, for the next processor."""
    turns = [*row["messages"], {"role": "assistant", "content": row["generated_text"]}]
    return {"item": row["item"], "conversation": turns}


def second_turn(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the request of the second question, with the conversation so far."""
    return {"messages": [*row["conversation"], {"role": "user", "content": row["item"]}], "sampling_params": SAMPLING}


def keep_second(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the line and both answers."""
    return {"first": row["conversation"][1]["content"], "second": row["generated_text"]}


def main() -> None:
    """Asks about every line twice."""
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices")
    with (
        build_processor(config, preprocess=first_turn, postprocess=keep_first) as first,
        build_processor(config, preprocess=second_turn, postprocess=keep_second) as second,
    ):
        for row in second(first(ray.data.from_items(LINES))).take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
