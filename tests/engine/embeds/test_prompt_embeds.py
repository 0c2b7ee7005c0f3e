"""Prompts as embeddings: those of a prompt's own tokens give what the tokens give, however the steps are cut."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from millrace.engine.embeds.prompts import PromptEmbeds
from millrace.engine.embeds.rows import SpanRows
from millrace.engine.embeds.span import EmbeddedSpan
from millrace.engine.errors import ConfigError, PromptError, PromptTooLongError, PromptTypeError, SamplingParamsError
from millrace.engine.inputs import ParsedPrompt, PromptReader
from millrace.engine.llm import LLM
from millrace.engine.request import GenerateRequest, PoolingRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.step_plan import NewRow, StepPlan

FAMILIES = ["llama", "opt-350m"]  # The embeddings of the second are narrower than its hidden states.
PROMPTS = [[5 + i % 7, 30, 31, 32, *range(40, 40 + 9 * (i % 4))] for i in range(9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS = {"dtype": "float32", "device": "cpu", "enable_prompt_embeds": True, "max_num_seqs": 6, "max_model_len": 64}
FEW_BLOCKS = {"num_gpu_blocks_override": 18, "block_size": 4}

Embed = Callable[[list[int]], torch.Tensor]


@pytest.fixture(params=FAMILIES)
def folder(request, tiny_model) -> Path:
    return tiny_model(request.param)


@pytest.fixture
def embed(folder) -> Embed:
    """Returns a function from tokens to what Hugging Face's model takes in their place."""
    table = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings()
    return lambda token_ids: table(torch.tensor(token_ids)).detach()


def tokens(llm: LLM, prompts: list, params: SamplingParams | list[SamplingParams] = GREEDY) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.llm_engine.check_integrity()
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_embeddings_give_what_their_tokens_give_in_one_batch_with_tokens(folder, embed):
    mixed = [{"prompt_embeds": embed(prompt)} if i % 2 else prompt for i, prompt in enumerate(PROMPTS)]
    with LLM(str(folder), **SETTINGS) as llm:
        expected = tokens(llm, PROMPTS)
        llm.reset_prefix_cache()
        assert tokens(llm, mixed) == expected


