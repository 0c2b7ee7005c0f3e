"""Measures the cost of outputs that follow a grammar, with a vocabulary of the usual size.

    python benchmarks/structured.py --vocab-size 151936 --num-rows 64

Prints JSON lines. "start": the library's tables for the tokenizer (once for each engine) and a grammar (compiled once,
then copied). "mask": the host's time of a step, to compute the allowed tokens and to accept one of them, drawn evenly.
"apply": the time to mask the logits. "engine": tokens per second of a small random model whose rows follow a grammar
that does not end, beside the same model without a grammar.

The vocabulary is made on the spot: bytes, and words of random letters with all their beginnings.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from millrace import LLM, SamplingParams, StructuredOutputsParams, TokensPrompt
from millrace.engine.structured.grammar import Grammar, Grammars
from millrace.engine.text.tokenizer import Tokenizer
from models import ModelShape, write_config

EOS = "<|end|>"
LETTERS = "etaoinshrdlcumwfgypbvk"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "string", "format": "date"},
        "kind": {"enum": ["customer", "supplier", "employee"]},
        "orders": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "integer"}}}},
    },
    "required": ["name", "born", "kind", "orders"],
}
CONSTRAINTS = {
    "json": StructuredOutputsParams(json={"type": "array", "items": PERSON, "minItems": 1000}),
    "regex": StructuredOutputsParams(regex="(?:[a-z]+, ){1000}[a-z]+"),
}
"""Constraints that allow endless outputs, so that no row ends while it is measured."""


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a byte-level tokenizer of random words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate([EOS, *alphabet])}
    merges, rng = [], random.Random(0)
    while len(vocab) < vocab_size:
        word = rng.choice(("Ġ", "Ġ", "")) + "".join(rng.choices(LETTERS, k=rng.randint(2, 9)))
        for end in range(1, len(word)):
            if word[: end + 1] not in vocab and len(vocab) < vocab_size:
                merges.append((word[:end], word[end]))
                vocab[word[: end + 1]] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)


def measure_start(folder: Path, vocab_size: int) -> tuple[Grammars, dict[str, Any]]:
    """Compiles a first grammar, which also makes the library's tables, and a second one; times both."""
    grammars = Grammars(Tokenizer(folder), vocab_size, [0])
    seconds = []
    for asked in CONSTRAINTS.values():
        start = time.perf_counter()
        grammars.start(asked)
        seconds.append(time.perf_counter() - start)
    return grammars, {"case": "start", "first_s": round(seconds[0], 3), "next_ms": round(1e3 * seconds[1], 2)}


def begin(grammars: Grammars, constraint: str, num_rows: int) -> list[Grammar]:
    """Returns the grammars of a batch whose sequences all follow the same constraint and are at its beginning."""
    return [grammars.start(CONSTRAINTS[constraint]) for _ in range(num_rows)]


def measure_masks(grammars: Grammars, constraint: str, num_rows: int, num_steps: int) -> dict[str, float]:
    """Follows a grammar with many rows; returns the median times of a step over the rows, in microseconds."""
    each = begin(grammars, constraint, num_rows)
    rng, mask_s, accept_s = np.random.default_rng(0), [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        masks = grammars.masks(each)
        mask_s.append(time.perf_counter() - start)
        assert masks is not None
        allowed = np.unpackbits(masks.bits, axis=1, bitorder="little")
        drawn = [int(rng.choice(np.flatnonzero(line))) for line in allowed]
        start = time.perf_counter()
        errors = [one.accept(token_id) for one, token_id in zip(each, drawn, strict=True)]
        accept_s.append(time.perf_counter() - start)
        assert not any(errors)
    return {
        "mask_us_per_row": round(1e6 * statistics.median(mask_s) / num_rows, 1),
        "worst_step_ms": round(1e3 * max(mask_s), 2),
        "accept_us_per_row": round(1e6 * statistics.median(accept_s) / num_rows, 1),
    }


def measure_apply(grammars: Grammars, num_rows: int, vocab_size: int, device: str) -> float:
    """Returns the microseconds per row in which logits are masked."""
    masks = grammars.masks(begin(grammars, "regex", num_rows))
    logits = torch.zeros(num_rows, vocab_size, device=device)
    assert masks is not None
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        masks.apply(logits)
        logits[:, :1].cpu()
        seconds.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(seconds) / num_rows, 1)


def measure_engine(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs the same rows free and under each constraint, in turns, so that other work affects all cases."""
    num_rows = options.num_rows
    prompts = [TokensPrompt(prompt_token_ids=[1 + row, 2, 3]) for row in range(num_rows)]
    rates: dict[str, list[float]] = {name: [] for name in ("none", *CONSTRAINTS)}
    with LLM(
        str(folder),
        load_format="dummy",
        dtype="float32",
        device=options.device,
        max_num_seqs=num_rows,
        max_model_len=512,
    ) as llm:
        for _ in range(1 + options.repeats):
            for name, found in rates.items():
                asked = CONSTRAINTS.get(name)
                params = SamplingParams(max_tokens=options.num_steps, ignore_eos=True, structured_outputs=asked)
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                found.append(num_tokens / (time.perf_counter() - start))
    for name, (_warm_up, *found) in rates.items():
        figures = {"median": statistics.median(found), "min": min(found), "max": max(found)}
        rounded = {which: round(rate, 1) for which, rate in figures.items()}
        yield {"case": "engine", "constraint": name, "output_tok_per_s": rounded}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the lines of all measurements."""
    num_rows, vocab_size = options.num_rows, options.vocab_size
    shape = ModelShape("qwen3", 2, 128, 256, 4, 2, 32, vocab_size, is_tied=True, max_position_embeddings=512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, shape)
        write_tokenizer(folder, vocab_size)
        grammars, line = measure_start(folder, vocab_size)
        yield line
        for constraint in CONSTRAINTS:
            figures = measure_masks(grammars, constraint, num_rows, options.num_steps)
            yield {"case": "mask", "constraint": constraint, **figures}
        yield {"case": "apply", "us_per_row": measure_apply(grammars, num_rows, vocab_size, options.device)}
        yield from measure_engine(folder, options)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    for line in run(options):
        print(json.dumps({"benchmark": "structured", **vars(options), **line}), flush=True)


if __name__ == "__main__":
    main()
