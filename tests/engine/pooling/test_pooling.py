"""Pooling against Hugging Face: embeddings of the last token or the mean, classes, scores; in chunks, with a cache."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from checkpoints import tiny_checkpoint, tiny_classifier
from millrace.engine import LLM, PoolingParams, PoolingRequest, SamplingParams
from millrace.engine.errors import (
    CheckpointError,
    ConfigError,
    PoolingParamsError,
    TokenOutOfVocabularyError,
    UnsupportedModelError,
)
from millrace.engine.pooling.pooler import Pooler, class_activation, identity, normalize, sigmoid, softmax
from millrace.engine.pooling.sentence_transformer import read_sentence_transformer, read_text_settings
from millrace.engine.storage import Location

PREFIX = "The mill wheel turns as long as water comes down the race. "
PROMPTS = [PREFIX + end for end in ("Rows stream in.", "Count: 0 1 2 3 4 5 6 7 8 9.", "x", "Größe, naïve, 水車")] + [
    "a"
]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def engine(folder: Path, **kwargs) -> LLM:
    """Makes an engine of float32 whose prompts come in chunks."""
    return LLM(str(folder), dtype="float32", **{"max_num_batched_tokens": 16, "block_size": 4, "seed": 0, **kwargs})


def vectors(outputs) -> np.ndarray:
    return np.stack([output.outputs.data for output in outputs])


@pytest.fixture(scope="module")
def hidden():
    """Returns a function: the hidden states of a prompt after the final norm, by Hugging Face."""

    @torch.inference_mode()
    def states(folder: Path, token_ids: list[int]) -> np.ndarray:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        return model(torch.tensor([token_ids])).last_hidden_state[0].numpy()

    return states


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("family", ["qwen3", "llama", "opt-350m", "gemma2"])
def test_embeddings_are_the_hidden_states_of_the_last_tokens(tiny_model, hidden, family):
    folder = tiny_model(family)
    with engine(folder, runner="pooling") as llm:
        ids = [llm.get_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
        expected = np.stack([hidden(folder, one)[-1] for one in ids])
        outputs = llm.embed(PROMPTS, use_tqdm=False)
        np.testing.assert_allclose([one.outputs.embedding for one in outputs], unit(expected), **CLOSE)
        again = llm.embed(PROMPTS, use_tqdm=False, pooling_params=PoolingParams(use_activation=False))
        np.testing.assert_allclose([one.outputs.embedding for one in again], expected, **CLOSE)
        assert [one.prompt_token_ids for one in outputs] == ids
        assert all(one.num_cached_tokens >= 4 for one in again[:-1]), "the prefix was not found"
        counters = llm.stats().counters
        assert counters.num_chunked_prefills and not counters.num_output_tokens
        llm.llm_engine.check_integrity()


def test_dimensions_are_cut_before_the_embedding_is_normalised(tiny_model):
    with engine(tiny_model("llama"), task="embed", pooler_config={"dimensions": 16}) as llm:
        whole = vectors(
            llm.encode(PROMPTS, PoolingParams(task="embed", normalize=False, dimensions=64), use_tqdm=False)
        )
        eight = vectors(llm.encode(PROMPTS, PoolingParams(dimensions=8), pooling_task="embed", use_tqdm=False))
        sixteen = vectors(llm.encode(PROMPTS, pooling_task="embed", use_tqdm=False))
        np.testing.assert_allclose(eight, unit(whole[:, :8]), **CLOSE)
        np.testing.assert_allclose(sixteen, unit(whole[:, :16]), **CLOSE)
        each = [PoolingParams(dimensions=i + 1) for i in range(len(PROMPTS))]
        assert [one.outputs.hidden_size for one in llm.embed(PROMPTS, pooling_params=each, use_tqdm=False)] == [
            *range(1, len(PROMPTS) + 1)
        ]


def test_the_mean_is_summed_over_chunks_and_never_read_from_the_cache(tiny_model, hidden, tmp_path):
    folder = tiny_model("qwen3")
    with engine(folder, runner="pooling", pooler_config={"pooling_type": "mean"}) as llm:
        ids = [llm.get_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
        expected = unit(np.stack([hidden(folder, one).mean(0) for one in ids]))
        for _ in range(2):
            outputs = llm.encode(PROMPTS, pooling_task="embed", use_tqdm=False)
            np.testing.assert_allclose(vectors(outputs), expected, **CLOSE)
            assert not any(one.num_cached_tokens for one in outputs)


@pytest.mark.parametrize("config", [{}, {"pooling_type": "MEAN"}], ids=["last", "mean"])
def test_a_step_that_fails_once_changes_no_vector(tiny_model, config, monkeypatch):
    prompts = [[5 + i, 6, 7] * 12 for i in range(4)]
    with engine(tiny_model("qwen3"), runner="pooling", pooler_config=config) as llm:
        expected = vectors(llm.encode(prompts, pooling_task="embed", use_tqdm=False))
        llm.reset_prefix_cache()
        execute, num_steps = llm.llm_engine.executor.execute, 0

        def fails_in_the_middle(plan):
            nonlocal num_steps
            num_steps += 1
            step = execute(plan)
            if num_steps == 3:
                raise RuntimeError("a step that ran, and was lost")
            return step

        monkeypatch.setattr(llm.llm_engine.executor, "execute", fails_in_the_middle)
        got = vectors(llm.encode(prompts, pooling_task="embed", use_tqdm=False))
        np.testing.assert_allclose(got, expected, **CLOSE)
        llm.llm_engine.check_integrity()


@pytest.mark.parametrize(("family", "num_labels"), [("qwen3", 3), ("llama", 1), ("opt", 2), ("gemma2", 3), ("gpt2", 2)])
def test_classes_are_those_of_hugging_face(tmp_path, family, num_labels):
    folder = tiny_classifier(tmp_path, family, num_labels=num_labels)
    with engine(folder) as llm, torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        ids = [llm.get_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
        logits = torch.cat([model(torch.tensor([one])).logits for one in ids])
        raw = llm.classify(PROMPTS, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        np.testing.assert_allclose([one.outputs.probs for one in raw], logits.numpy(), **CLOSE)
        expected = logits.softmax(-1) if num_labels > 1 else logits.sigmoid()
        outputs = llm.classify(PROMPTS, use_tqdm=False)
        np.testing.assert_allclose([one.outputs.probs for one in outputs], expected.numpy(), **CLOSE)
        assert outputs[0].outputs.num_classes == num_labels and expected.std(0).min() > 0.01


def test_classes_of_which_each_may_be_true(tmp_path):
    folder = tiny_classifier(tmp_path, "llama", num_labels=3, problem_type="multi_label_classification")
    with engine(folder) as llm:
        logits = vectors(
            llm.encode(PROMPTS, PoolingParams(use_activation=False), pooling_task="classify", use_tqdm=False)
        )
        got = vectors(llm.encode(PROMPTS, pooling_task="classify", use_tqdm=False))
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits)), **CLOSE)


def test_a_score_is_a_cosine_or_a_class(tiny_model, tmp_path):
    with engine(tiny_model("llama"), runner="pooling") as llm:
        embeddings = vectors(llm.encode(PROMPTS, pooling_task="embed", use_tqdm=False))
        scores = [one.outputs.score for one in llm.score(PROMPTS[0], PROMPTS, use_tqdm=False)]
        np.testing.assert_allclose(scores, embeddings @ embeddings[0], **CLOSE)
        assert [one.outputs.score for one in llm.score(PROMPTS, PROMPTS, use_tqdm=False)] == pytest.approx([1.0] * 5)
        with pytest.raises(ConfigError, match="got 2 and 3"):
            llm.score(["a", "b"], ["a", "b", "c"])
    with engine(tiny_classifier(tmp_path / "one", "llama", num_labels=1)) as llm:
        (score,) = llm.score("a mill", "a wheel", use_tqdm=False)
        both = llm.get_tokenizer()("a mill", "a wheel")["input_ids"]
        (same,) = llm.classify([both], use_tqdm=False)
        assert score.prompt_token_ids == both and [score.outputs.score] == same.outputs.probs
        scores = llm.score("a mill", ["\ud800", "a wheel"], use_tqdm=False, on_error="return")
        assert "valid Unicode" in scores[0].error.message and scores[1].outputs == score.outputs
        with pytest.raises(ConfigError, match="score knows its task; leave pooling_task out"):
            llm.score("a", "b", pooling_task="classify")
        for wrong in (np.array([1, 2]), object(), torch.ones(2)):
            with pytest.raises((ConfigError, PoolingParamsError), match="param"):
                llm.classify(["a", "b"], pooling_params=wrong)
            with pytest.raises(PoolingParamsError, match="task"):
                llm.encode(["a", "b"], pooling_task=wrong)
    two = tiny_classifier(tmp_path / "two", "llama", num_labels=2)
    with engine(two) as llm, pytest.raises(ConfigError, match="of one class; this one has 2"):
        llm.score("a", "b")


def test_what_an_engine_does_follows_from_the_model_and_the_settings(tiny_model, tmp_path):
    bare = tiny_checkpoint(tmp_path / "bare", "qwen3", architectures=["Qwen3Model"])
    with engine(bare) as llm:
        assert llm.embed("a", use_tqdm=False)[0].outputs.hidden_size == 64
    classifier = tiny_classifier(tmp_path / "classifier", "llama", num_labels=2)
    with engine(classifier, task="embed") as llm:
        assert llm.embed("a", use_tqdm=False)[0].outputs.hidden_size == 64
        with pytest.raises(PoolingParamsError, match="task='classify', but this engine does 'embed'"):
            llm.classify("a", use_tqdm=False)
    with pytest.raises(ConfigError, match=r"needs a checkpoint of an architecture \*ForCausalLM"):
        engine(classifier, runner="generate")
    with pytest.raises(ConfigError, match=r"task='classify' needs .* \*ForSequenceClassification"):
        engine(tiny_model("llama"), convert="classify")
    with pytest.raises(UnsupportedModelError, match=r"WhisperModel.* cannot be made .*supported are .*Llama"):
        engine(tiny_checkpoint(tmp_path / "other", "llama", architectures=["WhisperModel"]), runner="pooling")


def test_generating_and_pooling_do_not_mix(llm, tiny_model):
    with pytest.raises(ConfigError, match="runner='pooling'"):
        llm.embed("a", use_tqdm=False)
    with engine(tiny_model("llama"), runner="pooling") as pooling:
        with pytest.raises(ConfigError, match="runner='generate'"):
            pooling.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
        with pytest.raises(PoolingParamsError, match="pooling_task is missing"):
            pooling.encode("a", use_tqdm=False)


def test_a_bad_prompt_is_one_output_with_an_error(tiny_model):
    with engine(tiny_model("llama"), runner="pooling", max_model_len=32) as llm:
        prompts = ["good", "", [9999], [7] * 32, [7] * 33]
        outputs = llm.embed(prompts, use_tqdm=False, on_error="return")
        kinds = [one.error and one.error.kind for one in outputs]
        assert kinds == [None, "EmptyPromptError", "TokenOutOfVocabularyError", None, "PromptTooLongError"]
        assert outputs[1].outputs is None and pickle.loads(pickle.dumps(outputs[0])).outputs == outputs[0].outputs
        scores = llm.score("good", ["good", ""], use_tqdm=False, on_error="return")
        assert [one.error is None for one in scores] == [True, False]


def test_prompts_of_one_request_come_back_together(tiny_model):
    with engine(tiny_model("llama"), runner="pooling") as llm:
        first, second, third = vectors(llm.encode(["a mill", [5, 6, 7], "a"], pooling_task="embed", use_tqdm=False))
        ids = llm.get_tokenizer()("a mill")["input_ids"]

        def run(*more):
            llm.llm_engine.add_request(PoolingRequest("r", "a mill", None, PoolingParams(), more_prompts=more))
            while llm.llm_engine.has_unfinished_requests():
                outputs = llm.llm_engine.step()
            llm.llm_engine.check_integrity()
            return outputs

        (output,) = run([5, 6, 7], "a")
        np.testing.assert_allclose(output.outputs.data, np.stack([first, second, third]), **CLOSE)
        assert output.prompt_token_ids[: len(ids) + 3] == [*ids, 5, 6, 7]
        with pytest.raises(TokenOutOfVocabularyError):
            run([9999])
        with torch.inference_mode():
            llm.llm_engine.executor._runner.model.embed_tokens.weight[77] = float("nan")
        (output,) = run([5, 77], [6, 7])
        assert output.error.kind == "NumericalError" and output.outputs is None


def test_a_hidden_state_that_is_no_number_fails_its_row_only(tiny_model):
    with engine(tiny_model("llama"), runner="pooling") as llm:
        table = llm.llm_engine.executor._runner.model.embed_tokens.weight
        with torch.inference_mode():
            table[77] = float("nan")
        outputs = llm.embed([[5, 6], [5, 77]], use_tqdm=False, on_error="return")
        assert [one.error and one.error.kind for one in outputs] == [None, "NumericalError"]
        llm.llm_engine.check_integrity()


KINDS = (("", "Transformer"), ("1_Pooling", "Pooling"))


def sentence_transformer(folder: Path, pooling: dict, more=(), **files) -> Path:
    """Adds the files of sentence-transformers to a model's folder: its modules, their configs, and further files."""
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in (*KINDS, *more)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda rows: rows.mean(0)),
        ({"pooling_mode": "mean", "pooling_mode_mean_tokens": False}, lambda rows: rows.mean(0)),
        ({"pooling_mode": "lasttoken"}, lambda rows: rows[-1]),
        ({"pooling_mode": "cls"}, lambda rows: rows[0]),
        ({"pooling_mode": "max"}, lambda rows: rows.max(0)),
        ({}, lambda rows: rows.mean(0)),
    ],
)
def test_the_folder_of_a_sentence_transformer_says_how_to_pool(tmp_path, hidden, pooling, pooled):
    folder = sentence_transformer(tiny_checkpoint(tmp_path, "llama"), pooling)
    ids = list(range(5, 45))
    with engine(folder, runner="pooling") as llm:
        (got,) = llm.embed([ids], use_tqdm=False)
    np.testing.assert_allclose(got.outputs.embedding, pooled(hidden(folder, ids)), **CLOSE)


