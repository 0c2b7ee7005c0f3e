"""`LLM` as a script uses it: every sampling parameter does what its name says."""

from __future__ import annotations

import itertools
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams
from running import PROMPT, one


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


def test_threads_that_share_an_llm_each_get_their_own_outputs(llm):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    calls = [[f"caller {caller}, prompt {i}" for i in range(5)] for caller in range(4)]

    def run(prompts):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [(output.prompt, output.outputs[0].token_ids) for output in outputs]

    alone = [run(prompts) for prompts in calls]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, calls)) == alone


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


@pytest.mark.parametrize(("include", "text"), [(False, ""), (True, "</s>")])
def test_a_stop_string_may_be_a_special_token(llm, include, text):
    eos = llm.get_tokenizer().eos_token_id
    params = {"logit_bias": {eos: 100.0}, "max_tokens": 8, "ignore_eos": True, "include_stop_str_in_output": include}
    ended = one(llm, stop=["</s>"], **params)
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason, ended.text) == ([eos], "stop", "</s>", text)
    twice = one(llm, stop=["</s></s>"], **params)
    assert (twice.token_ids, twice.stop_reason) == ([eos, eos], "</s></s>")


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


def test_a_bad_word_that_only_the_tokenizer_knows_changes_no_other_row(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    params = [SamplingParams(bad_words=["<extra>"], max_tokens=2), SamplingParams(logit_bias={0: 100}, max_tokens=2)]
    with LLM(str(folder), dtype="float32", max_num_seqs=2) as llm:
        outputs = llm.generate([{"prompt_token_ids": [1, 5]}] * 2, params, use_tqdm=False)
    assert outputs[1].outputs[0].token_ids == [0, 0]


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
    assert len({item.decoded_token for item in first.values()}) == 5
    assert "".join(next(iter(entry.values())).decoded_token for entry in plain.logprobs) == plain.text
    forced = one(llm, max_tokens=1, logprobs=2, allowed_token_ids=[list(first)[3]])
    assert next(iter(forced.logprobs[0])) == list(first)[3] and len(forced.logprobs[0]) == 3
    assert forced.logprobs[0][list(first)[3]].rank == 4
    assert forced.logprobs[0][list(first)[3]].logprob == pytest.approx(first[list(first)[3]].logprob, abs=1e-5)
    only = one(llm, max_tokens=1, logprobs=0)
    assert list(only.logprobs[0]) == only.token_ids


def test_all_logprobs_can_be_allowed(tiny_model):
    with LLM(str(tiny_model("llama")), dtype="float32", max_logprobs=-1) as llm:
        everything = one(llm, max_tokens=1, logprobs=-1).logprobs[0]
    assert len(everything) == llm.llm_engine.handler.prompts.vocab_size
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
