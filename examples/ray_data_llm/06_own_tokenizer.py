"""Uses a tokenizer that the stages do not know, in `map_batches` calls of your own around the processor.

python examples/ray_data_llm/06_own_tokenizer.py
"""

import json
from typing import Any

import numpy as np
import ray

from millrace.engine import resolve_model
from millrace.pipeline import build_processor, vLLMEngineProcessorConfig

LINES = [
    "Inv #4821 - due 3 March '24 - total USD 1,204.50",
    "Rechnung RE-2023-0117; fällig 09.03.2024; 88,00 EUR",
    "Invoice 77-1032 / 2024-12-01 / ¥12,500",
]


class Tokenize:
    """Turns lines into tokens with any library; here with the tokenizer of the model itself."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(resolve_model("bundled:invoices")))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the column that the engine takes instead of a prompt."""
        chats = [[{"role": "user", "content": line}] for line in batch["item"]]
        texts = [self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in chats]
        tokens = np.empty(len(texts), dtype=object)
        tokens[:] = [np.array(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        return {**batch, "tokenized_prompt": tokens}


class Detokenize(Tokenize):
    """Turns tokens into the text of answers."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the lines and their answers."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["generated_tokens"]]
        return {"line": batch["item"], "answer": np.array(texts, dtype=object)}


def main() -> None:
    """Tokenises, generates and detokenises the lines."""
    config = vLLMEngineProcessorConfig(
        model_source="bundled:invoices", chat_template_stage=False, tokenize_stage=False, detokenize_stage=False
    )
    sampling = {"temperature": 0, "max_tokens": 64, "detokenize": False}
    pool = ray.data.ActorPoolStrategy(size=1)
    with build_processor(
        config,
        preprocess=lambda row: {"sampling_params": sampling},
        postprocess=lambda row: {"item": row["item"], "generated_tokens": row["generated_tokens"]},
    ) as processor:
        tokens = ray.data.from_items(LINES).map_batches(Tokenize, compute=pool, num_cpus=0.1)
        answers = processor(tokens).map_batches(Detokenize, compute=pool, num_cpus=0.1)
        for row in answers.take_all():
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
