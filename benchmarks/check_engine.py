"""Checks on this machine that the engine draws the tokens it should, however its steps are run.

    python benchmarks/check_engine.py [--device cuda]

One JSON line per check. First a tiny model in float32: launched steps and recorded ones, with and without planning
ahead, draw the tokens of transformers. If only the cases that plan ahead fail, host and device race; if only the
recorded ones fail, the recordings are wrong. Then a model of the size of Qwen3-0.6B in bfloat16: recorded steps draw
the tokens of launched ones, and with `deterministic` a prompt alone has the tokens and log-probabilities, to the bit,
that it has among 63 others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from millrace import LLM, SamplingParams, TokensPrompt
from models import SHAPES, write_checkpoint, write_config

Prompts = list[list[int]]
Tokens = list[list[int]]
LEAST_SHARE = 0.9
"""Least share of requests whose first tokens must be the same in bfloat16, where other shapes round differently."""
NUM_COMPARED = 4
"""Tokens of a request that are compared in bfloat16: one that differs changes all after it."""


def draw_prompts(count: int, longest: int, vocab_size: int) -> Prompts:
    """Returns prompts of 1 to `longest` tokens."""
    draw = Random(0)
    return [[draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def generate(llm: LLM, prompts: Prompts, num_tokens: int) -> list[Any]:
    """Returns the completion of each prompt: the most likely tokens, with their log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
    wrapped = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(wrapped, params, use_tqdm=False)]


def tokens(completions: Sequence[Any]) -> Tokens:
    """Returns the token ids of completions."""
    return [list(completion.token_ids) for completion in completions]


def scores(completion: Any) -> list[float]:
    """Returns the log-probability of each token of a completion."""
    return [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs, strict=True)]


@torch.inference_mode()
def reference(folder: Path, prompts: Prompts, num_tokens: int, device: str) -> Tokens:
    """Returns the most likely tokens by transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        # Every step computes the whole sequence anew, so that no cache is part of the reference.
        for _ in range(num_tokens):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        results.append(ids[0, len(prompt) :].tolist())
    return results


def check_tiny(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Compares the ways to run steps with transformers, on a tiny model in float32."""
    shape = SHAPES["tiny"]
    write_checkpoint(folder, shape)
    prompts = draw_prompts(12, 60, shape.vocab_size)
    expected = reference(folder, prompts, 12, device)
    for is_eager in (True, False):
        for depth in (0, 1):
            settings = {"enforce_eager": is_eager, "overlap_depth": depth, "dtype": "float32", "device": device}
            sizes = {"block_size": 16, "max_num_batched_tokens": 128, "max_num_seqs": 8, "max_model_len": 96}
            with LLM(str(folder), skip_tokenizer_init=True, **settings, **sizes) as llm:
                drawn = tokens(generate(llm, prompts, 12))
            wrong = sum(got != wanted for got, wanted in zip(drawn, expected, strict=True))
            name = f"tiny float32, {'launched' if is_eager else 'recorded'}, overlap_depth={depth}"
            yield result(f"{name} = transformers", wrong, f"{wrong} of {len(prompts)} requests draw other tokens")


def check_real(folder: Path, device: str, model: str) -> Iterator[dict[str, Any]]:
    """Compares recorded steps with launched ones, and deterministic runs with each other, on a model of a real size."""
    write_config(folder, SHAPES[model])
    prompts = draw_prompts(32, 200 if device == "cuda" else 20, SHAPES[model].vocab_size)
    found = []
    for is_eager in (True, False):
        with open_llm(folder, device, enforce_eager=is_eager) as llm:
            found.append(tokens(generate(llm, prompts, 24)))
    same = sum(a[:NUM_COMPARED] == b[:NUM_COMPARED] for a, b in zip(*found, strict=True))
    share = same / len(prompts)
    name = f"{model} bfloat16, recorded = launched"
    yield result(name, share < LEAST_SHARE, f"{share:.0%} of the requests begin alike", share=round(share, 3))
    yield from check_deterministic(folder, device, model)


def check_deterministic(folder: Path, device: str, model: str) -> Iterator[dict[str, Any]]:
    """Compares a prompt alone with itself among others, to the bit."""
    prompts = draw_prompts(64, 200 if device == "cuda" else 20, SHAPES[model].vocab_size)
    with open_llm(folder, device, deterministic=True) as llm:
        together = generate(llm, prompts, 16)
        alone = [generate(llm, [prompt], 16)[0] for prompt in prompts[:4]]
    wrong = sum(
        (tokens([a]), scores(a)) != (tokens([b]), scores(b)) for a, b in zip(alone, together[: len(alone)], strict=True)
    )
    name = f"{model} bfloat16, deterministic: 1 = 64 at once"
    yield result(name, wrong, f"{wrong} of {len(alone)} prompts differ")


def open_llm(folder: Path, device: str, **settings: Any) -> LLM:
    """Opens an engine with random weights, the same each time, and without a prefix cache."""
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 512}
    fixed = {"skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "enable_prefix_caching": False}
    return LLM(str(folder), device=device, **fixed, **sizes, **settings)


def result(name: str, is_wrong: float, reason: str, **figures: Any) -> dict[str, Any]:
    """Returns the line of a check."""
    line = {"benchmark": "check_engine", "check": name, **figures}
    return line | ({"failed": reason} if is_wrong else {"agrees": True})


def guarded(check: Callable[..., Iterator[dict[str, Any]]], *arguments: Any) -> Iterator[dict[str, Any]]:
    """Yields the lines of some checks, and if one raises an error a line that says so."""
    try:
        yield from check(*arguments)
    except Exception as error:  # noqa: BLE001 - the other checks run whatever one raises
        yield result(check.__name__, True, f"{type(error).__name__}: {error}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="qwen3-0.6b", choices=list(SHAPES), help="of the second part")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs all checks; returns 1 if one failed."""
    options = parse()
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        checks = (
            guarded(check_tiny, Path(name) / "tiny", options.device),
            guarded(check_real, Path(name) / "real", options.device, options.model),
        )
        for lines in checks:
            start = time.perf_counter()
            for line in lines:
                print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
                wrong += [line["check"]] if "failed" in line else []
                start = time.perf_counter()
    if wrong:
        print(f"wrong: {'; '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