def test_settings_of_the_engine_replace_those_of_the_folder(tmp_path, hidden):
    folder = sentence_transformer(tiny_checkpoint(tmp_path, "llama"), {"pooling_mode": "mean"})
    with engine(folder, runner="pooling", pooler_config={"pooling_type": "LAST", "normalize": True}) as llm:
        (got,) = llm.embed([[5, 6, 7]], use_tqdm=False)
        np.testing.assert_allclose(got.outputs.embedding, unit(hidden(folder, [5, 6, 7])[-1]), **CLOSE)


def test_linear_layers_after_the_pooling_are_applied_in_order(tmp_path, hidden):
    more = [("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    folder = sentence_transformer(tiny_checkpoint(tmp_path, "llama"), {"pooling_mode": "mean"}, more)
    layer = torch.nn.Linear(64, 24)
    (folder / "2_Dense").mkdir()
    config = {"in_features": 64, "out_features": 24, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    weights = {f"linear.{name}": tensor.detach() for name, tensor in layer.named_parameters()}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    with engine(folder, runner="pooling") as llm:
        (got,) = llm.embed([[5, 6, 7]], use_tqdm=False)
        with pytest.raises(PoolingParamsError, match="embeddings have 24"):
            llm.embed([[5]], pooling_params=PoolingParams(dimensions=25), use_tqdm=False)
    with torch.inference_mode():
        expected = torch.tanh(layer(torch.from_numpy(hidden(folder, [5, 6, 7]).mean(0)))).numpy()
    np.testing.assert_allclose(got.outputs.embedding, unit(expected), **CLOSE)
    config["activation_function"] = "os.system"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="activation_function is 'system'"):
        engine(folder, runner="pooling")


def test_the_default_prompt_precedes_texts_and_long_texts_are_cut(tmp_path):
    folder = sentence_transformer(
        tiny_checkpoint(tmp_path, "llama"),
        {"pooling_mode": "lasttoken"},
        config_sentence_transformers={"prompts": {"query": "query: "}, "default_prompt_name": "query"},
        sentence_bert_config={"max_seq_length": 12},
    )
    with engine(folder, runner="pooling") as llm:
        whole = llm.get_tokenizer()("query: x")["input_ids"]
        short, long, given = llm.embed(["x", PREFIX * 9, [5] * 20], use_tqdm=False)
    assert short.prompt_token_ids == whole and short.prompt == "x"
    assert len(long.prompt_token_ids) == 12 and len(given.prompt_token_ids) == 20


@pytest.mark.parametrize(
    ("pooling", "more", "files", "message"),
    [
        ({"pooling_mode": ["cls", "min"]}, [], {}, "pooled by cls and min; implemented are cls, max, mean, mean_sqrt_"),
        ({"pooling_mode": 3}, [], {}, "pooled by 3"),
        ({"pooling_mode_mean_tokens": False}, [], {}, "pooled by no mode, all are off"),
        ([], [], {}, "must hold a.* object"),
        ({}, [("2", "CNN")], {}, "names the module 'CNN'"),
        ({}, [("2", "LayerNorm")], {}, "weights of .*2 cannot be read"),
        ({}, [("", "LayerNorm")], {}, "the path of LayerNorm must name its own folder"),
        ({}, [("2", "WeightedLayerPooling")], {}, "names the module 'WeightedLayerPooling'"),
        ({}, [("../2", "Dense")], {}, "must lie in the folder"),
        ({}, [("2", "Dense")], {}, "2, which modules.json names, has no config.json"),
        ({}, [("", "Dense")], {}, "the path of Dense must name its own folder"),
        ({}, [], {"sentence_roberta_config": {"max_seq_length": 10**30}}, "max_seq_length must be an integer"),
        ({}, [], {"sentence_bert_config": {"max_seq_length": "12"}}, "max_seq_length must be an integer"),
        ({}, [], {"sentence_bert_config": {"do_lower_case": 1}}, "do_lower_case must be true or false"),
        ({}, [], {"config_sentence_transformers": {"similarity_fn_name": "tanimoto"}}, "implemented are cosine, dot,"),
        ({}, [], {"config_sentence_transformers": {"prompts": ["q"]}}, "prompts must map names to texts"),
        ({}, [], {"config_sentence_transformers": {"default_prompt_name": "q"}}, "default_prompt_name is 'q'"),
        ({}, [], {"modules": {"0": 1}}, "must hold a list of modules"),
    ],
)
def test_what_a_sentence_transformer_asks_for_is_done_or_refused_by_name(tmp_path, pooling, more, files, message):
    folder = sentence_transformer(tiny_checkpoint(tmp_path, "llama"), pooling, more, **files)
    with pytest.raises(CheckpointError, match=message):
        engine(folder, runner="pooling")


def test_a_pooling_module_without_its_config_is_refused(tmp_path):
    folder = sentence_transformer(tiny_checkpoint(tmp_path, "llama"), {"pooling_mode": "cls"})
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling, which modules.json names, has no config.json"):
        read_sentence_transformer(Location.at(folder), 64)


@pytest.mark.parametrize("place", ["sentence_roberta_config.json", "0_T/sentence_bert_config.json"])
def test_the_length_limit_of_the_transformer_module_is_found(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text('{"max_seq_length": 7}')
    (tmp_path / "modules.json").write_text('[{"type": "a.Transformer", "path": "0_T"}]')
    assert read_text_settings(Location.at(tmp_path)).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, identity),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, sigmoid),
        ({"sentence_transformers": {"version": "5"}, "problem_type": "regression"}, identity),
        ({}, softmax),
    ],
)
def test_the_activation_of_a_cross_encoder_is_that_of_its_config(fields, activation):
    assert class_activation(SimpleNamespace(**fields), 3) is activation


