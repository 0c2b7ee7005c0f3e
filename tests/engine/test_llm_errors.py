"""What goes wrong stays with its prompt: bad input, steps that fail, interrupts."""

from __future__ import annotations

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
    UserError,
)
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams
from running import PROMPT, one

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
    (np.array(5), PromptTypeError, "Prompt should be a string"),
    (np.zeros((2, 2)), PromptTypeError, "Prompt should be a string"),
    ({"prompt_token_ids": np.array(5)}, PromptTypeError, "list of integers"),
    ([2**70], TokenOutOfVocabularyError, "out of vocabulary"),
    ([10**5000], TokenOutOfVocabularyError, "out of vocabulary"),
    ({10**5000: "x"}, PromptTypeError, "a prompt has no field"),
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


def test_a_wrong_element_of_the_parameters_is_the_error_of_its_prompt(llm):
    good = SamplingParams(temperature=0, max_tokens=2)
    outputs = llm.generate(["a"] * 4, [good, 3, None, good], use_tqdm=False, on_error="return")
    assert [output.error and output.error.kind for output in outputs] == [None, *["SamplingParamsError"] * 2, None]
    assert outputs[0].outputs[0].token_ids == outputs[3].outputs[0].token_ids
    with pytest.raises(SamplingParamsError, match="must be SamplingParams; got int 3"):
        llm.generate(["a"] * 2, [good, 3], use_tqdm=False)


