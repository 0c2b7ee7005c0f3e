"""Two processors with different requests share one engine, which is started once.

python examples/ray_data_llm/13_shared_engine.py
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


def preprocess(row: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Returns the conversation and the sampling parameters of a row."""
    return {
        "messages": [{"role": "user", "content": row["item"]}],
        "sampling_params": {"temperature": 0, "max_tokens": max_tokens},
    }


def main() -> None:
    """Reads the lines twice: with short answers, and with full answers."""
    config = vLLMEngineProcessorConfig(model_source="bundled:invoices")
    arguments = [{"fn_kwargs": {"max_tokens": max_tokens}} for max_tokens in (16, 64)]
    with (
        build_processor(config, preprocess=preprocess, preprocess_map_kwargs=arguments[0]) as short,
        build_processor(config, preprocess=preprocess, preprocess_map_kwargs=arguments[1]) as full,
    ):
        for processor in (short, full):
            for row in processor(ray.data.from_items(LINES)).take_all():
                print(json.dumps([row["finish_reason"], row["generated_text"]], ensure_ascii=False))
        pools = {stats.name for stats in (short.stats(), full.stats()) if stats is not None}
        print("pools of engines:", len(pools))


if __name__ == "__main__":
    main()
