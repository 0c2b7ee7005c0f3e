"""What a prompt may bring: text or tokens, and a salt for the prefix cache."""

from __future__ import annotations

import pickle

import pytest

from millrace.engine.errors import PromptTypeError, TokenOutOfVocabularyError
from millrace.engine.inputs import ParsedPrompt, PromptReader
from millrace.engine.llm import LLM
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.tasks.generate_inputs import SequenceMaker

TOKENS = list(range(5, 55))  # three full blocks and a part of one
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)


def num_cached(llm: LLM, *prompts: object) -> list[int | None]:
    """Runs prompts one after another and returns how many tokens of each came from the prefix cache."""
    return [llm.generate([prompt], ONE_TOKEN, use_tqdm=False)[0].num_cached_tokens for prompt in prompts]


def test_equal_prompts_under_two_salts_share_no_block(llm):
    engine = llm.llm_engine
    salts = ["tenant-a", "tenant-b", None, "tenant-a"]
    for i, salt in enumerate(salts):
        request = GenerateRequest(str(i), None, TOKENS, SamplingParams(max_tokens=4, ignore_eos=True), cache_salt=salt)
        engine.add_request(pickle.loads(pickle.dumps(request)))
    engine.step()
    blocks = {sequence.request_id: sequence.block_ids[0] for sequence in engine.scheduler.running}
    assert blocks["0"][:3] == blocks["3"][:3], "equal prompts of one salt share all full blocks"
    assert len({block for name in "012" for block in blocks[name]}) == 3 * len(blocks["0"])
    engine.abort(blocks)


def test_only_prompts_of_the_same_salt_find_a_cached_prefix(llm):
    text = "the same prompt, which is longer than a block or two of the cache"
    a, b = ({"prompt": text, "cache_salt": salt} for salt in "ab")
    first, again, other, none = num_cached(llm, a, a, b, text)
    assert (first, other, none) == (0, 0, 0)
    assert again
    tokens = {"prompt_token_ids": TOKENS, "cache_salt": "tokens"}
    assert num_cached(llm, tokens, tokens) == [0, 48]


def test_conversations_take_one_salt_or_one_for_each(llm):
    conversation = [{"role": "user", "content": "is the cache of another tenant of any use to this one"}]
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"

    def chat(salt: object) -> list[int | None]:
        asked = {"cache_salt": salt, "chat_template": template, "use_tqdm": False}
        return [one.num_cached_tokens for one in llm.chat([conversation, conversation], ONE_TOKEN, **asked)]

    first, second = chat(["chat-a", "chat-b"])
    assert first == second == 0
    assert all(chat("chat-a"))


@pytest.mark.parametrize("salt", ["", 3, b"bytes"])
def test_a_salt_that_is_no_text_is_refused(llm, salt):
    with pytest.raises(PromptTypeError, match="cache_salt must be a non-empty string"):
        llm.generate([{"prompt": "x", "cache_salt": salt}], ONE_TOKEN, use_tqdm=False)
    (output,) = llm.generate([{"prompt": "x", "cache_salt": salt}], ONE_TOKEN, use_tqdm=False, on_error="return")
    assert output.error.kind == "PromptTypeError"


def test_a_token_that_only_the_tokenizer_has_is_named(llm):
    tokenizer = llm.llm_engine.tokenizer
    (wrong,) = tokenizer.encode_batch(["~"], add_special_tokens=False)[0]
    reader = PromptReader(tokenizer, wrong, 100)
    with pytest.raises(TokenOutOfVocabularyError, match=f"Token id {wrong} .* the token is '~' of the tokenizer"):
        reader.read(ParsedPrompt("~"), num_new_tokens=1)
    params = SamplingParams(bad_words=["~", "!"])
    (sequence,) = SequenceMaker(reader, 20, [], 0).make(GenerateRequest("a", "!", None, params))
    assert len(sequence.bad_word_edges)
    assert sequence.bad_word_edges[:, 1].max() < wrong
