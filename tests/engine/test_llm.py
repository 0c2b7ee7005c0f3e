"""`LLM` as a script uses it: every sampling parameter does what its name says, and errors stay with their prompt."""

from __future__ import annotations

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from tqdm import tqdm

from millrace.engine.errors import (
    ConfigError,
    EmptyPromptError,
    EngineDeadError,
    PromptTooLongError,
    PromptTypeError,
    SamplingParamsError,
    TokenOutOfVocabularyError,
)
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams

PROMPT = "Hello, my name is"


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=16) as llm:
        yield llm


@pytest.fixture(autouse=True)
def leaves_nothing(llm):
    yield
    assert not llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.check_integrity()


def one(llm, prompt=PROMPT, **params):
    (output,) = llm.generate([prompt], SamplingParams(**{"temperature": 0, **params}), use_tqdm=False)
    return output.outputs[0]


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [f"prompt {i}" for i in range(20)]
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 7, ignore_eos=True) for i in range(20)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + i % 7 for i in range(20)]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_prompts_take_every_form(llm):
    ids = llm.get_tokenizer()(PROMPT)["input_ids"]
    forms = [PROMPT, ids, {"prompt": PROMPT}, {"prompt_token_ids": ids}, {"prompt_token_ids": ids, "prompt": "x"}]
    outputs = llm.generate(forms, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [PROMPT, None, PROMPT, None, "x"]
    assert llm.generate(PROMPT, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids == ids
    assert llm.generate(ids, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids == ids
    assert llm.generate([], SamplingParams(), use_tqdm=False) == []


def test_n_gives_different_sequences_and_seeds_repeat_them(llm):
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate(PROMPT, params, use_tqdm=False)[0] for _ in range(2))
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    sequences = [tuple(completion.token_ids) for completion in first.outputs]
    assert len(set(sequences)) == 4
    assert sequences == [tuple(completion.token_ids) for completion in second.outputs]
    alone = llm.generate(PROMPT, params.clone(n=1, seed=5), use_tqdm=False)[0]
    assert tuple(alone.outputs[0].token_ids) == sequences[2]


def test_unseeded_draws_differ_between_prompts_and_follow_the_engine_seed(tiny_model):
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        with LLM(str(tiny_model("llama")), dtype="float32", seed=seed) as fresh:
            outputs = fresh.generate([PROMPT, PROMPT], params, use_tqdm=False)
            runs.append([tuple(output.outputs[0].token_ids) for output in outputs])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_sampled_output_is_the_same_alone_in_a_batch_and_after_preemption(tiny_model):
    prompts = [f"row {i} of a table with {i * 7} entries" for i in range(64)]
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=100 + i, max_tokens=24, ignore_eos=True) for i in range(64)
    ]
    model = str(tiny_model("qwen3"))
    small = {"block_size": 4, "num_gpu_blocks_override": 80, "max_model_len": 120}
    with LLM(model, dtype="float32", max_num_seqs=64, max_num_batched_tokens=64, **small) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats().counters.num_preemptions > 0
    preempted = [i for i, output in enumerate(outputs) if output.metrics.num_preemptions]
    with LLM(model, dtype="float32", max_num_seqs=1) as llm:
        for i in {0, 1, 31, 63, *preempted[:4]}:
            (alone,) = llm.generate([prompts[i]], params[i], use_tqdm=False)
            assert alone.outputs[0].token_ids == outputs[i].outputs[0].token_ids


