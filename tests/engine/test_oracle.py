"""Greedy tokens and log-probabilities equal Hugging Face's, whatever the scheduler does to the requests meanwhile."""

from __future__ import annotations

import random

import pytest

from checkpoints import FAMILIES
from millrace.engine.llm import LLM
from millrace.engine.models import describe_model, load_hf_config
from millrace.engine.sampling_params import SamplingParams
from oracles import greedy, score_prompt

MAX_TOKENS = 20
NUM_BLOCKS = {"mistral": 24, "mixtral": 24, "phi3": 24, "starcoder2": 24}
"""Blocks of families whose sequences hold few: all their layers see windows."""
VOCAB = 256


def mixed_prompts(num_prompts: int = 32, seed: int = 0) -> list[list[int]]:
    """Half of the prompts share a prefix; lengths go from 1 token to more than a step's budget."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(37)]
    lengths = [1, 3, 9, 16, 25, 42, 60, 75]
    prompts = []
    for i in range(num_prompts):
        own = [rng.randrange(VOCAB) for _ in range(lengths[i % 8])]
        prompts.append((shared + own)[: 37 + lengths[i % 8]] if i % 16 >= 8 else own)
    return prompts


@pytest.mark.parametrize(
    ("family", "depth"), [*((family, 1) for family in FAMILIES), ("llama", 0), ("gemma2", 0), ("mixtral", 0)]
)
def test_greedy_equals_hugging_face_under_pressure(family, depth, device, tiny_model, references):
    prompts = mixed_prompts()
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3)
    with LLM(
        str(tiny_model(family)),
        dtype="float32",
        block_size=4,
        num_gpu_blocks_override=NUM_BLOCKS.get(family, 90),
        max_model_len=144,
        max_num_seqs=16,
        max_num_batched_tokens=48,
        overlap_depth=depth,
        device=device,
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.llm_engine.check_integrity()
        counters = llm.stats().counters
    assert counters.num_preemptions > 0, "the block pool was to be too small"
    assert counters.num_chunked_prefills > 0
    keeps_states = describe_model(load_hf_config(tiny_model(family))).state is not None
    tolerance = 1e-3 if keeps_states else 1e-4  # Errors of a state stay in it.
    assert (counters.num_cached_tokens == 0) == keeps_states, "a prefix is found where no layer keeps states"
    for output, reference in zip(outputs, references(family, prompts), strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == reference.token_ids
        for step, entry in enumerate(completion.logprobs):
            sampled = completion.token_ids[step]
            assert next(iter(entry)) == sampled and entry[sampled].rank == 1
            assert len(entry) == 3
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(reference.logprobs[step, token_id].item(), abs=tolerance)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_prompt_logprobs_equal_hugging_face_in_chunks(family, device, tiny_model):
    prompt = mixed_prompts()[7]
    expected = score_prompt(tiny_model(family), prompt)
    with LLM(str(tiny_model(family)), dtype="float32", max_num_batched_tokens=20, device=device) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
        # The second call finds the prompt in the prefix cache and must score it all the same.
        for _ in range(2):
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            assert len(output.prompt_logprobs) == len(prompt) and output.prompt_logprobs[0] is None
            for position in range(1, len(prompt)):
                entry = output.prompt_logprobs[position]
                row = expected[position - 1]
                assert next(iter(entry)) == prompt[position]
                assert entry[prompt[position]].rank == 1 + int((row > row[prompt[position]]).sum())
                for token_id, logprob in entry.items():
                    assert logprob.logprob == pytest.approx(row[token_id].item(), abs=1e-4)


@pytest.fixture(scope="module")
def references(tiny_model):
    """A function from a family and prompts to Hugging Face's results, computed once a family."""
    known: dict[str, list] = {}

    def get(family: str, prompts: list[list[int]]) -> list:
        if family not in known:
            known[family] = greedy(tiny_model(family), prompts, MAX_TOKENS)
        return known[family]

    return get
