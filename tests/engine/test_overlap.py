"""Planning ahead on an asynchronous device: the same outputs, one wasted token at most, and no wait in between."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from adapters import make_adapter
from fake_device import AsyncExecutor, Breach, CallAgain, Watch, watch  # noqa: F401
from millrace.engine.llm import LLM
from millrace.engine.lora.request import LoRARequest
from millrace.engine.outputs import RequestOutput
from millrace.engine.pooling.params import PoolingParams
from millrace.engine.request import GenerateRequest, PoolingRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.step.cuda_graph import DecodeGraphs, graph_sizes
from millrace.engine.step.tables import Tables
from millrace.engine.structured import token_masks

VOCAB = 256


def mixed_requests() -> list[GenerateRequest]:
    """Every way to sample, prompts from one token to more than a step takes, half of them with a common prefix."""
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB) for _ in range(30)]
    variants: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0, "prompt_logprobs": 2},
        {"temperature": 1.0, "logit_bias": {5: 4.0, 7: -3.0}, "min_tokens": 4},
        {"temperature": 1.0, "allowed_token_ids": list(range(10, 60)), "stop_token_ids": list(range(10, 16))},
        {"temperature": 1.0, "stop": ["e", "a"], "seed": 3},
        {"temperature": 1.0, "bad_words": ["the", "e"], "n": 2},
    ]
    requests = []
    for i in range(40):
        own = [rng.randrange(3, VOCAB) for _ in range((1, 5, 20, 60)[i % 4])]
        params = SamplingParams(max_tokens=4 + i % 13, **variants[i % len(variants)])
        requests.append(GenerateRequest(str(i), None, shared + own if i % 8 >= 4 else own, params))
    return requests


def make_llm(folder: Any, depth: int, **more: Any) -> LLM:
    return LLM(
        str(folder),
        dtype="float32",
        block_size=4,
        num_gpu_blocks_override=80,
        max_model_len=120,
        max_num_seqs=12,
        max_num_batched_tokens=48,
        overlap_depth=depth,
        device="cpu",
        **more,
    )


def run(llm: LLM, requests: list[GenerateRequest], on: Watch | None = None) -> dict[str, RequestOutput]:
    """Runs requests to their end; watched, if a watch is given."""
    engine = llm.llm_engine
    if on is not None:
        engine.executor = AsyncExecutor(engine, on)
    for request in requests:
        engine.add_request(request)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        if on is None:
            finished = engine.step()
        else:
            with on.set_to(True):
                finished = engine.step()
        outputs |= {output.request_id: output for output in finished}
        engine.check_integrity()
    return outputs


@pytest.mark.parametrize("records", [False, True], ids=["launched", "recorded"])
def test_outputs_are_those_of_taking_turns_and_nothing_waits(records, tiny_model, watch):  # noqa: F811
    with make_llm(tiny_model("llama"), 0) as llm:
        expected = run(llm, mixed_requests())
    with make_llm(tiny_model("llama"), 1) as llm:
        runner, backend = llm.llm_engine.executor._runner, CallAgain()
        if records:
            runner._recorder = DecodeGraphs(runner._decode, graph_sizes(12), backend, draw=runner._head.draw)
        outputs = run(llm, mixed_requests(), watch)
        assert (backend.num_recorded > 0) == records
        counters = llm.stats().counters
        assert llm.llm_engine.executor.num_started == counters.num_steps > 10
    assert counters.num_preemptions > 0 and counters.num_cached_tokens > 0 and counters.num_chunked_prefills > 0
    completions = [completion for output in outputs.values() for completion in output.outputs]
    assert 0 < counters.num_wasted_tokens <= len(completions)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        for ours, theirs in zip(output.outputs, expected[name].outputs, strict=True):
            assert (ours.token_ids, ours.text, ours.finish_reason) == (
                theirs.token_ids, theirs.text, theirs.finish_reason,
            )  # fmt: skip
            assert_close(ours.logprobs, theirs.logprobs)
        assert_close(output.prompt_logprobs, expected[name].prompt_logprobs)


def test_adapters_make_nobody_wait(tiny_model, watch, tmp_path):  # noqa: F811
    folder, requests = tiny_model("llama"), mixed_requests()
    for index, request in enumerate(requests):
        if number := index % 6:
            path = make_adapter(tmp_path / str(number), folder, rank=number, seed=number)
            request.lora_request = LoRARequest(f"tune-{number}", number, str(path))
    with make_llm(folder, 0, enable_lora=True, max_loras=5) as llm:
        expected = run(llm, requests)
    with make_llm(folder, 1, enable_lora=True, max_loras=2) as llm:
        outputs = run(llm, requests, watch)
        assert llm.stats().num_adapter_loads >= 5 and llm.stats().num_adapter_uploads >= 5
    assert not any(output.error for output in outputs.values())
    for name, output in outputs.items():
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in expected[name].outputs]


def test_masks_of_grammars_make_nobody_wait(tiny_model, watch, monkeypatch):  # noqa: F811
    def on_device(bits: np.ndarray, device: torch.device) -> torch.Tensor:
        return token_masks._spread(token_masks.to_device(bits, torch.uint8, device))

    monkeypatch.setattr(token_masks, "_forbidden", on_device)
    held = SamplingParams(max_tokens=6, structured_outputs={"regex": "[a-z ]{40}"}, logprobs=1)
    requests = [*mixed_requests(), GenerateRequest("held", None, [3, 4, 5], held, priority=-1)]
    with make_llm(tiny_model("llama"), 1) as llm:
        (one,) = run(llm, requests, watch)["held"].outputs
    assert re.fullmatch("[a-z ]+", one.text)


@pytest.mark.parametrize("pooling_type", ["LAST", "MEAN"])
def test_vectors_make_nobody_wait(pooling_type, tiny_model, watch):  # noqa: F811
    kwargs = {"runner": "pooling", "pooler_config": {"pooling_type": pooling_type}, "dtype": "float32"}
    requests = [PoolingRequest(str(i), None, [5 + i % 3] * (1 + 7 * i), PoolingParams()) for i in range(12)]
    found = []
    for depth, on in ((0, None), (1, watch)):
        with LLM(
            str(tiny_model("llama")), overlap_depth=depth, max_num_batched_tokens=24, max_num_seqs=4, **kwargs
        ) as llm:
            outputs = run(llm, requests, on)
            found.append(np.stack([outputs[str(i)].outputs.data for i in range(12)]))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def assert_close(ours: list | None, theirs: list | None) -> None:
    assert (ours is None) == (theirs is None)
    for one, other in zip(ours or (), theirs or (), strict=True):
        assert (one is None) == (other is None)
        for token_id, entry in (one or {}).items():
            assert entry.logprob == pytest.approx(other[token_id].logprob, abs=1e-4)


def test_only_one_step_is_ahead(tiny_model):
    with make_llm(tiny_model("llama"), 1) as llm:
        engine = llm.llm_engine
        for request in mixed_requests():
            engine.add_request(request)
        while engine.has_unfinished_requests():
            engine.step()
            assert len(engine._in_flight) <= 1


def test_the_watch_sees_a_read_between_two_steps(tiny_model, watch, monkeypatch):  # noqa: F811
    append = Tables.append
    monkeypatch.setattr(Tables, "append", lambda *args: append(*args) or args[-1].tolist())
    with make_llm(tiny_model("llama"), 1) as llm:
        with pytest.raises(Breach, match="tolist"):
            run(llm, mixed_requests(), watch)
        llm.llm_engine.reset()


def test_the_watch_sees_that_turns_are_taken(tiny_model, watch):  # noqa: F811
    with make_llm(tiny_model("llama"), 0) as llm:
        with pytest.raises(Breach, match="before the next one was started"):
            run(llm, mixed_requests(), watch)
        llm.llm_engine.reset()


@pytest.mark.parametrize(
    "breach",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: bool((x > 0).all()),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x),
        lambda x: x.index_put_((x > 0,), x.sum()),
        lambda x: torch.tensor([1, 2]),
        lambda x: list(map(int, x)),
    ],
)
def test_the_watch_sees_a_wait(breach, watch):  # noqa: F811
    x = torch.arange(3)
    breach(x)
    with watch.set_to(True), torch.inference_mode(), pytest.raises(Breach):
        breach(x)