def test_stop_string_cuts_the_text(llm):
    whole = one(llm, max_tokens=24, ignore_eos=True)
    stop = whole.text[6:9]
    cut = one(llm, max_tokens=24, ignore_eos=True, stop=stop)
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 24
    kept = one(llm, max_tokens=24, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    assert kept.text == whole.text[: whole.text.index(stop) + len(stop)]
    later = one(llm, max_tokens=24, ignore_eos=True, stop=stop, min_tokens=len(cut.token_ids) + 2)
    assert len(later.token_ids) > len(cut.token_ids)


def test_stop_token_ids_end_a_sequence_and_leave_no_text(llm):
    whole = one(llm, max_tokens=12, ignore_eos=True)
    stop = whole.token_ids[5]
    first = whole.token_ids.index(stop)
    cut = one(llm, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == (whole.token_ids[: first + 1], "stop", stop)
    kept = one(llm, max_tokens=12, ignore_eos=True, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert kept.text.startswith(cut.text) and len(kept.text) >= len(cut.text)
    waits = one(llm, max_tokens=12, ignore_eos=True, stop_token_ids=[stop], min_tokens=first + 2)
    assert waits.token_ids[: first + 1] != whole.token_ids[: first + 1], "the stop token is masked before min_tokens"
    assert stop not in waits.token_ids[: first + 2]


def test_eos_ends_a_sequence_unless_ignored(llm):
    eos = llm.get_tokenizer().eos_token_id
    bias = {eos: 100.0}
    ended = one(llm, logit_bias=bias, max_tokens=8)
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason, ended.text) == ([eos], "stop", None, "")
    ignored = one(llm, logit_bias=bias, max_tokens=8, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 8, "length")
    masked = one(llm, logit_bias=bias, max_tokens=8, min_tokens=3)
    assert len(masked.token_ids) == 4 and eos not in masked.token_ids[:3]


def test_special_tokens_are_shown_when_asked(llm):
    eos = llm.get_tokenizer().eos_token_id
    params = {"logit_bias": {eos: 100.0}, "max_tokens": 3, "ignore_eos": True}
    assert one(llm, **params).text == ""
    assert one(llm, **params, skip_special_tokens=False).text == llm.get_tokenizer().decode([eos]) * 3


def test_allowed_token_ids_bad_words_and_bias(llm):
    assert set(one(llm, allowed_token_ids=[30, 40], max_tokens=10).token_ids) <= {30, 40}
    z, q = (llm.get_tokenizer()(letter, add_special_tokens=False)["input_ids"][0] for letter in "zq")
    choice = {"allowed_token_ids": [z, q], "logit_bias": {z: 50.0}, "max_tokens": 10, "ignore_eos": True}
    assert set(one(llm, **choice).token_ids) == {z}
    assert set(one(llm, **choice, bad_words=["z"]).token_ids) == {q}
    free = one(llm, max_tokens=10, ignore_eos=True)
    pushed = one(llm, logit_bias={free.token_ids[0]: -100}, max_tokens=10, ignore_eos=True)
    assert free.token_ids[0] not in pushed.token_ids


def test_bad_words_of_several_tokens_only_break_the_word(llm):
    tokenizer = llm.get_tokenizer()
    word = "zq"
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    both = {"allowed_token_ids": ids, "max_tokens": 12, "ignore_eos": True, "logit_bias": {ids[1]: 50.0}}
    first = one(llm, **both, bad_words=[word]).token_ids
    assert all(pair != tuple(ids) for pair in itertools.pairwise(first))


def test_penalties_change_repetition(llm):
    ids = {"allowed_token_ids": [50, 51, 52, 53], "max_tokens": 8, "ignore_eos": True}
    assert len(set(one(llm, **ids, presence_penalty=2.0, frequency_penalty=2.0).token_ids)) >= 3
    prompt = [50, 51]
    assert one(llm, prompt, **ids, repetition_penalty=1e6).token_ids[:2] not in ([50, 51], [51, 50])


def test_logprobs_report_the_raw_distribution(llm):
    plain = one(llm, max_tokens=4, logprobs=5, ignore_eos=True)
    assert plain.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(plain.logprobs, plain.token_ids, strict=True))
    )
    first = plain.logprobs[0]
    assert len(first) == 5 and [item.rank for item in first.values()] == [1, 2, 3, 4, 5]
    assert all(item.decoded_token is not None for item in first.values())
    forced = one(llm, max_tokens=1, logprobs=2, allowed_token_ids=[list(first)[3]])
    assert next(iter(forced.logprobs[0])) == list(first)[3] and len(forced.logprobs[0]) == 3
    assert forced.logprobs[0][list(first)[3]].rank == 4
    assert forced.logprobs[0][list(first)[3]].logprob == pytest.approx(first[list(first)[3]].logprob, abs=1e-5)
    only = one(llm, max_tokens=1, logprobs=0)
    assert list(only.logprobs[0]) == only.token_ids


