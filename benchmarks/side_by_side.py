"""Compares a job with the same job on `ray.data.llm` with vLLM: same rows, model and cores, from start to last row.

    python benchmarks/side_by_side.py --peer-python VENV/bin/python [--rows 100 500] [--rounds 3]

A job reads Parquet, sends one request for each row (greedy, 48 tokens, no earlier stop) and writes Parquet. Both sides
run the same function in a process of their own; only the import differs, and settings without which the peer does not
run on a CPU. A run is timed from the start of its process to the moment at which the last row is written. Two
numbers of rows give two figures: the whole times, and the tokens per second of the rows between the two numbers, in
which the start cancels out.

Each side runs once before the printed runs, so that both find their caches filled (vLLM's compiled graphs, files in the
page cache).

The peer is any Python that has `ray[data]`, the packages that `ray.data.llm` imports, and a vLLM for CPUs. Without it
nothing is measured, and a message says so. The model has 100 million random weights and is written to a temporary
folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS, PEER = SIDES = ("millrace", "ray.data.llm")
"""The modules that the job imports."""

MAX_TOKENS = 48
MAX_MODEL_LEN = 256
ROWS_PER_FILE = 32
"""Rows of an input file. Files are small, so that a reader that makes one block of each has many rows in flight."""

PEER_SETTINGS: dict[str, Any] = {
    "placement_group_config": {"bundle_per_worker": {"CPU": 1}},
    "log_engine_metrics": False,
}
PEER_ENGINE_KWARGS = {"distributed_executor_backend": "mp", "max_num_seqs": 256}
PEER_CPUS = 8
"""Logical CPUs that Ray is told of, because each of the peer's stages and its engine reserve a whole CPU."""

PEER_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
NEEDED = "import ray.data.llm, vllm"

WRITTEN = "last row written at"

Row = dict[str, Any]


def run_job(options: argparse.Namespace) -> None:
    """Runs the job, as a user of either side writes it, and prints when the last row was written."""
    import ray.data

    llm = importlib.import_module(options.side)
    is_peer = options.side == PEER
    settings, engine_kwargs = (PEER_SETTINGS, PEER_ENGINE_KWARGS) if is_peer else ({}, {})
    ray.init(num_cpus=PEER_CPUS if is_peer else None, include_dashboard=False)
    config = llm.vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs={"max_model_len": MAX_MODEL_LEN, **engine_kwargs, **json.loads(options.engine_kwargs)},
        chat_template_stage=False,
        **settings,
    )
    processor = llm.build_processor(config, ask, keep)
    processor(ray.data.read_parquet(options.input)).write_parquet(options.output)
    print(WRITTEN, time.time(), flush=True)


def ask(row: Row) -> Row:
    """Returns the request of a row."""
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": MAX_TOKENS}
    return {"prompt": row["text"], "sampling_params": params}


def keep(row: Row) -> Row:
    """Returns the columns that are written."""
    names = ("id", "generated_text", "num_input_tokens", "num_generated_tokens")
    return {name: row[name] for name in names}


def write_rows(folder: Path, count: int) -> None:
    """Writes rows whose texts have 40 to 60 tokens, no two the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline import WORDS

    draw = random.Random(count)
    rows = [{"id": i, "text": " ".join(draw.choices(WORDS, k=draw.randint(40, 60)))} for i in range(count)]
    folder.mkdir()
    for start in range(0, count, ROWS_PER_FILE):
        table = pa.Table.from_pylist(rows[start : start + ROWS_PER_FILE])
        pq.write_table(table, folder / f"rows-{start:06d}.parquet")


def measure(side: str, count: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one job in a process of its own.

    Args:
        side: `OURS` or `PEER`.
        count: Number of rows.
        folder: Folder of the model and the rows.
        options: The command line.

    Returns:
        The fields of the line of the run.

    Raises:
        RuntimeError: The job failed, or a row or token is missing.
    """
    from processes import run_to_the_end

    python, environment, engine_kwargs = sys.executable, dict(os.environ), options.engine_kwargs
    if side == PEER:
        peer_environment = dict(pair.split("=", 1) for pair in options.peer_env)
        python, engine_kwargs = options.peer_python, options.peer_engine_kwargs
        environment |= PEER_ENVIRONMENT | peer_environment
    with tempfile.TemporaryDirectory(dir=folder) as output:
        paths = {"--model": folder / "model", "--input": folder / f"rows-{count}", "--output": output}
        arguments = [str(part) for pair in paths.items() for part in pair]
        # -P, or Python would import the scripts of this folder in place of other projects' modules of the same names.
        command = [python, "-P", __file__, "--side", side, "--engine-kwargs", engine_kwargs, *arguments]
        done = run_to_the_end(command, environment)
        if done.code:
            raise RuntimeError(f"{side} failed on {count} rows:\n{done.printed}")
        num_tokens = count_tokens(Path(output), count)
    (written_s,) = (float(line.removeprefix(WRITTEN)) for line in done.printed.splitlines() if line.startswith(WRITTEN))
    seconds = written_s - done.started_s
    return {
        "rows": count,
        "seconds": round(seconds, 2),
        "output_tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds, 1),
        "load_before": round(done.load, 2),
        "cpus": round(done.cpus, 2),
        "other_cpus": round(done.other_cpus, 2),
    }


