"""Runs a dataset through the engine: rows in, rows out, and a row that fails.

    python examples/dataset.py [MODEL]

MODEL is a folder in Hugging Face's layout; the default is the small model that ships with Millrace.
"""

import sys
from typing import Any

import ray

from millrace import EngineProcessorConfig, build_llm_processor

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung 77-A | zahlbar bis 14.11.2023 | Betrag 88,00 EUR",
    "far too long for the model " * 1000,
    None,
]


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns that the stages read: the conversation and the sampling parameters."""
    if row["line"] is None:
        raise ValueError("this row has no line")
    return {
        "messages": [{"role": "user", "content": row["line"]}],
        "sampling_params": {"temperature": 0.0, "max_tokens": 64},
    }


def keep(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns of the result."""
    return {"line": row["line"], "answer": row["generated_text"], "finish_reason": row["finish_reason"]}


def main() -> None:
    """Runs the lines through the model and prints a line for each row."""
    model = sys.argv[1] if len(sys.argv) > 1 else "bundled:invoices"
    config = EngineProcessorConfig(model_source=model, batch_size=16, should_continue_on_error=True)
    dataset = ray.data.from_items([{"line": line} for line in LINES])
    with build_llm_processor(config, preprocess=ask, postprocess=keep) as processor:
        for row in processor(dataset).take_all():
            print(f"{str(row['line'])[:50]!r:55} {row['__inference_error__'][:200] or row['answer']}")


if __name__ == "__main__":
    main()