def test_an_unknown_activation_of_a_cross_encoder_is_refused():
    config = SimpleNamespace(sentence_transformers={"activation_fn": "torch.nn.modules.activation.ReLU"})
    with pytest.raises(UnsupportedModelError, match="implemented are Identity, Sigmoid, Softmax, Tanh"):
        class_activation(config, 1)


def test_a_vector_that_a_later_layer_spoils_is_an_error_of_its_row(tiny_model, monkeypatch):
    with engine(tiny_model("llama"), runner="pooling") as llm:
        monkeypatch.setattr(Pooler, "finish", lambda self, vector, params: vector * np.float32("inf"))
        (output,) = llm.embed([[5, 6]], use_tqdm=False, on_error="return")
        assert output.error.kind == "NumericalError"
    assert np.linalg.norm(normalize(np.full(4, 1e38, np.float32))) == pytest.approx(1)


WRONG_SETTINGS = [
    ({"runner": "draft"}, "runner must be one of auto, generate, pooling"),
    ({"runner": "generate", "task": "embed"}, "exclude each other"),
    ({"runner": "pooling", "pooler_config": {"pooling_type": "MIN"}}, "can be CLS, MAX, MEAN, MEAN_SQRT_LEN, WEIGHTED"),
    ({"runner": "pooling", "pooler_config": {"pooling_type": ["ALL", "STEP"]}}, "is for tokens; keep one"),
    ({"runner": "pooling", "pooler_config": {"pooling_type": ["MEAN", "ALL"]}}, "is for tokens; keep one"),
    ({"runner": "pooling", "pooler_config": {"tok_pooling_type": "MEAN"}}, "tok_pooling_type='MEAN' is not there"),
    (
        {"runner": "pooling", "pooler_config": {"pooling_type": "CLS", "seq_pooling_type": "MAX"}},
        "differ; they are one",
    ),
    ({"runner": "pooling", "pooler_config": {"task": "classify"}}, "task='classify', but this engine does 'embed'"),
    ({"runner": "pooling", "pooler_config": {"returned_token_ids": [0]}}, "classes of a classifier"),
    ({"runner": "pooling", "pooler_config": {"max_embed_len": 9}}, "needs enable_chunked_processing"),
    ({"runner": "pooling", "pooler_config": {"enable_chunked_processing": True}}, "'MEAN'; this engine has LAST"),
    ({"runner": "pooling", "pooler_config": {"logit_sigma": 0}}, "must not be 0"),
    ({"runner": "pooling", "pooler_config": {"logit_mean": 1.0}}, "are for the logits of classes"),
    ({"runner": "pooling", "pooler_config": {"logit_mean": float("nan")}}, "logit_mean must be a finite number"),
    ({"runner": "pooling", "pooler_config": {"pooling_typ": "LAST"}}, "did you mean 'pooling_type'"),
    ({"runner": "pooling", "pooler_config": {"dimensions": 65}}, "embeddings have 64"),
    ({"task": "generate", "pooler_config": {"pooling_type": "LAST"}}, "for engines that pool"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_SETTINGS)
def test_a_wrong_setting_of_pooling_is_named(tiny_model, values, message):
    with pytest.raises(ConfigError, match=message):
        engine(tiny_model("llama"), **values)


WRONG_PARAMS = [
    ({"task": "encode"}, "task must be one of 'embed', 'token_embed', 'classify', 'token_classify'"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be an integer of at least 1, or -1"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be an integer of at least -1"),
    ({"step_tag_id": -1}, "step_tag_id must be an integer of at least 0"),
    ({"returned_token_ids": []}, "returned_token_ids must be a list of integers"),
    ({"returned_token_ids": [0, True]}, "returned_token_ids must be an integer of at least 0"),
    ({"requires_token_ids": "yes"}, "requires_token_ids must be True, False or None"),
    ({"softmax": True, "activation": False}, "two names of one thing"),
    ({"dimensions": 0}, "dimensions must be an integer of at least 1"),
    ({"dimensions": float("nan")}, "dimensions must be an integer"),
    ({"normalize": 1}, "normalize must be True, False or None"),
    ({"normalize": True, "use_activation": False}, "normalize and use_activation differ; they are two names of one"),
    ({"dimension": 3}, "did you mean 'dimensions'"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_PARAMS)
def test_wrong_pooling_params_are_named(values, message):
    with pytest.raises(PoolingParamsError, match=message):
        PoolingParams.from_dict(values)
