"""Encoders without a family here run as modules of transformers, text by text, and compute what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from checkpoints import tiny_tokenizer
from encoders import HEADS, draw, reference
from millrace.engine import PoolingParams
from millrace.engine.errors import CheckpointError, ConfigError, PromptTooLongError, UnsupportedModelError
from millrace.engine.llm import LLM

PROMPTS = [[5, 6, 7], [5, 8, 9], list(range(20, 60)), [11], [7, 8, 9, 10]]

SIZES = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
XLM = {"n_words": 120, "emb_dim": 48, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 64, "pad_index": 1}
ESM = SIZES | {"position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": True}

CASES = [
    ("xlm", XLM, ""),
    ("xlm", XLM, "words"),
    ("flaubert", XLM, "classes"),
    ("squeezebert", SIZES | {"embedding_size": 48}, "classes"),
    ("mobilebert", SIZES | {"embedding_size": 32, "intra_bottleneck_size": 32}, ""),
    ("roformer", SIZES, "classes"),
    ("esm", ESM, "words"),
    ("big_bird", SIZES, ""),
    ("longformer", SIZES | {"attention_window": 8}, "classes"),
    ("convbert", SIZES, ""),
    ("data2vec-text", SIZES | {"max_position_embeddings": 42}, "words"),
    ("fnet", SIZES, "classes"),
    ("xmod", SIZES | {"languages": ["en"], "default_language": "en"}, "words"),
]
"""Model type, fields of its config, and the head of the checkpoint. A text of 40 tokens fits all of them."""


def encoder_folder(folder: Path, model_type: str, fields: dict[str, Any], head: str) -> Path:
    more = {"num_labels": 3} if head == "classes" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HEADS[head].from_config(AutoConfig.for_model(model_type, **fields, **more), dtype=torch.float32)
        draw(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def compute(folder: Path, head: str, **settings: Any) -> list[Tensor]:
    """Returns the mean of the hidden states of each prompt, or its logits."""
    prompts, mean = [{"prompt_token_ids": prompt} for prompt in PROMPTS], {"pooling_type": "MEAN", "normalize": False}
    settings = {"dtype": "float32", "skip_tokenizer_init": True} | settings
    if head == "classes":
        with LLM(str(folder), **settings) as llm:
            params = PoolingParams(use_activation=False)
            outputs = llm.classify(prompts, pooling_params=params, use_tqdm=False)
            return [torch.tensor(output.outputs.probs) for output in outputs]
    with LLM(str(folder), task="embed", pooler_config=mean, **settings) as llm:
        return [torch.tensor(output.outputs.embedding) for output in llm.embed(prompts, use_tqdm=False)]


@pytest.mark.parametrize(("model_type", "fields", "head"), CASES)
def test_results_are_those_of_transformers(tmp_path: Path, model_type: str, fields: dict[str, Any], head: str) -> None:
    folder = encoder_folder(tmp_path, model_type, fields, head)
    wanted = reference(folder, PROMPTS, head if head == "classes" else "")
    for found, result in zip(compute(folder, head), wanted, strict=True):
        expected = result if head == "classes" else result.mean(0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "fields", "how"),
    [
        ("ernie", SIZES, "in one row"),
        ("data2vec-text", SIZES, "in one row"),
        ("bert", SIZES, "in one row"),
        ("convbert", SIZES, "one by one"),  # It convolves.
        ("esm", ESM, "one by one"),  # It counts masked tokens.
        ("modernbert", SIZES, "one by one"),  # Some layers have windows.
        (
            "eurobert",
            SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "one by one",
        ),
    ],
)
def test_texts_share_a_row_if_only_attention_looks_at_other_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str, fields: dict[str, Any], how: str
) -> None:
    caplog.set_level("INFO")
    folder = encoder_folder(tmp_path, model_type, fields, "")
    found = compute(folder, "", model_impl="transformers")
    assert f"the texts of a step run through {find_name(folder)} {how}" in caplog.text
    for vector, hidden in zip(found, reference(folder, PROMPTS), strict=True):
        torch.testing.assert_close(vector, hidden.mean(0), atol=1e-5, rtol=1e-4)


def find_name(folder: Path) -> str:
    return str(AutoConfig.from_pretrained(folder).architectures[0])


def test_an_own_family_computes_what_the_module_does(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path, "bert", SIZES, "")
    for found, own in zip(compute(folder, "", model_impl="transformers"), compute(folder, ""), strict=True):
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)


def test_texts_may_be_as_long_as_positions_after_the_padding_id_allow(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path, "data2vec-text", SIZES | {"max_position_embeddings": 42}, "")
    too_long = pytest.raises(PromptTooLongError, match="maximum model length of 40")
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True) as llm, too_long:
        llm.embed({"prompt_token_ids": list(range(3, 44))}, use_tqdm=False)


FUNNEL = {"vocab_size": 120, "d_model": 48, "n_head": 4, "d_head": 12, "block_sizes": [1, 1]}
REFORMER = {"attn_layers": ["local"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [24, 24]}
BART = {"vocab_size": 120, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1}


@pytest.mark.parametrize(
    ("model_type", "fields", "head", "reason"),
    [
        ("funnel", FUNNEL, "classes", "max_position_embeddings"),
        ("funnel", FUNNEL | {"max_position_embeddings": 64}, "classes", "a text of 1 tokens"),
        ("reformer", SIZES | REFORMER, "", r"of 1 tokens it makes a result of shape \[1, 1, 96\]"),
        ("canine", SIZES, "", "a text of 1 tokens"),
        ("bart", BART, "", "encoder and a decoder"),
    ],
)
def test_a_module_that_makes_no_vector_for_each_token_is_refused(
    tmp_path: Path, model_type: str, fields: dict[str, Any], head: str, reason: str
) -> None:
    folder = encoder_folder(tmp_path, model_type, fields, head)
    with pytest.raises(UnsupportedModelError, match=reason):
        compute(folder, head)


@pytest.mark.parametrize("setting", [{"tensor_parallel_size": 2}, {"quantization": "int8"}])
def test_what_needs_a_model_of_our_own_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    folder = encoder_folder(tmp_path, "convbert", SIZES, "")
    with pytest.raises(ConfigError, match=next(iter(setting))):
        compute(folder, "", **setting)


def test_a_tensor_that_belongs_to_no_part_is_named(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path, "convbert", SIZES, "classes")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"convbert.extra.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"convbert\.extra\.weight"):
        compute(folder, "classes")