def test_all_logprobs_can_be_allowed(tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32", max_logprobs=-1) as llm:
        everything = one(llm, max_tokens=1, logprobs=-1).logprobs[0]
    assert len(everything) == llm.llm_engine.inputs.vocab_size
    assert math.fsum(math.exp(item.logprob) for item in everything.values()) == pytest.approx(1, abs=1e-4)


def test_detokenize_off_gives_tokens_only(llm):
    output = one(llm, detokenize=False, max_tokens=4, logprobs=1)
    assert output.text == "" and output.token_ids
    assert all(item.decoded_token is None for entry in output.logprobs for item in entry.values())


def test_text_is_what_the_tokenizer_says(llm):
    output = one(llm, max_tokens=20, ignore_eos=True)
    ids = llm.get_tokenizer()(PROMPT)["input_ids"]
    whole = llm.get_tokenizer().decode(ids + output.token_ids, skip_special_tokens=True)
    assert whole == llm.get_tokenizer().decode(ids, skip_special_tokens=True) + output.text


def test_a_repeated_prompt_is_found_in_the_prefix_cache(llm):
    prompt = list(range(30, 30 + 40))
    first, second = (llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert llm.reset_prefix_cache()
    assert llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)[0].num_cached_tokens == 0


def test_chat_is_the_rendered_template(llm):
    conversation = [{"role": "user", "content": "What is up?"}]
    text = llm.get_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
    params = SamplingParams(temperature=0, max_tokens=5)
    (single,) = llm.chat(conversation, params, use_tqdm=False)
    many = llm.chat([conversation, conversation], params, use_tqdm=False)
    assert single.prompt == text and single.prompt_token_ids == ids
    assert [output.outputs[0].token_ids for output in many] == [single.outputs[0].token_ids] * 2


BAD_PROMPTS = [
    ("", EmptyPromptError, "cannot be empty"),
    ([], EmptyPromptError, "cannot be empty"),
    ([5, 10_000_000], TokenOutOfVocabularyError, "out of vocabulary"),
    ([5, -1], TokenOutOfVocabularyError, "out of vocabulary"),
    (list(range(100)) * 60, PromptTooLongError, "longer than the maximum model length"),
    ("a b c " * 5000, PromptTooLongError, "Please reduce the length"),
    (3.5, PromptTypeError, "Prompt should be a string"),
    (None, PromptTypeError, "Prompt should be a string"),
    (["text", 4], PromptTypeError, "list of integers"),
    ({"prompt": 4}, PromptTypeError, "Prompt text should be a string"),
    ({"promt": "x"}, PromptTypeError, "did you mean 'prompt'"),
    ("half a pair \ud800", PromptTypeError, "valid Unicode"),
]


@pytest.mark.parametrize(("prompt", "kind", "message"), BAD_PROMPTS, ids=[str(i) for i in range(len(BAD_PROMPTS))])
def test_a_bad_prompt_raises_and_leaves_the_llm_usable(llm, prompt, kind, message):
    with pytest.raises(kind, match=message):
        llm.generate([PROMPT, prompt], SamplingParams(max_tokens=2), use_tqdm=False)
    assert one(llm, max_tokens=2).finish_reason


def test_bad_prompts_fail_alone_when_errors_are_returned(llm):
    prompts = [PROMPT, *(prompt for prompt, _, _ in BAD_PROMPTS), PROMPT]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False, on_error="return")
    assert [output.error is None for output in outputs] == [True] + [False] * len(BAD_PROMPTS) + [True]
    for output, (_, kind, message) in zip(outputs[1:-1], BAD_PROMPTS, strict=True):
        assert output.error.kind == kind.__name__ and message in output.error.message
        assert output.outputs[0].finish_reason == "error" and not output.error.retryable
    assert outputs[0].outputs[0].token_ids == outputs[-1].outputs[0].token_ids


def test_a_wrong_priority_fails_alone_and_leaves_the_llm_usable(llm):
    outputs = llm.generate(
        ["a", "b"], SamplingParams(max_tokens=2), use_tqdm=False, priority=["x", 0], on_error="return"
    )
    assert [output.error is None for output in outputs] == [False, True]
    assert "priority must be an integer" in outputs[0].error.message
    assert one(llm, max_tokens=2).finish_reason


def test_parameters_that_forbid_every_token_say_so(llm):
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=2, allowed_token_ids=[7], stop_token_ids=[7])
    good = SamplingParams(temperature=0, max_tokens=4)
    bad, fine = llm.generate(["a", "b"], [params, good], use_tqdm=False, on_error="return")
    assert bad.error.kind == "SamplingParamsError" and "forbid every token" in bad.error.message
    assert not bad.error.retryable and fine.error is None


def test_arguments_of_vllm_without_use_are_taken_at_their_neutral_value(llm):
    conversation = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "up?"}]}]
    params = SamplingParams(temperature=0, max_tokens=2)
    (output,) = llm.chat(conversation, params, use_tqdm=False, lora_request=None, chat_template_content_format="auto")
    assert "What is\nup?" in output.prompt
    llm.generate(PROMPT, params, use_tqdm=False, lora_request=None, tokenization_kwargs=None)
    with pytest.raises(ConfigError, match="lora_request='x' is not supported"):
        llm.generate(PROMPT, params, lora_request="x")
    with pytest.raises(ConfigError, match="did you mean 'lora_request'"):
        llm.generate(PROMPT, params, lora_reqest=None)
    (closed,) = llm.chat(conversation, params, use_tqdm=False, chat_template_kwargs={"add_generation_prompt": False})
    assert len(closed.prompt) < len(output.prompt)


