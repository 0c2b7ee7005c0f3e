"""Recorded decode steps on the CPU: the same tokens, for every number of sequences, and a way out for other models."""

from __future__ import annotations

import pytest
import torch

from millrace import LLM, SamplingParams
from millrace.engine.step.decode_tape import DecodeTape
from millrace.kernels._native import find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="no compiled kernels here")
needs_panels = pytest.mark.skipif(
    not hasattr(find_library(), "packed_linear_bf16"), reason="no compiled kernel for weights of bfloat16 here"
)
QUANTIZATIONS = (pytest.param(None, marks=needs_panels), "int4")


@pytest.fixture(autouse=True)
def no_amx(monkeypatch):
    """With AMX, products are oneDNN's, which cannot be recorded: these tests are about the others."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)


PREFIX = list(range(5, 47))
PROMPTS = [[*PREFIX[: 3 * i], 7 + i, 60 - i] for i in range(9)]


def generate(folder: object, prompts: list[list[int]], **settings: object) -> tuple[list[object], DecodeTape | None]:
    """Returns the tokens and log-probabilities of each prompt, and what recorded the decode steps."""
    params = [
        SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=5 + 3 * i, ignore_eos=True, logprobs=1)
        for i in range(9)
    ]
    with LLM(str(folder), dtype="bfloat16", max_num_seqs=8, **settings) as llm:
        outputs = llm.generate(prompts, params[: len(prompts)], use_tqdm=False)
        recorder = llm.llm_engine.executor._runner._recorder
        return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs], recorder


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_recorded_steps_give_the_same_tokens(tiny_model, family, quantization):
    recorded, recorder = generate(tiny_model(family), PROMPTS, quantization=quantization)
    assert isinstance(recorder, DecodeTape)
    assert recorder._recordings
    launched, none = generate(tiny_model(family), PROMPTS, quantization=quantization, enforce_eager=True)
    assert none is None
    assert recorded == launched


def test_a_model_that_cannot_be_recorded_runs_all_the_same(tiny_model):
    recorded, recorder = generate(tiny_model("opt"), PROMPTS)
    assert isinstance(recorder, DecodeTape)
    assert not recorder._recordings
    assert recorder.padded_size(1) is None
    assert recorded == generate(tiny_model("opt"), PROMPTS, enforce_eager=True)[0]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_shared_prefix_is_recorded_too(tiny_model, monkeypatch, quantization):
    monkeypatch.setattr("millrace.engine.kv_cache.shared_prefix.MIN_READS_SAVED", 1)
    prompts = [[*PREFIX, 7 + i] for i in range(8)]
    recorded, recorder = generate(tiny_model("qwen3"), prompts, quantization=quantization)
    assert isinstance(recorder, DecodeTape)
    assert (True, False) in recorder._recordings
    assert recorded == generate(tiny_model("qwen3"), prompts, quantization=quantization, enforce_eager=True)[0]


def test_more_sequences_than_were_recorded_for_are_launched():
    tape = DecodeTape(lambda sequences, _: torch.zeros(sequences.shape[1], 4), 1000)
    assert tape.padded_size(256) == 256
    assert tape.padded_size(257) is None
