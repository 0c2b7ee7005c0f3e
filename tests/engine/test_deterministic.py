"""`deterministic=True`: a token's log-probabilities are the same to the bit, whatever else is computed beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_checkpoint
from millrace.engine.layers import InvariantLinear, Linear
from millrace.engine.llm import LLM
from millrace.engine.models import Decoder, ModelOptions, load_hf_config, load_model
from millrace.engine.outputs import RequestOutput
from millrace.engine.sampling_params import SamplingParams
from paged import SCHEDULES, PagedSequences, random_sequences

DETERMINISTIC = ModelOptions(deterministic=True)
DTYPES = [torch.float32, torch.bfloat16]


@torch.inference_mode()
def alone(model: Decoder, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Returns the logits of a sequence that is computed by itself, in one step."""
    return PagedSequences(model, [tokens], dtype, seed=1).step({0: len(tokens)})[0]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen2-moe", "qwen3", "opt", "opt-350m"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_sequence_alone_equals_itself_in_any_schedule(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, load_hf_config(folder), dtype, "cpu", DETERMINISTIC)
    sequences = random_sequences()
    expected = [alone(model, tokens, dtype) for tokens in sequences]
    for name, schedule in SCHEDULES.items():
        for index, logits in enumerate(PagedSequences(model, sequences, dtype).run(schedule())):
            assert torch.equal(logits, expected[index]), f"sequence {index} in {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_long_prompts_and_threads_change_nothing(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(folder, load_hf_config(folder), dtype, "cpu", DETERMINISTIC)
    generator = torch.Generator().manual_seed(3)
    lengths = (90, 1, 33, 160)
    sequences = [torch.randint(3, 384, (length,), generator=generator).tolist() for length in lengths]
    expected = [alone(model, tokens, dtype) for tokens in sequences]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3 - num_threads if num_threads < 3 else 1)
    try:
        steps = [{0: 7, 3: 100}, {2: 17, 0: 83}, {3: 60, 1: 1, 2: 16}]
        results = PagedSequences(model, sequences, dtype).run(iter(steps))
    finally:
        torch.set_num_threads(num_threads)
    for logits, wanted in zip(results, expected, strict=True):
        assert torch.equal(logits, wanted)


@torch.inference_mode()
def test_every_matrix_of_the_model_is_invariant(folder: Path) -> None:
    model = load_model(folder, load_hf_config(folder), torch.float32, "cpu", DETERMINISTIC)
    kinds = {type(module) for module in model.modules() if isinstance(module, Linear)}
    assert kinds == {InvariantLinear}


@torch.inference_mode()
def test_it_computes_what_the_model_computes_otherwise(folder: Path) -> None:
    plain, invariant = (
        load_model(folder, load_hf_config(folder), torch.float32, "cpu", options)
        for options in (ModelOptions(), DETERMINISTIC)
    )
    for tokens in random_sequences():
        logits, wanted = (alone(model, tokens, torch.float32) for model in (invariant, plain))
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def scores(output: RequestOutput) -> list[dict[int, float]]:
    """Returns the log-probabilities of all scored tokens: the prompt's, then the sampled ones."""
    positions = [entry for entry in output.prompt_logprobs or () if entry] + output.outputs[0].logprobs
    return [{token_id: logprob.logprob for token_id, logprob in position.items()} for position in positions]


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16"), ("opt", "float32")])
def test_a_prompt_alone_equals_itself_in_a_busy_engine(
    tiny_model: Callable[[str], Path], device: str, family: str, dtype: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 3, 9, 16, 25, 42, 60, 75]
    prompts = [torch.randint(3, 384, (length,), generator=generator).tolist() for length in lengths]
    prompts += [prompts[-1][:50] + prompts[4], prompts[-1][:50] + prompts[3]]
    # A prompt that is to be scored is computed whole; the last four may find theirs in the prefix cache.
    params = [
        SamplingParams(temperature=0.8, seed=4, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=scored)
        for scored in [2] * 6 + [None] * 4
    ]
    settings = {"dtype": dtype, "deterministic": True, "block_size": 4, "device": device}
    with LLM(str(tiny_model(family)), enable_prefix_caching=False, **settings) as llm:
        expected = [llm.generate([prompts[i]], [params[i]], use_tqdm=False)[0] for i in range(len(prompts))]
    sizes = {"num_gpu_blocks_override": 36, "max_model_len": 144, "max_num_batched_tokens": 33}
    with LLM(str(tiny_model(family)), **settings, **sizes) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        counters = llm.stats().counters
    assert counters.num_preemptions > 0 and counters.num_chunked_prefills > 0 and counters.num_cached_tokens > 0
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert scores(output) == scores(wanted)
