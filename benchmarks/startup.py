"""Measures the seconds from the start of a process to the first generated token, with files on a local disk.

    python benchmarks/startup.py [--model bundled:invoices | qwen3-8b | FOLDER] [--device cuda] [--runs 3]

For the name of a shape (models.py) a checkpoint of random weights is written to a temporary folder first. The cold
start comes first: the checkpoint's files are dropped from the page cache, and Triton's cache is empty. Warm starts
follow, of which the median counts. Prints one JSON line for each, with the parts: imports, engine (config, tokenizer,
weights, memory), first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from models import SHAPES, write_checkpoint

SCRIPT = """
import json, sys, time
from millrace import LLM, SamplingParams
imported = time.time()
with LLM(**json.loads(sys.argv[1])) as llm:
    loaded = time.time()
    prompt = {"prompt_token_ids": list(range(3, 67))}
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
    print(imported, loaded, time.time())
"""


def measure(settings: dict[str, object], triton_cache: str) -> dict[str, float]:
    """Runs one fresh process.

    Args:
        settings: Arguments of `LLM`.
        triton_cache: Folder of compiled kernels.

    Returns:
        The seconds of the import of the package, of the engine's start and of the first step, and their sum.

    Raises:
        RuntimeError: The process failed; the message is what it printed.
    """
    start = time.time()
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(settings)]
    environment = {**os.environ, "TRITON_CACHE_DIR": triton_cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    imported, loaded, first_token = (float(field) - start for field in done.stdout.split()[-3:])
    return {
        "imports_s": imported,
        "engine_s": loaded - imported,
        "first_step_s": first_token - loaded,
        "first_token_s": first_token,
    }


def drop_from_page_cache(folder: Path) -> None:
    """Makes the next reader of a folder's files fetch them from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def checkpoint(model: str) -> Iterator[tuple[str, bool]]:
    """Yields the folder of a model, and whether it has a tokenizer; removes a folder that was written for this run."""
    if model not in SHAPES:
        yield model, True
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), SHAPES[model])
        yield folder, False


def main() -> None:
    """Measures a cold start, then warm ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:invoices", help=f"a local folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--runs", type=int, default=3, help="warm starts")
    options = parser.parse_args()
    with checkpoint(options.model) as (model, has_tokenizer), tempfile.TemporaryDirectory() as triton_cache:
        settings = {"model": model, "device": options.device, "skip_tokenizer_init": not has_tokenizer}
        if Path(model).is_dir():
            drop_from_page_cache(Path(model))
        cold = measure(settings, triton_cache)
        warm = [measure(settings, triton_cache) for _ in range(options.runs)]
        for state, runs in {"cold": [cold], **({"warm": warm} if warm else {})}.items():
            figures = {name: round(statistics.median(run[name] for run in runs), 2) for name in cold}
            line = {"benchmark": "startup", "model": options.model, "device": options.device, "state": state}
            print(json.dumps(line | figures), flush=True)


if __name__ == "__main__":
    main()
