"""Measures the throughput of workloads, with random weights in the shapes of real models, and the machine's limit.

    python benchmarks/offline.py --model qwen3-8b --workloads nano 1024/1024 --quantization fp8 --kv-cache-dtype fp8
    python benchmarks/offline.py --model qwen3-0.6b --peer transformers
    python benchmarks/offline.py --model qwen3-8b --workloads 1024/1024 --adapters 8

Nothing is downloaded: config.json is written on the spot, prompts are token ids, and there is no tokenizer. One JSON
line per workload. `share_of_limit` is the time that roofline.py computes from the limits measured in the same run, over
the measured time. Every workload is warmed up by requests of the same lengths, so that neither compiling nor capturing
is timed. With `--adapters` the requests name that many LoRA adapters in turn; 0 shows what the setting costs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from limits import Limits, measure_limits
from models import SHAPES, write_adapter, write_config
from roofline import Roofline, ideal_seconds
from workloads import FULL, TEMPERATURE, TINY, WORKLOADS, Workload

MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 16_384
RANK = 16
"""Rank of the adapters."""


class Engine(Protocol):
    """The interface of an engine that runs workloads."""

    def generate(self, workload: Workload) -> list[int]:
        """Runs all requests; returns the number of tokens of each one."""

    def close(self) -> None:
        """Gives the memory back."""


class MillraceEngine:
    """This engine, without a tokenizer.

    Args:
        options: The command line.
        folder: Holds config.json.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from millrace import LLM, LoRARequest

        self._adapters: list[LoRARequest | None] = [None]
        if options.adapters:
            write_adapters(folder, options)
            self._adapters = [LoRARequest(str(i), i + 1, str(folder / str(i))) for i in range(options.adapters)]
        self._llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype=options.dtype,
            device=options.device,
            max_model_len=SHAPES["tiny"].max_position_embeddings if options.model == "tiny" else 4096,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            deterministic=options.deterministic,
            enforce_eager=options.enforce_eager,
            **adapter_settings(options),
        )

    def close(self) -> None:
        """Gives the memory back."""
        self._llm.close()

    def generate(self, workload: Workload) -> list[int]:
        """Runs all requests in one call."""
        from millrace import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in workload.prompts]
        params = [SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=n) for n in workload.max_tokens]
        adapters = [self._adapters[i % len(self._adapters)] for i in range(len(prompts))]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        return [len(output.outputs[0].token_ids) for output in outputs]


def adapter_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of an engine with adapters; none if the command line does not ask for them."""
    if options.adapters is None:
        return {}
    return {"enable_lora": True, "max_loras": max(1, options.adapters), "max_lora_rank": RANK}


def write_adapters(folder: Path, options: argparse.Namespace) -> None:
    """Writes as many random adapters as the command line asks for."""
    for i in range(options.adapters):
        write_adapter(folder / str(i), SHAPES[options.model], RANK)


def measure(engine: Engine, workload: Workload) -> float:
    """Returns the seconds that a workload takes, after a warm-up with requests of the same lengths.

    Raises:
        RuntimeError: A request has another number of tokens than it asked for.
    """
    engine.generate(workload.warm_up(MAX_NUM_BATCHED_TOKENS))
    start = time.perf_counter()
    lengths = engine.generate(workload)
    seconds = time.perf_counter() - start
    wrong = [i for i, (got, wanted) in enumerate(zip(lengths, workload.max_tokens, strict=True)) if got != wanted]
    if wrong:
        raise RuntimeError(f"{workload.name}: requests {wrong[:10]} got another number of tokens than they asked for")
    return seconds


def run(options: argparse.Namespace) -> None:
    """Measures the limits, then every workload."""
    shape = SHAPES[options.model]
    scale = TINY if options.model == "tiny" else FULL
    limits = measure_limits(torch.device(options.device), is_tiny=options.model == "tiny")
    roofline = Roofline(shape, limits, options.dtype, options.quantization, options.kv_cache_dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, shape)
        with contextlib.closing(make_engine(options, folder)) as engine:
            for workload in (WORKLOADS[name](scale).shortened(options.scale) for name in options.workloads):
                seconds = measure(engine, workload)
                ideal_s = ideal_seconds(roofline, workload, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS)
                print(json.dumps(settings(options, limits) | workload.figures(seconds, ideal_s)), flush=True)


def make_engine(options: argparse.Namespace, folder: Path) -> Engine:
    """Makes the engine that the command line names."""
    if options.engine == "millrace":
        return MillraceEngine(options, folder)
    from peers import TransformersEngine

    return TransformersEngine(folder, options.device, options.dtype)


def settings(options: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Returns the fields of a line that name the settings of the run and the machine."""
    names = ("engine", "model", "dtype", "quantization", "kv_cache_dtype", "deterministic", "enforce_eager", "adapters")
    return {"benchmark": "offline", **{name: getattr(options, name) for name in names}, **limits.figures()}


def run_peer(options: argparse.Namespace) -> None:
    """Runs the same workloads with another engine, in a process of its own; prints the reason if that fails."""
    same = ["--model", options.model, "--device", options.device, "--dtype", options.dtype]
    same += ["--scale", str(options.scale), "--workloads", *options.workloads]
    command = [sys.executable, __file__, "--engine", options.peer, *same]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print("".join(line + "\n" for line in done.stdout.splitlines() if line.startswith("{")), end="", flush=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        skipped = {"benchmark": "offline", "engine": options.peer, "model": options.model, "skipped": reason}
        print(json.dumps(skipped), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; the defaults follow from the device."""
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if has_cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", choices=list(SHAPES), help="qwen3-0.6b on a GPU, tiny on a CPU, if not given")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--scale", type=int, default=1, metavar="DIVISOR", help="divide the lengths of outputs by it")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="the device's own if not given")
    parser.add_argument("--quantization", choices=["fp8", "int4", "int8"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument(
        "--adapters", type=int, metavar="NUMBER", help="of LoRA; the engine has no room for any without"
    )
    parser.add_argument("--engine", default="millrace", choices=["millrace", "transformers"])
    parser.add_argument("--peer", choices=["transformers"], help="run this engine too, in a process of its own")
    options = parser.parse_args(arguments)
    options.model = options.model or {"cuda": "qwen3-0.6b", "cpu": "tiny"}[options.device]
    options.dtype = options.dtype or {"cuda": "bfloat16", "cpu": "float32"}[options.device]
    return options


def main() -> None:
    """Runs what the command line asks for."""
    options = parse()
    run(options)
    if options.peer:
        run_peer(options)


if __name__ == "__main__":
    main()
