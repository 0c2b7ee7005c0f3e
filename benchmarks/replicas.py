"""Measures the gain of a second replica: one and two engines of one thread each, on the same rows.

Prints a JSON line for each number of replicas and one for the ratio. On two idle cores the limit is 2; the
difference is the cost of Ray, the client and the memory that the two replicas share.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import ray

from millrace.actors import EnginePool, PoolClient, PoolConfig
from millrace.engine.outputs import RequestOutput
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from models import ModelShape, write_config

SHAPE = ModelShape("llama", 8, 512, 1536, 8, 4, 64, 16_384, is_tied=False, max_position_embeddings=1024)
"""A model of 40 million parameters: small enough for a core, and so large that computing takes most of the time."""


def measure(folder: str, num_replicas: int, num_rows: int) -> float:
    """Returns the output tokens per second of a pool."""
    kwargs = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 256}
    config = PoolConfig(
        engine_kwargs={**kwargs, "num_threads": 1, "max_num_seqs": 16},
        num_replicas=num_replicas,
        num_cpus_per_replica=0,
    )
    params = SamplingParams(max_tokens=48, ignore_eos=True, temperature=0, detokenize=False)
    rows = [GenerateRequest(str(row), None, [5 + row % 100] * 32, params) for row in range(num_rows)]
    with EnginePool.start(config) as pool:
        pool.wait_ready()
        client = PoolClient(pool.name)
        list(client.generate(rows[: 4 * num_replicas]))
        start_s = time.perf_counter()
        outputs = [output for output in client.generate(rows) if isinstance(output, RequestOutput)]
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return num_tokens / (time.perf_counter() - start_s)


def main() -> None:
    """Measures one and two replicas in turns and prints the best of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    best: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), SHAPE)
        for _ in range(args.repeats):
            for num_replicas in (1, 2):
                rate = measure(folder, num_replicas, args.rows)
                best[num_replicas] = max(rate, best.get(num_replicas, 0.0))
    for num_replicas, rate in best.items():
        print(json.dumps({"case": f"replicas/{num_replicas}", "output_tokens_per_s": round(rate, 1)}))
    print(json.dumps({"case": "replicas/ratio", "ratio": round(best[2] / best[1], 3), "limit": 2.0}))


if __name__ == "__main__":
    main()