@pytest.mark.parametrize("family", ["gemma", "granite"])
def test_models_that_scale_embeddings_take_what_hugging_face_takes(tiny_model, family):
    """The embedding of Gemma has scaled its rows already; Granite scales what it gets."""
    folder = tiny_model(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    vectors = model.get_input_embeddings()(torch.tensor([PROMPTS[3]])).detach()
    expected = model.generate(inputs_embeds=vectors, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with LLM(str(folder), **SETTINGS) as llm:
        short = replace(GREEDY, max_tokens=4)
        assert tokens(llm, [{"prompt_embeds": vectors[0]}, PROMPTS[3]], short) == [expected[0].tolist()] * 2


def test_embeddings_in_chunks_and_after_preemption_give_what_their_tokens_give(folder, embed):
    with LLM(str(folder), **SETTINGS) as llm:
        expected = tokens(llm, PROMPTS)
    for max_num_batched_tokens in (1, 5, 24):
        with LLM(str(folder), **SETTINGS, **FEW_BLOCKS, max_num_batched_tokens=max_num_batched_tokens) as llm:
            assert tokens(llm, [{"prompt_embeds": embed(prompt)} for prompt in PROMPTS]) == expected
            assert llm.stats().counters.num_chunked_prefills > 0
            assert max_num_batched_tokens == 1 or llm.stats().counters.num_preemptions > 0


def test_embeddings_are_found_in_the_prefix_cache_of_their_salt(folder, embed):
    prompt = list(range(10, 50))
    vectors = embed(prompt)
    other = vectors.clone()
    other[20] += 1  # In the second block of 16.
    with LLM(str(folder), **SETTINGS) as llm:
        (expected,) = tokens(llm, [prompt])

        def run(embeddings: torch.Tensor, salt: str) -> tuple[int, list[int]]:
            (output,) = llm.generate([{"prompt_embeds": embeddings, "cache_salt": salt}], GREEDY, use_tqdm=False)
            return output.num_cached_tokens, list(output.outputs[0].token_ids)

        assert run(vectors, "a") == (0, expected), "tokens and embeddings share no block"
        assert run(vectors, "a") == (32, expected)
        assert run(vectors, "b") == (0, expected)
        assert run(other, "a")[0] == 16, "only the blocks before the first difference"
        llm.reset_prefix_cache()
        assert run(other, "c")[1] == run(other, "c")[1] != expected


@torch.inference_mode()
def test_vectors_of_no_token_give_what_hugging_face_gives(folder, embed):
    vectors = (embed(PROMPTS[3]) + embed(PROMPTS[7])) / 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config = config
    expected = model.generate(inputs_embeds=vectors[None], generation_config=config)[0].tolist()
    with LLM(str(folder), **SETTINGS) as llm:
        assert tokens(llm, [{"prompt_embeds": vectors}]) == [expected]
        assert tokens(llm, [{"prompt_embeds": vectors.double()}]) == [expected]


def test_a_vector_of_embeddings_is_that_of_their_tokens(folder, embed):
    with LLM(str(folder), **SETTINGS, task="embed") as llm:
        by_tokens = llm.embed(PROMPTS, use_tqdm=False)
        by_embeddings = llm.embed([{"prompt_embeds": embed(prompt)} for prompt in PROMPTS], use_tqdm=False)
    for one, other in zip(by_tokens, by_embeddings, strict=True):
        torch.testing.assert_close(torch.tensor(one.outputs.embedding), torch.tensor(other.outputs.embedding))


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(str(tiny_model("llama")), **SETTINGS) as one:
        yield one


def test_an_output_shows_a_placeholder_for_each_embedding_and_the_text_it_is_given(llm):
    vectors = torch.randn(5, 64, generator=torch.manual_seed(0))
    prompts = [{"prompt_embeds": vectors}, {"prompt_embeds": vectors.bfloat16(), "prompt": "a picture"}]
    bare, named = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert (bare.prompt, bare.prompt_token_ids) == (None, [0] * 5)
    assert named.prompt == "a picture"
    assert bare.outputs[0].text == llm.get_tokenizer().decode(bare.outputs[0].token_ids, skip_special_tokens=True)


def test_what_looks_at_generated_tokens_works(llm):
    prompt = {"prompt_embeds": torch.randn(5, 64, generator=torch.manual_seed(1))}

    def run(**params) -> list:
        asked = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params})
        return llm.generate([prompt], asked, use_tqdm=False)[0].outputs

    (whole,) = run(logprobs=1)
    assert len(whole.logprobs) == 12
    stop = whole.text[6:9]
    (cut,) = run(stop=stop)
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert len({tuple(one.token_ids) for one in run(n=3, temperature=1.0, seed=1)}) == 3
    (penalised,) = run(presence_penalty=2, frequency_penalty=2, max_tokens=40)
    assert len(set(penalised.token_ids)) > len(set(run(max_tokens=40)[0].token_ids))
    assert run(structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False)[0].text in ("yes", "no")


VECTORS = torch.ones(3, 64)
WRONG = [
    ({"prompt_embeds": [[1.0] * 64]}, PromptTypeError, "must be a torch.Tensor; got list"),
    ({"prompt_embeds": torch.ones(3, 64).to_sparse()}, PromptTypeError, "must be an ordinary dense tensor"),
    ({"prompt_embeds": torch.ones(3, 64, device="meta")}, PromptTypeError, "must be an ordinary dense tensor"),
    ({"prompt_embeds": torch.ones(64)}, PromptTypeError, r"the shape \[num_tokens, 64\]"),
    ({"prompt_embeds": torch.ones(3, 65)}, PromptTypeError, r"got \[3, 65\]"),
    ({"prompt_embeds": torch.ones(3, 64, dtype=torch.int64)}, PromptTypeError, "must hold floating-point numbers"),
    ({"prompt_embeds": VECTORS * torch.nan}, PromptError, "hold NaN or infinity"),
    ({"prompt_embeds": VECTORS.double() * 1e300}, PromptError, "too large for the model's dtype float32"),
    ({"prompt_embeds": torch.ones(0, 64)}, PromptError, "cannot be empty"),
    ({"prompt_embeds": torch.ones(64, 64)}, PromptError, "longer than the maximum model length of 64"),
    ({"prompt_embeds": VECTORS, "prompt_token_ids": [1, 2, 3]}, PromptTypeError, "give one of the two"),
]


