"""Texts of tokens in log-probabilities: joined they are the text of the output, and other tokens read differently."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from checkpoints import tiny_tokenizer
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.sequence import Sequence
from millrace.engine.step.head import HostLogprobs
from millrace.engine.tasks.generate_outputs import CompletionBuilder
from millrace.engine.text.detokenizer import StopStringMatcher
from millrace.engine.text.tokenizer import Tokenizer

NUM_BEYOND = 3
"""Number of ids that the model knows and the tokenizer does not."""

WORDS = ["<unk>", "▁", "a", "b", "é", "水", "▁a", "▁the", "ab", "\ufffd", "ing"]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>")])
    return tokenizer


def metaspace(scheme: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them; without a scheme, with the older decoder that is a sequence."""
    names = ["<pad>", "<s>", "</s>", *WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme or "always")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if scheme is not None:
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def word_piece() -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "##ing", "a", "##a", ".", "mill"]
    backend = Backend(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )


MAKERS = {
    "byte level": byte_level,
    "older SentencePiece": lambda: metaspace(None),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"),
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    MAKERS[request.param]().save_pretrained(folder)
    return Tokenizer(folder)


def build(tokenizer: Tokenizer, prompt: list[int], output: list[int], alternatives: int, **fields: Any) -> Any:
    """Returns the output of a sequence, as the engine makes it; `alternatives` are the most probable at each place."""
    params = SamplingParams(logprobs=alternatives, prompt_logprobs=alternatives, max_tokens=99, **fields)
    matcher = StopStringMatcher(tokenizer, prompt, params.stop) if params.stop else None
    stop_ids = {2: None}
    sequence = Sequence("a", 0, params, 0, list(prompt), len(prompt), 999, stop_ids, matcher=matcher)
    builder = CompletionBuilder(tokenizer)
    sequence.prompt_logprobs = [None, *(_entry(builder, sequence, one, alternatives) for one in prompt[1:])]
    for token_id in output:
        sequence.logprobs.append(_entry(builder, sequence, token_id, alternatives))
        if sequence.append_output(token_id) and not params.ignore_eos:
            break
    return builder.build(GenerateRequest("a", None, None, params), [sequence])


def _entry(builder: CompletionBuilder, sequence: Sequence, token_id: int, alternatives: int) -> dict[int, Any]:
    ids = np.array([[token_id, *((token_id // 7 * 5 + i) % 300 for i in range(alternatives))]])
    scores = HostLogprobs(np.zeros(ids.shape, np.float32), ids, np.ones(1, np.int64))
    return builder._entry(sequence, scores, 0, alternatives)


def joined(entries: list[dict[int, Any]], token_ids: list[int]) -> str:
    return "".join(entry[token_id].decoded_token for entry, token_id in zip(entries, token_ids, strict=True))


ids = st.lists(st.integers(0, 10_000), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(prompt=ids, output=ids, skip=st.booleans(), stop=st.sampled_from([[], ["a"], ["é"], ["</s>"], [" "]]))
@example(prompt=[1], output=[9, 9, 7], skip=True, stop=[])
def test_joined_tokens_are_the_text_and_different_tokens_read_differently(tokenizer, prompt, output, skip, stop):
    size = tokenizer.vocab_size + NUM_BEYOND
    prompt, output = [one % size for one in prompt], [one % size for one in output]
    result = build(tokenizer, prompt, output, 20, skip_special_tokens=skip, stop=stop)
    completion = result.outputs[0]
    assert joined(completion.logprobs, completion.token_ids) == completion.text
    assert tokenizer.decode_ids(prompt, skip_special_tokens=False).endswith(
        joined(result.prompt_logprobs[1:], prompt[1:])
    )
    for entry in itertools.chain(completion.logprobs, result.prompt_logprobs[1:]):
        texts = [one.decoded_token for one in entry.values()]
        assert len(set(texts)) == len(texts)
        assert all(texts[1:]), "only a chosen token may add nothing"


def test_a_token_adds_its_part_of_the_text(tokenizer):
    output = tokenizer.encode_batch(["the a"], add_special_tokens=False)[0]
    completion = build(tokenizer, output[:1], [*output, 2], 0).outputs[0]
    texts = [entry[one].decoded_token for entry, one in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert texts == [*(tokenizer.inner_text(one) for one in output), ""], "the stop token is not in the text"


def test_what_has_no_text_reads_as_its_bytes_its_name_or_its_number(tmp_path):
    byte_level().save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    first, second, third = tokenizer.encode_batch(["力"], add_special_tokens=False)[0]
    assert [tokenizer.spellings_of_token(one)[0] for one in (first, second, third)] == ["<0xE5>", "<0x8A>", "<0x9B>"]
    assert tokenizer.spellings_of_token(2)[0] == "</s>"
    assert tokenizer.spellings_of_token(tokenizer.vocab_size)[0] == f"<token {tokenizer.vocab_size}>"
    chosen = build(tokenizer, [5], [first, second, third], 0).outputs[0].logprobs
    assert [one.decoded_token for entry in chosen for one in entry.values()] == ["", "", "力"]
