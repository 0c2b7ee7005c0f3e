"""The vectors of prompts and of tokens against formulas on Hugging Face's hidden states: in chunks, mixed, on ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from checkpoints import tiny_classifier
from encoders import reference, tiny_encoder
from millrace.engine import LLM, PoolingParams, PoolingRequest
from millrace.engine.pooling.config import POOLING_TYPES

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = [[5 + (7 * i + j) % 23 for j in range(n)] for i, n in enumerate((1, 40, 3, 17, 66, 2, 29, 16))]
# A step has 16 tokens, so most prompts take several; the blocks are too few for all prompts at once.
TIGHT = {"dtype": "float32", "max_num_batched_tokens": 16, "block_size": 4, "max_model_len": 80}
FEW_BLOCKS = {"num_gpu_blocks_override": 22}

FORMULAS = {
    "CLS": lambda rows: rows[0],
    "MAX": lambda rows: rows.max(0),
    "MEAN": lambda rows: rows.mean(0),
    "MEAN_SQRT_LEN": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "WEIGHTEDMEAN": lambda rows: np.average(rows, axis=0, weights=np.arange(1, len(rows) + 1)),
    "LAST": lambda rows: rows[-1],
}


def data(outputs) -> list[np.ndarray]:
    return [output.outputs.data for output in outputs]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def hidden(tiny_model) -> list[np.ndarray]:
    """The hidden states of the prompts after the final norm, by Hugging Face."""
    model = AutoModel.from_pretrained(tiny_model("qwen3"), dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in PROMPTS]


def assert_all_close(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("types", [*([name] for name in POOLING_TYPES), ["last", "WEIGHTEDMEAN", "max"], POOLING_TYPES])
def test_each_pooling_type_is_its_formula_and_several_are_joined(tiny_model, hidden, types):
    config = {"pooling_type": types, "use_activation": False}
    order = [one.upper() for one in types]
    expected = [np.concatenate([FORMULAS[name](rows) for name in order]) for rows in hidden]
    with LLM(str(tiny_model("qwen3")), runner="pooling", pooler_config=config, **TIGHT) as llm:
        assert_all_close(data(llm.encode(PROMPTS, pooling_task="embed", use_tqdm=False)), expected)
        # The next prompts take over rows of the tables with the states of these.
        assert_all_close(data(llm.encode(PROMPTS[::-1], pooling_task="embed", use_tqdm=False)), expected[::-1])
        assert llm.stats().counters.num_chunked_prefills


def test_each_token_has_a_vector_beside_prompts_with_one(tiny_model, hidden):
    with LLM(str(tiny_model("qwen3")), runner="pooling", pooler_config={"pooling_type": "MEAN"}, **TIGHT) as llm:
        got = data(llm.encode(PROMPTS, pooling_task="token_embed", use_tqdm=False))
        assert_all_close(got, [unit(rows) for rows in hidden])
        params = [
            PoolingParams(task=("token_embed", "embed")[i % 2], use_activation=False) for i in range(len(PROMPTS))
        ]
        mixed = data(llm.encode(PROMPTS, params, use_tqdm=False))
        assert_all_close(mixed, [rows.mean(0) if i % 2 else rows for i, rows in enumerate(hidden)])
        short = data(llm.encode(PROMPTS, PoolingParams(dimensions=8), pooling_task="token_embed", use_tqdm=False))
        assert_all_close(short, [unit(rows[:, :8]) for rows in hidden])
        assert not llm.llm_engine.executor._runner._head._held, "vectors of ended prompts are kept"


def test_a_step_that_fails_loses_no_row(tiny_model, hidden, monkeypatch):
    settings = {**TIGHT, **FEW_BLOCKS, "max_num_seqs": 8}
    with LLM(str(tiny_model("qwen3")), task="token_embed", **settings) as llm:
        engine = llm.llm_engine
        execute, num_lost = engine.executor.execute, 0

        def fails_once(plan):
            nonlocal num_lost
            step = execute(plan)
            if len(plan.rows) > 1 and any(plan.starts) and not num_lost:
                num_lost = len(plan.rows)
                raise RuntimeError("a step that ran, and was lost")
            return step

        monkeypatch.setattr(engine.executor, "execute", fails_once)
        for i, ids in enumerate(PROMPTS):  # The engine's own task makes a vector of each token.
            engine.add_request(PoolingRequest(str(i), None, ids, PoolingParams(), priority=-(i % 3)))
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
        assert num_lost > 1
        assert_all_close(data([outputs[str(i)] for i in range(len(PROMPTS))]), [unit(rows) for rows in hidden])
        engine.check_integrity()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    names = dict(enumerate(("bad", "fair", "good", "best")))
    return tiny_classifier(tmp_path_factory.mktemp("steps"), "llama", num_labels=4, id2label=names)


def test_classes_of_tokens_of_steps_and_their_names(classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model.score(model.model(torch.tensor([ids])).last_hidden_state[0]).numpy() for ids in PROMPTS]
    tag = PROMPTS[1][5]
    config = {"logit_mean": 0.5, "logit_sigma": 2.0}
    with LLM(str(classifier), pooler_config={"tok_pooling_type": "STEP", "step_tag_id": tag, **config}, **TIGHT) as llm:
        scaled = [(rows - 0.5) / 2 for rows in logits]
        steps = [rows[np.equal(ids, tag)] for rows, ids in zip(scaled, PROMPTS, strict=True)]
        assert sum(map(len, steps)) > 3 and not all(map(len, steps))
        raw = llm.reward(PROMPTS, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        assert_all_close(data(raw), steps)
        chosen = PoolingParams(returned_token_ids=[3, 1])
        got = data(llm.reward(PROMPTS, pooling_params=chosen, use_tqdm=False))
        assert_all_close(got, [torch.tensor(rows[:, [3, 1]]).softmax(-1).numpy() for rows in steps])
        classes = llm.classify(PROMPTS, use_tqdm=False)
        expected = [torch.tensor(rows[-1]).softmax(-1).numpy() for rows in scaled]
        assert_all_close([np.array(one.outputs.probs) for one in classes], expected)
        labels = ("bad", "fair", "good", "best")
        assert [one.outputs.label for one in classes] == [labels[rows.argmax()] for rows in expected]
        assert raw[0].outputs.labels == classes[0].outputs.labels == labels
    with LLM(str(classifier), pooler_config={"pooling_type": "MEAN"}, **TIGHT) as llm, torch.inference_mode():
        mean = [model.score(model.model(torch.tensor([ids])).last_hidden_state[0].mean(0)) for ids in PROMPTS]
        raw = llm.classify(PROMPTS, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        assert_all_close([np.array(one.outputs.probs) for one in raw], [one.numpy() for one in mean])


ENCODER = {"dtype": "float32", "max_num_batched_tokens": 80, "max_model_len": 70}
"""Settings of encoders, whose texts are never cut, but fill several steps."""


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_encoders_pool_in_every_way(tmp_path, model_type):
    folder = tiny_encoder(tmp_path, model_type)
    hidden = [rows.numpy() for rows in reference(folder, PROMPTS)]
    config = {"pooling_type": POOLING_TYPES, "use_activation": False}
    joined = [np.concatenate([FORMULAS[name](rows) for name in POOLING_TYPES]) for rows in hidden]
    with LLM(str(folder), runner="pooling", pooler_config=config, **ENCODER) as llm:
        tasks = [PoolingParams(task=("token_embed", "embed")[i % 2]) for i in range(len(PROMPTS))]
        expected = [one if i % 2 else rows for i, (one, rows) in enumerate(zip(joined, hidden, strict=True))]
        assert_all_close(data(llm.encode(PROMPTS, tasks, use_tqdm=False)), expected)


def test_an_encoder_that_was_trained_to_classify_tokens_does_so_where_nothing_is_said(tmp_path):
    folder = tiny_encoder(tmp_path, "bert", "tokens", id2label={0: "O", 1: "NAME", 2: "PLACE"})
    expected = [rows.softmax(-1).numpy() for rows in reference(folder, PROMPTS, "tokens")]
    with LLM(str(folder), **ENCODER) as llm:
        for i, ids in enumerate(PROMPTS):
            llm.llm_engine.add_request(PoolingRequest(str(i), None, ids, PoolingParams()))
        outputs = {}
        while llm.llm_engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in llm.llm_engine.step()}
        assert_all_close(data([outputs[str(i)] for i in range(len(PROMPTS))]), expected)
        assert outputs["0"].outputs.labels == ("O", "NAME", "PLACE")


@pytest.mark.slow
@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_ranks_bring_rows_of_tokens_to_the_host(classifier, tp_size, pp_size):
    settings = {**TIGHT, "pooler_config": {"pooling_type": ["MEAN"]}}
    params = [PoolingParams(task=("token_classify", "classify")[i % 3 == 0]) for i in range(len(PROMPTS))]
    with LLM(str(classifier), **settings) as llm:
        expected = data(llm.encode(PROMPTS, params, use_tqdm=False))
    sizes = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size, "device": "cpu"}
    with LLM(str(classifier), **settings, **sizes) as llm:
        assert_all_close(data(llm.encode(PROMPTS, params, use_tqdm=False)), expected)
