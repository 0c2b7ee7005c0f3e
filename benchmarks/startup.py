"""Seconds from process start to the first generated token, with the bundled model, in a fresh process each time.

Prints one JSON line. `--model` takes any local folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

SCRIPT = """
import time
from millrace import LLM, SamplingParams
imported = time.time()
with LLM({model!r}) as llm:
    loaded = time.time()
    llm.generate(["Inv #4821 - due 3 March '24 - total USD 1,204.50"], SamplingParams(max_tokens=1), use_tqdm=False)
    print(imported, loaded, time.time())
"""


def measure(model: str) -> dict[str, float]:
    """Runs one fresh process.

    Returns:
        Seconds since its start at which the package was imported, the model loaded, and the first token there.
    """
    start = time.time()
    command = [sys.executable, "-P", "-c", SCRIPT.format(model=model)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    imported, loaded, first_token = (float(field) - start for field in printed.split()[-3:])
    return {
        "import_s": imported,
        "load_s": loaded - imported,
        "first_step_s": first_token - loaded,
        "total_s": first_token,
    }


def main() -> None:
    """Measures a few processes and prints the medians, and the first one by itself: it may have to compile kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled:invoices")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    first = measure(args.model)
    runs = [measure(args.model) for _ in range(args.runs)]
    medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in first}
    print(json.dumps({"case": "startup", "model": args.model, "first_run_s": round(first["total_s"], 2), **medians}))


if __name__ == "__main__":
    main()