def test_arrays_are_prompts_and_bytes_are_not(llm):
    params = SamplingParams(temperature=0, max_tokens=2)
    ids = np.array([5, 6, 7])
    outputs = [llm.generate(form, params, use_tqdm=False)[0] for form in (ids, list(ids), [ids], torch.tensor(ids))]
    assert [output.prompt_token_ids for output in outputs] == [[5, 6, 7]] * 4
    with pytest.raises(PromptTypeError, match="bytes"):
        llm.generate(b"abc", params, use_tqdm=False)


def test_params_must_match_prompts(llm):
    with pytest.raises(ConfigError, match=r"prompts \(2\) and params \(1\) must be the same"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)
    with pytest.raises(SamplingParamsError, match="out of vocabulary"):
        one(llm, allowed_token_ids=[10_000_000])
    with pytest.raises(SamplingParamsError, match="max_logprobs"):
        one(llm, logprobs=21)


def test_max_tokens_none_runs_to_the_length_limit(tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32", max_model_len=40) as llm:
        (output,) = llm.generate([[5] * 30], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (10, "length")


def test_closing_frees_model_and_cache(tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32") as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=2), use_tqdm=False)
        runner = llm.llm_engine.executor._runner
        held = [weakref.ref(thing) for thing in (runner.model, runner.kv_cache[0][0], runner)]
        del runner
    assert [reference() for reference in held] == [None, None, None]
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate(PROMPT, use_tqdm=False)


class Poison:
    """Wraps an executor: a step with a marked token raises, or gives NaN logits."""

    def __init__(self, executor, token: int) -> None:
        self.executor, self.token = executor, token

    def execute(self, plan):
        if any(self.token in request.token_ids for request in plan.requests):
            raise RuntimeError("the kernel gave up")
        return self.executor.execute(plan)

    def close(self):
        self.executor.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_that_kills_the_model_fails_alone(tiny_model, depth):
    prompts = [[10 + i] * 9 for i in range(12)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, allowed_token_ids=[100, 101, 102])
    with LLM(str(tiny_model("llama")), dtype="float32", overlap_depth=depth) as llm:
        good = llm.generate(prompts, params, use_tqdm=False)
        llm.llm_engine.executor = Poison(llm.llm_engine.executor, 15)
        outputs = llm.generate(prompts, params, use_tqdm=False, on_error="return")
        llm.llm_engine.check_integrity()
    assert [i for i, output in enumerate(outputs) if output.error] == [5]
    assert outputs[5].error.kind == "ModelExecutionError" and "the kernel gave up" in outputs[5].error.message
    for i in set(range(12)) - {5}:
        assert outputs[i].outputs[0].token_ids == good[i].outputs[0].token_ids


@pytest.mark.parametrize("depth", [0, 1])
def test_nan_logits_fail_their_request_only(tiny_model, depth):
    with LLM(str(tiny_model("llama")), dtype="float32", overlap_depth=depth, enable_prefix_caching=False) as llm:
        llm.llm_engine.executor._runner.model.embed_tokens.weight.data[77] = float("nan")
        prompts = [[20, 21, 22], [20, 77, 22], [23, 24]]
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logit_bias={77: -100})
        outputs = llm.generate(prompts, params, use_tqdm=False, on_error="return")
        llm.llm_engine.check_integrity()
    kinds = [output.error and output.error.kind for output in outputs]
    assert kinds[1] == "NumericalError"


def test_an_interrupted_call_leaves_nothing_behind(llm):
    make_bar = InterruptingBar.after(3)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 8, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=make_bar)
    assert not llm.llm_engine.has_unfinished_requests()
    assert one(llm, max_tokens=2).finish_reason


@pytest.mark.parametrize("depth", [0, 1])
def test_an_interrupt_inside_a_step_does_not_spoil_the_prefix_cache(tiny_model, depth):
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompt = [7, 9, 11, 13] * 12
    with LLM(str(tiny_model("llama")), dtype="float32", overlap_depth=depth) as llm:
        model = llm.llm_engine.executor._runner.model
        forward = model.forward

        def interrupted(*args, **kwargs):
            model.forward = forward
            raise KeyboardInterrupt

        model.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.generate([prompt], params, use_tqdm=False)
        llm.llm_engine.check_integrity()
        (after,) = llm.generate([prompt], params, use_tqdm=False)
        llm.reset_prefix_cache()
        (truth,) = llm.generate([prompt], params, use_tqdm=False)
    assert after.num_cached_tokens == 0
    assert after.outputs[0].token_ids == truth.outputs[0].token_ids


class InterruptingBar(tqdm):
    """A progress bar during whose update the user presses Ctrl-C."""

    @classmethod
    def after(cls, num_updates: int):
        def make(**kwargs):
            bar = cls(**kwargs)
            bar.num_left = num_updates
            return bar

        return make

    def update(self, n=1):
        self.num_left -= 1
        if not self.num_left:
            raise KeyboardInterrupt
        return super().update(n)
