"""`seeded`: derives the seed of a row that samples without a seed, so that a rerun repeats its draws.

The engine draws token i of a request from (seed, i). The seed is derived from the job's seed, the prompt, the
parameters and the identity of the row, so a row's output depends neither on its batch nor on its replica, and a rerun
repeats it. Where identical rows run once, identity has no part in the seed, so that such rows have equal draws.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from ..engine import SamplingParams

MAX_SEED = 2**63 - 1


def seeded(
    params: SamplingParams,
    job_seed: int,
    prompt: str | None,
    prompt_token_ids: list[int] | None,
    identity: bytes | int | None = None,
) -> SamplingParams:
    """Returns the parameters of a row, with a seed if the row samples.

    Args:
        params: The row's parameters.
        job_seed: Seed of the job.
        prompt: The row's prompt as text; it is hashed if there are no token ids.
        prompt_token_ids: The row's prompt as tokens.
        identity: The identity of the row among rows with the same prompt and parameters; None if all draw alike.

    Returns:
        The same parameters if they are greedy or have a seed, otherwise a copy with a derived seed.
    """
    if params.is_greedy or params.seed is not None:
        return params
    asked = prompt if prompt_token_ids is None else prompt_token_ids
    return params.clone(seed=derive_seed(job_seed, asked, params, identity))


def derive_seed(
    job_seed: int, prompt: str | list[int] | None, params: SamplingParams, identity: bytes | int | None = None
) -> int:
    """Returns a seed hashed from the arguments, equal on every machine and release of Python.

    Args:
        job_seed: Seed of the job.
        prompt: Prompt as text or as token ids.
        params: Sampling parameters, of which those in `DRAW_FIELDS` enter the hash.
        identity: As in `seeded`.

    Returns:
        An integer in [0, 2**63).
    """
    fields = {name: value for name, value in asdict(params).items() if name in DRAW_FIELDS}
    named = [] if identity is None else [identity.hex() if isinstance(identity, bytes) else identity]
    text = json.dumps([job_seed, prompt, fields, *named], sort_keys=True, ensure_ascii=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED


DRAW_FIELDS = frozenset({
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words",
})  # fmt: skip
"""Names of the sampling parameters that change the distribution from which a token is drawn."""