WRONG_ARGUMENTS = [
    ({"on_error": np.zeros(2)}, "on_error must be"),
    ({"on_error": 10**5000}, "on_error must be"),
    ({"use_tqdm": np.zeros(2)}, "use_tqdm must be"),
    ({"priority": np.zeros(2)}, "priority must be an integer"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS, ids=[str(i) for i in range(len(WRONG_ARGUMENTS))])
def test_an_argument_of_another_type_is_named(llm, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        llm.generate(["a", "b"], SamplingParams(max_tokens=2), **{"use_tqdm": False, **arguments})
    assert len(str(caught.value)) < 500
    assert one(llm, max_tokens=2).finish_reason


WRONG_CHATS = [
    ({"chat_template": np.zeros(2)}, "chat_template must be"),
    ({"chat_template_content_format": np.zeros(2)}, "chat_template_content_format must be"),
    ({"chat_template_kwargs": {"messages": []}}, "can be named"),
    ({"chat_template_kwargs": {"self": 1}}, "can be named"),
    ({"chat_template_kwargs": {3: 1}}, "must map names to values"),
    ({"messages": b"hello"}, "messages must be a list"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CHATS, ids=[str(i) for i in range(len(WRONG_CHATS))])
def test_an_argument_of_chat_of_another_type_is_a_short_error(llm, arguments, message):
    asked = {"messages": [{"role": "user", "content": "hello"}], "use_tqdm": False, **arguments}
    with pytest.raises(UserError, match=message) as caught:
        llm.chat(sampling_params=SamplingParams(max_tokens=2), **asked)
    assert len(str(caught.value)) < 500


def test_arrays_are_lists_of_priorities_and_salts(llm):
    params = SamplingParams(temperature=0, max_tokens=2)
    for priority in (np.array([1, 0]), torch.tensor([1, 0]), np.array(1)):
        outputs = llm.generate(["a", "b"], params, use_tqdm=False, priority=priority)
        assert [output.error for output in outputs] == [None, None]
    with pytest.raises(ConfigError, match=r"prompts \(2\) and priorities \(3\)"):
        llm.generate(["a", "b"], params, use_tqdm=False, priority=np.array([1, 2, 3]))


NO_VALUES = {"an array": np.array([1, 2]), "a tensor": torch.zeros(2, device="meta"), "an object": object()}


@pytest.mark.parametrize("wrong", NO_VALUES.values(), ids=NO_VALUES)
@pytest.mark.parametrize(
    "name", ["on_error", "use_tqdm", "sampling_params", "chat_template_content_format", "tools", "chat_template_kwargs"]
)
def test_an_argument_of_a_wrong_type_is_named(llm, name, wrong):
    given = {"use_tqdm": False, name: wrong}
    with pytest.raises(UserError, match="(?i)" + name.removeprefix("sampling_")) as error:
        llm.chat([{"role": "user", "content": "hi"}], **given)
    assert len(str(error.value)) < 600


def test_a_variable_that_a_template_cannot_have_fails_its_conversation(llm):
    chat = [{"role": "user", "content": "hi"}]
    kwargs = {"messages": []}
    (output,) = llm.chat(chat, use_tqdm=False, chat_template_kwargs=kwargs, on_error="return")
    assert output.error.kind == "ChatTemplateError" and "can be named" in output.error.message


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
    with pytest.raises(ConfigError, match=r"tokenization_kwargs=.* is not supported"):
        llm.generate(PROMPT, params, tokenization_kwargs={"a": 1})
    with pytest.raises(ConfigError, match="did you mean 'tokenization_kwargs'"):
        llm.generate(PROMPT, params, tokenisation_kwargs=None)
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
        if any(self.token in request.token_ids for request in plan.sequences):
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


class BrokenDevice(Poison):
    """Wraps an executor: from some step on, every step raises, as after an illegal access of memory on a GPU."""

    def __init__(self, executor, num_steps: int) -> None:
        super().__init__(executor, token=-1)
        self.num_left = num_steps

    def execute(self, plan):
        self.num_left -= 1
        if self.num_left < 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.executor.execute(plan)


@pytest.mark.parametrize("num_prompts", [1, 12])
@pytest.mark.parametrize("settings", [{"overlap_depth": 0}, {"overlap_depth": 1}, {"runner": "pooling"}], ids=str)
def test_a_device_that_runs_no_step_any_more_ends_the_engine_and_fails_no_request(tiny_model, settings, num_prompts):
    with LLM(str(tiny_model("llama")), dtype="float32", **settings) as llm:
        engine = llm.llm_engine
        engine.executor = BrokenDevice(engine.executor, num_steps=0 if "runner" in settings else 2)
        prompts = [{"prompt_token_ids": [10 + i] * 9} for i in range(num_prompts)]
        work = llm.embed if "runner" in settings else llm.generate
        with pytest.raises(EngineDeadError, match=r"not even one of one token.*illegal memory access"):
            work(prompts, use_tqdm=False)


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


def test_a_call_inside_a_call_is_refused_and_leaves_nothing_behind(llm):
    def make_bar(**kwargs):
        llm.generate("inner", SamplingParams(max_tokens=2), use_tqdm=False)
        return tqdm(**kwargs)

    with pytest.raises(ConfigError, match="unfinished requests of another caller"):
        llm.generate("outer", SamplingParams(max_tokens=2), use_tqdm=make_bar)
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


@pytest.mark.parametrize("kwargs", [3, {3: 4}, ["a"], {("a",): 1}])
def test_variables_of_a_template_have_names(llm, kwargs):
    with pytest.raises(ConfigError, match="chat_template_kwargs must map names to values"):
        llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs=kwargs)


def test_a_template_without_end_costs_its_conversation(llm):
    chats = [[{"role": "user", "content": text}] for text in ("grow", "hi")]
    template = "{% if messages[0].content == 'grow' %}{{ 'a' * 10**9 }}{% endif %}{{ messages[0].content }}"
    params = SamplingParams(max_tokens=2)
    bad, good = llm.chat(chats, params, use_tqdm=False, chat_template=template, on_error="return")
    assert bad.error.kind == "ChatTemplateError"
    assert good.error is None
    assert good.prompt == "hi"


def test_a_chat_template_of_a_call_may_be_a_file(llm, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content }}!")
    (output,) = llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False, chat_template=str(path))
    assert output.prompt == "hi!"
