"""Runs the trained model on many lines by plain batched greedy decoding, and counts the exact answers.

    python examples/invoices/greedy.py --dtype bfloat16

The script answers the bundled job with transformers alone, so that other engines can be compared with it.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lines import Sample, answer_text
from score import compare, parse, score
from tokenizer import prompt_text


@torch.inference_mode()
def answer_lines(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[str], batch: int = 128
) -> list[str]:
    """Returns the model's greedy answer to each line, in the order given.

    Args:
        model: The model, in the dtype to decode in.
        tokenizer: Its tokenizer.
        lines: The invoice lines.
        batch: How many lines to decode together; lines of similar length share a batch.
    """
    prompts = tokenizer([prompt_text(tokenizer, line) for line in lines])["input_ids"]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        padded = tokenizer.pad({"input_ids": [prompts[row] for row in rows]}, padding_side="left", return_tensors="pt")
        written = model.generate(**padded, max_new_tokens=64, do_sample=False)[:, padded["input_ids"].shape[1] :]
        for row, text in zip(rows, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            answers[row] = text
    return answers


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the share of samples answered exactly, overall and by field.

    A text that differs from the expected JSON may still have right fields; `text` is the share of answers that are
    identical to it in every character.
    """
    model.eval()
    texts = answer_lines(model, tokenizer, [sample.line for sample in samples])
    shares = compare([parse(text) for text in texts], [sample.answer for sample in samples])
    same = sum(text == answer_text(sample.answer) for text, sample in zip(texts, samples, strict=True))
    return {**shares, "text": same / len(samples)}


def main() -> None:
    """Answers every line of `invoices.parquet` and print the score."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = parquet.read_table(here / "invoices.parquet").to_pylist()
    began = time.monotonic()
    texts = answer_lines(model, tokenizer, [row["line"] for row in rows])
    print(f"{len(rows)} lines in {time.monotonic() - began:.1f} seconds")
    output = [{"id": row["id"], "generated_text": text} for row, text in zip(rows, texts, strict=True)]
    for name, value in score(output, parquet.read_table(here / "expected.parquet").to_pylist()).items():
        print(f"{name:>9} {value:.6g}")


if __name__ == "__main__":
    main()
