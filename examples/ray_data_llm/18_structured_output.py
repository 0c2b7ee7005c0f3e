"""Makes answers that are valid under a schema, whatever the line holds, and answers that are one of some words.

python examples/ray_data_llm/18_structured_output.py
"""

import json
from typing import Any, Literal

import ray
from pydantic import BaseModel, Field

from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR",
    "Thank you for your visit!",
]
ROWS = [{"line": line, "ask": ask} for line in LINES for ask in ("invoice", "currency")]


class Invoice(BaseModel):
    """The fields of an answer."""

    invoice: str = Field(max_length=12)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    amount: str = Field(pattern=r"^\d{1,6}\.\d{2}$")
    currency: Literal["EUR", "JPY", "USD"]


CONSTRAINTS: dict[str, dict[str, Any]] = {
    "invoice": {"json": Invoice.model_json_schema(), "disable_additional_properties": True},
    "currency": {"choice": ["EUR", "JPY", "USD"]},
}


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the request of a line, with the constraint on its answer."""
    return {
        "messages": [{"role": "user", "content": row["line"]}],
        "sampling_params": {"temperature": 0.3, "max_tokens": 100, "structured_outputs": CONSTRAINTS[row["ask"]]},
    }


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer; it is always valid, so no error is caught."""
    text = row["generated_text"]
    answer = Invoice.model_validate_json(text).model_dump_json() if row["ask"] == "invoice" else text
    return {"line": row["line"], "answer": answer}


def main() -> None:
    """Reads three lines, one of which is not an invoice, under two kinds of constraints."""
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices")
    with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
        for row in processor(ray.data.from_items(ROWS)).take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