def count_tokens(output: Path, count: int) -> int:
    """Returns the number of output tokens of a job, after a check that each row is there once with all its tokens.

    Raises:
        RuntimeError: A row is missing, doubled, or lacks tokens.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(output)
    if sorted(table["id"].to_pylist()) != list(range(count)):
        raise RuntimeError(f"{table.num_rows} rows were written for {count}, or not each once")
    lengths = table["num_generated_tokens"].to_pylist()
    if set(lengths) != {MAX_TOKENS}:
        raise RuntimeError(f"rows have {min(lengths)} to {max(lengths)} tokens, and all want {MAX_TOKENS}")
    return sum(lengths)


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the summary of the runs.

    Args:
        lines: The lines of all runs.

    Returns:
        The seconds by side and number of rows (median, least, most); the output tokens per second by side, of the rows
        between the fewest and the most, from the medians; and for each figure the ratio of the peer's to ours.
    """
    sides, counts = ({line[name]: None for line in lines} for name in ("side", "rows"))
    seconds = {
        side: {
            count: [line["seconds"] for line in lines if (line["side"], line["rows"]) == (side, count)]
            for count in sorted(counts)
        }
        for side in sides
    }
    middle = {side: {count: statistics.median(runs) for count, runs in by.items()} for side, by in seconds.items()}
    few, many = min(counts), max(counts)
    found: dict[str, Any] = {
        "seconds": {
            side: {count: [middle[side][count], min(runs), max(runs)] for count, runs in by.items()}
            for side, by in seconds.items()
        },
    }
    if few < many:
        steady = {side: (many - few) * MAX_TOKENS / (by[many] - by[few]) for side, by in middle.items()}
        found["steady_tokens_per_s"] = {side: round(rate, 1) for side, rate in steady.items()}
    if PEER in sides and OURS in sides:
        found["ratio_in_all"] = {count: round(middle[PEER][count] / middle[OURS][count], 2) for count in counts}
        if few < many:
            found["ratio_steady"] = round(steady[OURS] / steady[PEER], 2)
    return found


def find_peer(python: str | None) -> str | None:
    """Returns the reason why the peer cannot run; None if it can."""
    if python is None:
        return f"give --peer-python a Python in which this works: {NEEDED}"
    try:
        done = subprocess.run([python, "-P", "-c", NEEDED], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"--peer-python {python}: {error}"
    if done.returncode:
        return f"--peer-python {python} fails at {NEEDED!r}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has ray[data] and vLLM for CPUs")
    parser.add_argument("--peer-env", nargs="*", default=[], metavar="NAME=VALUE", help="of the peer's processes")
    parser.add_argument("--peer-engine-kwargs", default="{}", help="further settings of vLLM, as JSON")
    parser.add_argument("--engine-kwargs", default="{}", help="further settings of our engine, as JSON")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[100, 500], help="numbers of rows, each a job of its own"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-warm-up", action="store_true", help="leave out the runs before the first round")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="run only these")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that all works")
    for name in ("--side", "--model", "--input", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs what the command line asks for."""
    options = parse()
    if options.side:
        run_job(options)
        return
    if PEER in options.sides and (reason := find_peer(options.peer_python)):
        print(f"side_by_side: skipped, the peer is not there: {reason}", file=sys.stderr)
        return
    from models import SHAPES
    from pipeline import SHAPE_100M, write_model

    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", SHAPES["tiny"] if options.tiny else SHAPE_100M)
        for count in options.rows:
            write_rows(folder / f"rows-{count}", count)
        for side in () if options.no_warm_up else options.sides:
            measure(side, min(options.rows), folder, options)
        for round_index in range(options.rounds):
            for count in options.rows:
                for side in options.sides:
                    line = {"side": side, "round": round_index} | measure(side, count, folder, options)
                    lines.append(line)
                    print(json.dumps({"benchmark": "side_by_side"} | line), flush=True)
    print(json.dumps({"benchmark": "side_by_side", "case": "summary"} | summary(lines)), flush=True)


if __name__ == "__main__":
    main()
