"""Folders of sentence-transformers against its formulas: joined modes, layers, prompts, small letters, lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from checkpoints import tiny_checkpoint
from millrace.engine import LLM, EngineConfig, PoolingParams, PoolingRequest
from millrace.engine.errors import CheckpointError, ConfigError, PromptTypeError
from millrace.engine.pooling.dense import ACTIVATIONS
from millrace.engine.pooling.sentence_transformer import read_text_settings
from millrace.engine.storage import Location
from millrace.pipeline.pooling.model import vector_size

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = "The mill wheel turns as long as water comes down the race. "
SETTINGS = {"dtype": "float32", "runner": "pooling", "max_num_batched_tokens": 16, "block_size": 4}


def write(folder: Path, pooling: dict | None, more: tuple = (), **files: dict) -> Path:
    """Adds the files of sentence-transformers to a folder; `more` are tuples of a kind of module, a config, weights."""
    kinds = [("", "Transformer"), *([] if pooling is None else [("1_Pooling", "Pooling")])]
    contents = {} if pooling is None else {"1_Pooling/config": pooling}
    for number, (kind, config, weights) in enumerate(more, 2):
        (folder / f"{number}_{kind}").mkdir(exist_ok=True)
        kinds.append((f"{number}_{kind}", kind))
        contents[f"{number}_{kind}/config"] = config
        if weights:
            save_file(weights, folder / f"{number}_{kind}" / "model.safetensors")
    contents["modules"] = [{"path": path, "type": f"sentence_transformers.base.modules.{kind}"} for path, kind in kinds]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in (contents | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@torch.inference_mode()
def states(folder: Path, token_ids: list[int]) -> torch.Tensor:
    return AutoModel.from_pretrained(folder, dtype=torch.float32)(torch.tensor([token_ids])).last_hidden_state[0]


def embeddings(outputs) -> list[list[float]]:
    return [output.outputs.embedding for output in outputs]


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode": ["lasttoken", "mean", "weightedmean"]},
        {
            "pooling_mode_lasttoken": True,
            "pooling_mode_weightedmean_tokens": True,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_cls_token": False,
        },
    ],
    ids=["new", "old"],
)
def test_modes_are_joined_and_all_modules_are_applied_in_order(tmp_path, pooling):
    norm, dense = torch.nn.LayerNorm(192), torch.nn.Linear(192, 24)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    weights = [
        {f"{of}.{name}": p.detach() for name, p in m.named_parameters()}
        for of, m in (("norm", norm), ("linear", dense))
    ]
    more = (
        ("LayerNorm", {"dimension": 192}, weights[0]),
        ("Dropout", {"dropout": 0.1}, None),
        ("Dense", {"activation_function": "torch.nn.modules.activation.GELU"}, weights[1]),
        ("Normalize", {}, None),
    )
    folder = write(tiny_checkpoint(tmp_path, "llama"), pooling, more)
    prompts = [[5, 6, 7], list(range(5, 45)), [9]]
    with LLM(str(folder), **SETTINGS) as llm:
        got = embeddings(llm.embed(prompts, use_tqdm=False))
        tokens = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    for ids, one, rows in zip(prompts, got, tokens, strict=True):
        hidden = states(folder, ids)
        order = torch.arange(1, len(ids) + 1).unsqueeze(1)
        parts = [hidden.mean(0), (hidden * order).sum(0) / order.sum(), hidden[-1]]
        # A list of modes has its own order; the flags of the older form have one order.
        joined = torch.cat(parts[-1:] + parts[:-1] if "pooling_mode" in pooling else parts)
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(torch.nn.functional.gelu(dense(norm(joined))), dim=-1)
        np.testing.assert_allclose(one, expected, **CLOSE)
        # Modules after the pooling do not concern the vectors of tokens.
        np.testing.assert_allclose(rows.outputs.data, torch.nn.functional.normalize(hidden, dim=-1), **CLOSE)


def test_a_folder_that_pools_nothing_projects_every_token(tmp_path):
    dense = torch.nn.Linear(64, 12, bias=False)
    config = {"activation_function": "torch.nn.modules.linear.Identity", "module_input_name": "token_embeddings"}
    folder = write(
        tiny_checkpoint(tmp_path, "llama"), None, (("Dense", config, {"linear.weight": dense.weight.detach()}),)
    )
    ids = list(range(5, 45))
    with LLM(str(folder), **SETTINGS) as llm:
        (got,) = llm.encode([ids], PoolingParams(use_activation=True), pooling_task="token_embed", use_tqdm=False)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(dense(states(folder, ids)), dim=-1)
    np.testing.assert_allclose(got.outputs.data, expected, **CLOSE)


def test_every_named_activation_is_that_of_torch():
    given = torch.linspace(-4, 4, 33)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(function(given), getattr(torch.nn, name)()(given))


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> Path:
    """A folder with prompts, whose means leave their tokens out, and that lower-cases texts."""
    return write(
        tiny_checkpoint(tmp_path_factory.mktemp("prompted"), "llama"),
        {"pooling_mode": ["mean", "max", "cls", "weightedmean"], "include_prompt": False},
        config_sentence_transformers={
            "prompts": {"query": "Find: ", "document": ""},
            "default_prompt_name": "query",
            "similarity_fn_name": "dot",
        },
        sentence_bert_config={"max_seq_length": 40, "do_lower_case": True},
    )


def test_prompts_come_by_name_or_text_and_are_left_out_of_means(prompted):
    calls = [({}, "Find: "), ({"prompt_name": "document"}, ""), ({"prompt": "Other one: "}, "Other one: ")]
    with LLM(str(prompted), **SETTINGS) as llm:
        tokenizer = llm.get_tokenizer()
        assert llm.llm_engine.task.similarity == "dot"
        for arguments, prefix in calls:
            outputs = llm.embed([TEXT[:30], "Water"], use_tqdm=False, **arguments)
            for text, output in zip((TEXT[:30], "Water"), outputs, strict=True):
                ids = tokenizer((prefix + text).lower())["input_ids"]
                assert output.prompt_token_ids == ids and output.prompt == text
                out = len(tokenizer(prefix.lower())["input_ids"]) if prefix else 0
                hidden = states(prompted, ids)
                order = torch.arange(1, len(ids) + 1).unsqueeze(1)[out:]
                kept = hidden[out:]
                expected = torch.cat([kept.mean(0), kept.amax(0), kept[0], (kept * order).sum(0) / order.sum()])
                np.testing.assert_allclose(output.outputs.embedding, expected, **CLOSE)
        # A request of the engine with text alone gets the default prompt; its mean leaves the prompt out too.
        llm.llm_engine.add_request(PoolingRequest("r", "Water", None, PoolingParams()))
        (output,) = [
            output for _ in range(9) if llm.llm_engine.has_unfinished_requests() for output in llm.llm_engine.step()
        ]
        (same,) = llm.embed("Water", use_tqdm=False)
        np.testing.assert_allclose(output.outputs.data, same.outputs.embedding, **CLOSE)
        for arguments, kind, message in (
            ({"prompt_name": "passage"}, ConfigError, "has 'query', 'document'; give the text"),
            ({"prompt_name": "query", "prompt": "x"}, ConfigError, "keep one of the two"),
            ({"prompt": 3}, ConfigError, "prompt must be the text"),
        ):
            with pytest.raises(kind, match=message):
                llm.embed("a", use_tqdm=False, **arguments)
        with pytest.raises(PromptTypeError, match="precede texts"):
            llm.embed([[5, 6]], prompt_name="query", use_tqdm=False)


def test_the_limit_of_the_folder_cuts_texts_but_never_above_that_of_the_model(prompted):
    with LLM(str(prompted), max_model_len=24, **SETTINGS) as llm:
        ids = llm.get_tokenizer()(("Find: " + TEXT * 9).lower())["input_ids"]
        (cut,) = llm.embed(TEXT * 9, use_tqdm=False)
        assert cut.prompt_token_ids == ids[:24]
        (failed,) = llm.embed([[5] * 25], use_tqdm=False, on_error="return")
        assert failed.error.kind == "PromptTooLongError"


def test_limits_that_sentence_transformers_writes_itself_are_heeded(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    plain = tiny_checkpoint(tmp_path / "plain", "llama")
    (plain / "chat_template.jinja").unlink(missing_ok=True)  # They would render texts with it.
    modules = [Transformer(str(plain), max_seq_length=20), Pooling(64, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu", truncate_dim=12).save_pretrained(str(tmp_path / "own"))
    theirs = SentenceTransformer(str(tmp_path / "own"), device="cpu")
    with LLM(str(tmp_path / "own"), **SETTINGS) as llm:
        (got,) = llm.embed(TEXT * 2, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        assert len(got.prompt_token_ids) == 20
        np.testing.assert_allclose(got.outputs.embedding, theirs.encode(TEXT * 2), **CLOSE)
        (more,) = llm.embed("Water", pooling_params=PoolingParams(dimensions=30), use_tqdm=False)
        assert len(more.outputs.embedding) == 30
    assert vector_size(EngineConfig(model=str(tmp_path / "own"), runner="pooling"), PoolingParams()) == 12


def test_a_dense_layer_that_asks_for_more_is_refused(tmp_path):
    config = {"use_residual": True, "activation_function": "torch.nn.modules.linear.Identity"}
    folder = write(tiny_checkpoint(tmp_path, "llama"), {}, (("Dense", config, {"linear.weight": torch.eye(64)}),))
    with pytest.raises(CheckpointError, match="use_residual"):
        LLM(str(folder), **SETTINGS)


def test_prompts_without_a_text_are_no_prompts(tmp_path):
    folder = write(tmp_path, {}, config_sentence_transformers={"prompts": {"query": None, "document": "d: "}})
    assert read_text_settings(Location.at(folder)).prompts == {"document": "d: "}