@pytest.mark.parametrize(("prompt", "kind", "message"), WRONG)
def test_what_cannot_be_a_prompt_is_refused(llm, prompt, kind, message):
    with pytest.raises(kind, match=message):
        llm.generate([prompt], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 1}, {"repetition_penalty": 1.1}])
def test_what_needs_the_tokens_of_the_prompt_is_refused(llm, asked):
    with pytest.raises(SamplingParamsError, match=r"need the tokens of the prompt"):
        llm.generate([{"prompt_embeds": VECTORS}], SamplingParams(**asked), use_tqdm=False)


def test_the_length_is_checked_before_the_tensor_is_copied():
    """The tensor has a stride of 0: its memory is one row, and a copy of it would take 512 TB."""
    reader = PromptReader(None, 100, 64, PromptEmbeds(64, torch.float32))
    endless = torch.zeros(1, 64).expand(2**41, 64)
    with pytest.raises(PromptTooLongError, match=f"The prompt has {2**41} tokens"):
        reader.read(ParsedPrompt(embeddings=endless), num_new_tokens=1)


def test_an_engine_takes_no_embeddings_unless_it_is_told_to(tiny_model):
    with (
        LLM(str(tiny_model("llama")), dtype="float32") as plain,
        pytest.raises(ConfigError, match="enable_prompt_embeds=True"),
    ):
        plain.generate([{"prompt_embeds": VECTORS}], GREEDY, use_tqdm=False)


def test_a_request_with_embeddings_pickles(llm):
    for request in (
        GenerateRequest("a", None, None, GREEDY, prompt_embeds=VECTORS, cache_salt="s"),
        PoolingRequest("a", None, None, GREEDY, prompt_embeds=VECTORS, cache_salt="s"),
    ):
        copy = pickle.loads(pickle.dumps(request))
        assert copy == request and torch.equal(copy.prompt_embeds, VECTORS)


def test_a_caller_may_change_the_tensor_afterwards():
    vectors = torch.ones(2, 4)[:, ::2]
    span = PromptEmbeds(2, torch.float32).read(vectors)
    vectors.zero_()
    assert span.embeddings.is_contiguous() and (span.embeddings == 1).all()


def test_the_embeddings_of_a_step_are_those_of_its_positions():
    """Three rows: a chunk that ends in a span, one that begins in it, and one that has none."""
    numbers = torch.arange(6.0)[:, None]
    rows = SpanRows(torch.device("cpu"))
    first, second, third = (
        SimpleNamespace(spans=spans) for spans in ([EmbeddedSpan(2, numbers)], [EmbeddedSpan(1, numbers + 10)], [])
    )
    entering = [NewRow(row, owner, 9) for row, owner in ((4, first), (1, second), (0, third))]
    plan = StepPlan(rows=[4, 1, 0], starts=[0, 5, 0], counts=[5, 3, 2], new_rows=entering)
    rows.enter(entering)
    given = rows.find(plan)
    assert given.indices.tolist() == [2, 3, 4, 5, 6] and given.values.flatten().tolist() == [0, 1, 2, 14, 15]
    replaced = given.replace_in(torch.full((10, 1), -1.0))
    assert replaced.flatten().tolist() == [-1, -1, 0, 1, 2, 14, 15, -1, -1, -1]
    assert rows.find(StepPlan(rows=[1], starts=[8], counts=[1])) is None, "its span is done"
    assert rows.find(StepPlan(rows=[4], starts=[5], counts=[9])).values.flatten().tolist() == [3, 4, 5]
    rows.enter(entering)
    rows.enter([NewRow(4, third, 9)])
    assert rows.find(StepPlan(rows=[4], starts=[0], counts=[9])) is None, "another sequence owns the row"
