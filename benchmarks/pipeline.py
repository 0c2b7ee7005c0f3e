"""Compares the throughput of the pipeline with that of the engine: the same rows in `LLM.generate` and a processor.

    python benchmarks/pipeline.py [--model FOLDER] [--rows 2000] [--rounds 3] [--replicas 1]

Without a folder, 100 million random weights and a small tokenizer are written to a temporary one. Rows are sentences of
20 to 60 words that ask for 16 to 48 tokens each. Each case runs in a process of its own and prints its output tokens
per second; the last line has the medians and their ratio.

The start is not timed. Other rows warm both cases up, and the replicas are ready before the second dataset. Its time
runs from the moment at which the first row enters preprocess, when all of Ray Data's actors are running, to the moment
at which the driver has the last row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import SHAPES, ModelShape, write_checkpoint

SHAPE_100M = ModelShape("qwen3", 12, 768, 2048, 12, 4, 64, 32_000, is_tied=True, max_position_embeddings=4096)
CASES = ("engine", "pipeline")
WORDS = (
    "a",
    "mill",
    "turns",
    "wheels",
    "as",
    "long",
    "as",
    "water",
    "comes",
    "down",
    "the",
    "race",
    "and",
    "rows",
    "stream",
    "in",
    "while",
    "results",
    "go",
    "out",
)
TEMPERATURE = 0.7
WARM_UP_ROWS = 64
START_TIMEOUT_S = 300

Row = dict[str, Any]


def make_rows(count: int, seed: int) -> list[Row]:
    """Makes rows of texts, most of 20 to 60 tokens, that ask for 16 to 48 tokens each."""
    draw = random.Random(seed)
    return [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(20, 60))), "max_tokens": draw.randint(16, 48)}
        for _ in range(count)
    ]


def write_model(folder: Path, shape: ModelShape) -> None:
    """Writes random weights, and a tokenizer in which each of our words is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    write_checkpoint(folder, shape)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    # The model draws ids of its whole vocabulary, and ids without a word would make no text. They become words of the
    # vocabulary that no merge gives, because so many added tokens would take seconds to load.
    fields = json.loads(tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    vocab |= {f"\u0120word{token_id}": token_id for token_id in range(len(vocab), shape.vocab_size)}
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def run_engine(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs the rows in one call of `LLM.generate`."""
    from millrace import LLM, SamplingParams

    def generate(rows: list[Row]) -> int:
        params = [SamplingParams(**params_of(row)) for row in rows]
        outputs = llm.generate([row["text"] for row in rows], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    with LLM(options.model, **engine_kwargs(options)) as llm:
        generate(make_rows(WARM_UP_ROWS, seed=1))
        rows = make_rows(options.rows, seed=0)
        start_s = time.time()
        num_tokens = generate(rows)
        yield figures(rows, num_tokens, time.time() - start_s)


def run_pipeline(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs the rows as a dataset, through a processor whose replicas are ready."""
    import ray

    from millrace import EngineProcessorConfig, build_llm_processor

    ray.init(num_cpus=options.cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = START_TIMEOUT_S
    config = EngineProcessorConfig(
        model_source=options.model, engine_kwargs=engine_kwargs(options), concurrency=options.replicas
    )

    def ask(row: Row) -> Row:
        return {"prompt": row["text"], "sampling_params": params_of(row), "entered_s": time.time()}

    def keep(row: Row) -> Row:
        return {name: row[name] for name in ("text", "generated_text", "num_generated_tokens", "entered_s")}

    with build_llm_processor(config, ask, keep) as processor:
        processor(ray.data.from_items(make_rows(WARM_UP_ROWS, seed=1))).take_all()
        rows = make_rows(options.rows, seed=0)
        called_s = time.time()
        results = processor(ray.data.from_items(rows)).take_all()
        end_s = time.time()
    ray.shutdown()
    assert sorted(row["text"] for row in results) == sorted(row["text"] for row in rows)
    entered_s = min(row["entered_s"] for row in results)
    num_tokens = sum(row["num_generated_tokens"] for row in results)
    yield figures(rows, num_tokens, end_s - entered_s) | {"operators_start_s": round(entered_s - called_s, 2)}


def params_of(row: Row) -> dict[str, Any]:
    """Returns a row's sampling parameters."""
    return {"temperature": TEMPERATURE, "ignore_eos": True, "max_tokens": row["max_tokens"]}


def engine_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the engine's settings, the same for both cases."""
    return {"max_model_len": 256, "device": options.device, **json.loads(options.engine_kwargs)}


def figures(rows: list[Row], num_tokens: int, seconds: float) -> dict[str, Any]:
    """Returns the fields of a line: rows, tokens, seconds and tokens per second.

    Raises:
        RuntimeError: The rows have another number of tokens than they asked for.
    """
    if num_tokens != (wanted := sum(row["max_tokens"] for row in rows)):
        raise RuntimeError(f"{num_tokens} tokens came, and {wanted} were asked for")
    rate = round(num_tokens / seconds, 1)
    return {"rows": len(rows), "output_tokens": num_tokens, "seconds": round(seconds, 2), "tokens_per_s": rate}


def measure(case: str, arguments: list[str], model: str) -> dict[str, Any]:
    """Runs a case in a process of its own.

    Raises:
        RuntimeError: It failed; the message is what it printed.
    """
    command = [sys.executable, __file__, *arguments, "--model", model, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


@contextlib.contextmanager
def model_folder(options: argparse.Namespace) -> Iterator[str]:
    """Yields the folder of the model, and removes it afterwards if it was written for this run."""
    if options.model:
        yield options.model
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPES["tiny"] if options.tiny else SHAPE_100M)
        yield folder


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder with a tokenizer")
    parser.add_argument("--tiny", action="store_true", help="write a tiny model instead, to see that all works")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus", type=int, help="of Ray; the machine's if not given")
    parser.add_argument("--engine-kwargs", default="{}", help="further settings of the engine, as JSON")
    parser.add_argument("--case", choices=CASES, help="run only this one, in this process")
    return parser.parse_args(arguments)


def main() -> None:
    """Runs what the command line asks for."""
    options = parse(sys.argv[1:])
    settings = {"benchmark": "pipeline", "replicas": options.replicas}
    if options.case:
        run = {"engine": run_engine, "pipeline": run_pipeline}[options.case]
        for line in run(options):
            print(json.dumps(settings | {"case": options.case} | line), flush=True)
        return
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    with model_folder(options) as model:
        for _ in range(options.rounds):
            for case in CASES:
                line = measure(case, sys.argv[1:], model)
                rates[case].append(line["tokens_per_s"])
                print(json.dumps(line), flush=True)
    engine, pipeline = (statistics.median(rates[case]) for case in CASES)
    ratio = {"engine_tokens_per_s": engine, "pipeline_tokens_per_s": pipeline, "ratio": round(pipeline / engine, 3)}
    print(json.dumps(settings | {"case": "ratio"} | ratio), flush=True)


if __name__ == "__main__":
    main()
