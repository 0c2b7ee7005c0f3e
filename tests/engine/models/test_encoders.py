"""Each family of encoders computes what transformers computes, for texts of mixed lengths in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from checkpoints import BOS, EOS, PAD, tiny_checkpoint, tiny_tokenizer
from encoders import ENCODERS, has_head, reference, run_step, tiny_config, tiny_encoder
from millrace.engine import PoolingParams
from millrace.engine.errors import ConfigError, UnsupportedModelError
from millrace.engine.llm import LLM
from millrace.engine.models.registry import describe_model, load_hf_config

PROMPTS = [[7, 301, 12, 12, 45], [9], list(range(2, 80)), [301, 5, 6, 7, 8, 9, 10, 11], list(range(400, 440))]
"""Prompts without the id of the padding token, from which transformers derives positions in some families."""


def open_engine(folder: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_batched_tokens": 96}
    return LLM(str(folder), **fixed | settings)


def as_prompts(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "t5"])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_encoder(tmp_path, family)
    with open_engine(folder, pooler_config={"pooling_type": "MEAN", "normalize": False}) as llm:
        outputs = llm.embed(as_prompts(PROMPTS), use_tqdm=False)
    for output, hidden in zip(outputs, reference(folder, PROMPTS), strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), hidden.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_classes_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = tiny_encoder(tmp_path, family, "classes", num_labels=3)
    with open_engine(folder) as llm:
        params = PoolingParams(use_activation=False)
        outputs = llm.classify(as_prompts(PROMPTS), pooling_params=params, use_tqdm=False)
    for output, logits in zip(outputs, reference(folder, PROMPTS, "classes"), strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.probs), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "fields", "parallel"),
    [
        ("bert", {}, {"tensor_parallel_size": 2}),
        ("modernbert", {}, {"tensor_parallel_size": 2}),
        ("modernbert", {}, {"pipeline_parallel_size": 2}),
        ("t5", {}, {"tensor_parallel_size": 2}),
        ("deberta-v2", {}, {"tensor_parallel_size": 2}),
        # Each stage has three layers, and both have a copy of the second of three groups.
        ("albert", {"num_hidden_layers": 6, "num_hidden_groups": 3}, {"pipeline_parallel_size": 2}),
    ],
)
def test_ranks_share_an_encoder(tmp_path: Path, family: str, fields: dict[str, int], parallel: dict[str, int]) -> None:
    folder = tiny_encoder(tmp_path, family, **fields)
    with open_engine(folder, pooler_config={"pooling_type": "CLS", "normalize": False}, **parallel) as llm:
        outputs = llm.embed(as_prompts(PROMPTS), use_tqdm=False)
    for output, hidden in zip(outputs, reference(folder, PROMPTS), strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), hidden[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "head"),
    [(family, head) for family in ENCODERS for head in ("", "classes", "tokens") if has_head(family, head)],
)
def test_a_step_computes_what_transformers_computes(tmp_path: Path, family: str, head: str) -> None:
    folder = tiny_encoder(tmp_path, family, head, **({"num_labels": 3} if head else {}))
    types, inputs = None, {}
    if describe_model(load_hf_config(folder)).num_token_types == 2:
        types = [[int(index >= 3) for index in range(len(prompt))] for prompt in PROMPTS]
        inputs = {"token_type_ids": types}
    computed, wanted = run_step(folder, PROMPTS, head, types), reference(folder, PROMPTS, head, **inputs)
    for ours, theirs in zip(computed, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("ernie", {"use_task_id": False}),
        ("electra", {"embedding_size": 64, "hidden_act": "gelu_new"}),
        ("albert", {"embedding_size": 64, "num_hidden_groups": 4, "hidden_act": "relu"}),
        ("t5", {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 4}),
        (
            "deberta-v2",
            {"pos_att_type": "c2p", "position_biased_input": True, "type_vocab_size": 2, "norm_rel_ebd": "none"},
        ),
        ("deberta-v2", {"pos_att_type": ["p2c"], "position_buckets": -1, "max_relative_positions": 20}),
        ("deberta-v2", {"position_buckets": 6, "max_relative_positions": -1, "conv_kernel_size": 3}),
        ("deberta-v2", {"conv_kernel_size": 5, "conv_groups": 4, "conv_act": "gelu"}),
    ],
)
def test_fields_of_a_family_change_what_it_computes(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    folder = tiny_encoder(tmp_path, family, **fields)
    for ours, theirs in zip(run_step(folder, PROMPTS), reference(folder, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [name for name in ENCODERS if has_head(name, "words")])
def test_the_head_of_the_training_is_left_out(tmp_path: Path, family: str) -> None:
    folder = tiny_encoder(tmp_path / "bare", family)
    wanted, classes = run_step(folder, PROMPTS), (AutoModelForMaskedLM, AutoModelForPreTraining)
    kind = type(AutoConfig.from_pretrained(folder))
    for model in {make._model_mapping[kind] for make in classes if kind in make._model_mapping}:
        model.from_pretrained(folder).save_pretrained(trained := tmp_path / model.__name__)
        for ours, theirs in zip(run_step(trained, PROMPTS), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_the_encoder_of_a_model_with_a_decoder_is_taken(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "bare", "t5")
    T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration"):
        describe_model(load_hf_config(tmp_path / "whole"))
    computed = run_step(tmp_path / "whole", PROMPTS, architectures=["T5EncoderModel"])
    for ours, theirs in zip(computed, run_step(folder, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_checkpoints_with_older_names_load(tmp_path: Path, prefix: str) -> None:
    """A folder from before safetensors: norms with gamma and beta, buffers, a pooler or none, a head that is tied."""
    folder = tiny_encoder(tmp_path / "new", "bert")
    tensors = load_file(folder / "model.safetensors")
    older = {prefix + _older_name(name): tensor for name, tensor in tensors.items() if prefix or "pooler" not in name}
    older[f"{prefix}embeddings.position_ids"] = torch.arange(80).unsqueeze(0)
    if prefix:
        older["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]
        older["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(64)
        older["cls.seq_relationship.bias"] = torch.zeros(2)
    tiny_encoder(tmp_path / "old", "bert")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(older, tmp_path / "old" / "pytorch_model.bin")
    for ours, theirs in zip(run_step(tmp_path / "old", PROMPTS), run_step(folder, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def _older_name(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'"),
        ("bert", {"hidden_act": "swish"}, "'hidden_act' is 'swish'"),
        ("ernie", {"use_task_id": True, "task_type_vocab_size": 0}, "'task_type_vocab_size' is 0"),
        ("roberta", {"max_position_embeddings": 2}, "'max_position_embeddings' is 2"),
        ("distilbert", {"activation": "swish"}, "'activation' is 'swish'"),
        ("albert", {"num_hidden_groups": 3}, "'num_hidden_groups' is 3"),
        ("albert", {"inner_group_num": 2}, "'inner_group_num' is 2"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "'relative_attention_num_buckets' is 16"),
        ("deberta-v2", {"relative_attention": False}, "'relative_attention' is false"),
        ("deberta-v2", {"share_att_key": False}, "'share_att_key' is false"),
        ("deberta-v2", {"pos_att_type": ["p2p"]}, "'pos_att_type' is \\['p2p'\\]"),
        ("deberta-v2", {"position_buckets": 7}, "'position_buckets' is 7"),
        ("deberta-v2", {"norm_rel_ebd": "rms"}, "'norm_rel_ebd' is 'rms'"),
        ("deberta-v2", {"embedding_size": 32}, "'embedding_size' is 32"),
        ("deberta-v2", {"conv_kernel_size": 4}, "'conv_kernel_size' and 'conv_groups' are 4 and 1"),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "selu"}, "'conv_act' is 'selu'"),
        ("t5", {"relative_attention_num_buckets": 7}, "'relative_attention_num_buckets' is 7"),
        ("t5", {"relative_attention_max_distance": 3}, "'relative_attention_max_distance' is 3"),
        ("t5", {"feed_forward_proj": "gated-swish"}, "'feed_forward_proj' is 'gated-swish'"),
    ],
)
def test_values_that_are_not_done_are_refused_by_name(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        describe_model(tiny_config(family, **fields))


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


def pair_tokenizer(folder: Path) -> Any:
    """Writes a tokenizer with the template and the types of BERT to a checkpoint, and returns it."""
    plain = tiny_tokenizer()
    backend = plain.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B:1 {EOS}:1",
        special_tokens=[(name, plain.convert_tokens_to_ids(name)) for name in (BOS, EOS)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, model_input_names=names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_cross_encoder_knows_the_texts_of_a_pair_by_their_types(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "bert", "classes", num_labels=1)
    tokenizer = pair_tokenizer(folder)
    query, documents = "where is the mill", ["", "the mill is at the brook", "water " * 30, "a"]
    with LLM(str(folder), dtype="float32") as llm:
        outputs = llm.score(query, documents, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    pairs = [tokenizer([query], [document]) for document in documents]
    assert pairs[1]["token_type_ids"][0][0] == 0 and pairs[1]["token_type_ids"][0][-1] == 1
    prompts, types = ([pair[name][0] for pair in pairs] for name in ("input_ids", "token_type_ids"))
    for output, logits in zip(outputs, reference(folder, prompts, "classes", token_type_ids=types), strict=True):
        assert output.outputs.score == pytest.approx(logits.item(), abs=1e-5)
