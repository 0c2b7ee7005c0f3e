"""Each family of encoders computes what transformers computes, for texts of mixed lengths in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from checkpoints import tiny_checkpoint
from encoders import ENCODERS, TOKEN_CLASSIFIERS, reference, tiny_encoder
from millrace.engine import PoolingParams
from millrace.engine.batch import ForwardBatch
from millrace.engine.errors import ConfigError
from millrace.engine.llm import LLM
from millrace.engine.models.options import ModelOptions
from millrace.engine.models.registry import load_hf_config, load_model

PROMPTS = [[7, 301, 12, 12, 45], [9], list(range(2, 80)), [301, 5, 6, 7, 8, 9, 10, 11], list(range(400, 440))]
"""Prompts without the id of the padding token, from which transformers derives positions in some families."""


def open_engine(folder: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_batched_tokens": 96}
    return LLM(str(folder), **fixed | settings)


def as_prompts(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


@pytest.mark.parametrize("family", ENCODERS)
def test_hidden_states_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_encoder(tmp_path, family)
    with open_engine(folder, pooler_config={"pooling_type": "MEAN", "normalize": False}) as llm:
        outputs = llm.embed(as_prompts(PROMPTS), use_tqdm=False)
    for output, hidden in zip(outputs, reference(folder, PROMPTS), strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), hidden.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_classes_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_encoder(tmp_path, family, "classes", num_labels=3)
    with open_engine(folder) as llm:
        params = PoolingParams(use_activation=False)
        outputs = llm.classify(as_prompts(PROMPTS), pooling_params=params, use_tqdm=False)
    for output, logits in zip(outputs, reference(folder, PROMPTS, "classes"), strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.probs), logits, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("family", TOKEN_CLASSIFIERS)
def test_classes_of_tokens_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_encoder(tmp_path, family, "tokens", num_labels=3)
    model = load_model(folder, load_hf_config(folder), torch.float32, "cpu", ModelOptions(head="score"))
    nothing = torch.empty(0)
    logits = model.compute_class_logits(model(one_step(PROMPTS), [(nothing, nothing)]))
    torch.testing.assert_close(logits, torch.cat(reference(folder, PROMPTS, "tokens")), atol=1e-5, rtol=1e-4)


def one_step(prompts: list[list[int]]) -> ForwardBatch:
    """Returns the batch of a step that computes all prompts."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ForwardBatch(
        token_ids=torch.cat([torch.tensor(prompt) for prompt in prompts]),
        positions=torch.cat([torch.arange(int(length)) for length in lengths]),
        slot_mappings=(),
        query_start_loc=F.pad(lengths.cumsum(0), (1, 0)).int(),
        seq_lens=lengths.int(),
        block_tables=(),
        rows=torch.arange(len(prompts), dtype=torch.int32),
        longest_prompt=int(lengths.max()),
    )


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("parallel", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_ranks_share_an_encoder(tmp_path: Path, family: str, parallel: dict[str, int]) -> None:
    folder = tiny_encoder(tmp_path, family)
    with open_engine(folder, pooler_config={"pooling_type": "CLS", "normalize": False}, **parallel) as llm:
        outputs = llm.embed(as_prompts(PROMPTS), use_tqdm=False)
    for output, hidden in zip(outputs, reference(folder, PROMPTS), strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), hidden[0], atol=1e-5, rtol=1e-4)


def test_a_step_has_room_for_the_longest_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_encoder(tmp_path, "bert")
    with open_engine(folder, max_num_batched_tokens=16) as llm:
        assert llm.llm_engine.config.max_num_batched_tokens == 80
        assert llm.embed(as_prompts([list(range(2, 82))]), use_tqdm=False)[0].error is None
    assert "max_num_batched_tokens is raised from 16 to 80" in caplog.text


def test_an_encoder_generates_no_text(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "bert")
    with pytest.raises(ConfigError, match=r"task='generate'|encoder"):
        open_engine(folder, runner="generate")


@torch.no_grad()
def test_a_decoder_may_attend_to_later_tokens(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3", is_causal=False)
    with pytest.raises(ConfigError, match="encoder"):
        open_engine(folder)
    with open_engine(folder, task="embed", pooler_config={"pooling_type": "MEAN", "normalize": False}) as llm:
        outputs = llm.embed(as_prompts(PROMPTS[:4]), use_tqdm=False)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, output in zip(PROMPTS[:4], outputs, strict=True):
        sees_all = torch.zeros(1, 1, len(prompt), len(prompt))
        wanted = model(torch.tensor([prompt]), attention_mask=sees_all).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, atol=1e-5, rtol=1e-4)
