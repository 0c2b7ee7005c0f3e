"""`LLM.score` against Hugging Face: similarities of embeddings, MaxSim, classifiers of pairs, rows of output heads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from checkpoints import tiny_checkpoint, tiny_classifier, tiny_tokenizer
from encoders import tiny_encoder
from millrace.engine import LLM, PoolingParams, PoolingRequest
from millrace.engine.errors import (
    CheckpointError,
    ConfigError,
    PromptTypeError,
    UnsupportedModelError,
)
from millrace.engine.inputs import ParsedPrompt
from millrace.engine.pooling.outputs import PoolingOutput, PoolingRequestOutput
from millrace.engine.pooling.scoring import EmbeddingScoring, LateScoring, find_similarity, pair_up

QUERY = "Where does the water go?"
DOCUMENTS = ["The mill wheel turns as long as water comes down the race.", "Rows stream in.", "x", "Größe, 水車", QUERY]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
RAW = PoolingParams(use_activation=False)


def engine(folder: Path, **kwargs) -> LLM:
    return LLM(str(folder), dtype="float32", **{"max_num_batched_tokens": 32, "block_size": 4, "seed": 0, **kwargs})


def scores(llm: LLM, *data, **kwargs) -> list[float]:
    return [one.outputs.score for one in llm.score(*data, use_tqdm=False, **kwargs)]


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> Path:
    """Returns the folder of a classifier of one class, whose tokenizer has separators for pairs, and token types."""
    folder = tiny_classifier(tmp_path_factory.mktemp("cross"), "llama", num_labels=1)
    hf = tiny_tokenizer()
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    hf.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@torch.inference_mode()
def class_logits(folder: Path, *token_ids: list[int]) -> list[float]:
    """Returns the logit of the one class for each prompt, by Hugging Face."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in token_ids]


def test_embeddings_are_compared_and_a_text_of_many_pairs_runs_once(tiny_model):
    with engine(tiny_model("llama"), runner="pooling") as llm:
        embeddings = np.array([one.outputs.embedding for one in llm.embed([QUERY, *DOCUMENTS], use_tqdm=False)])
        before = llm.stats().counters.num_prompt_tokens
        outputs = llm.score(QUERY, DOCUMENTS, use_tqdm=False)
        lengths = [len(llm.get_tokenizer()(text)["input_ids"]) for text in DOCUMENTS]
        assert llm.stats().counters.num_prompt_tokens - before == sum(lengths), "the query is the last document too"
        np.testing.assert_allclose([one.outputs.score for one in outputs], embeddings[1:] @ embeddings[0], **CLOSE)
        assert outputs[1].prompt_token_ids == [*outputs[4].prompt_token_ids[: lengths[4]], *ids(llm, DOCUMENTS[1])]
        assert len({one.request_id for one in outputs}) == len(outputs)
        with pytest.raises(ConfigError, match="reads each by itself"):
            llm.score(QUERY, DOCUMENTS, chat_template="{{ messages }}")


def ids(llm: LLM, text: str) -> list[int]:
    return llm.get_tokenizer()(text)["input_ids"]


def test_the_folder_of_a_sentence_transformer_says_how_embeddings_are_compared(tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama")
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    (folder / "1_Pooling").mkdir()
    for name, content in (
        ("modules", modules),
        ("1_Pooling/config", {"pooling_mode": "mean"}),
        ("config_sentence_transformers", {"similarity_fn_name": "manhattan"}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    with engine(folder, runner="pooling") as llm:
        query, *documents = (np.array(one.outputs.embedding) for one in llm.embed([QUERY, *DOCUMENTS], use_tqdm=False))
        distances = [-np.abs(query - document).sum() for document in documents]
        np.testing.assert_allclose(scores(llm, QUERY, DOCUMENTS), distances, rtol=1e-4, atol=1e-3)


def test_sides_are_texts_contents_or_tokens(tiny_model):
    with engine(tiny_model("llama"), runner="pooling") as llm:
        content = {"content": [{"type": "text", "text": "Where does"}, {"type": "text", "text": "it go?"}]}
        (expected,) = scores(llm, "Where does\nit go?", "x")
        sides = [content, {"content": "Where does\nit go?"}, {"prompt": "Where does\nit go?"}]
        sides += [ids(llm, "Where does\nit go?"), np.array(ids(llm, "Where does\nit go?"))]
        for side in sides:
            assert scores(llm, side, "x") == scores(llm, [side], ["x"]) == [pytest.approx(expected)]
        assert scores(llm, [*sides, "x"], ["x"] * 6) == pytest.approx([*[expected] * 5, 1.0])
        wrong = [5, None, {"content": [{"type": "image_url"}]}, {"content": None}, {"content": "x", "role": "user"}, ""]
        outputs = llm.score("x", ["x", *wrong], use_tqdm=False, on_error="return")
        assert [one.error and one.error.kind for one in outputs] == [None, *["PromptTypeError"] * 5, "EmptyPromptError"]
        assert llm.score("x", []) == [] and outputs[0].outputs.score == pytest.approx(1.0)
        for one in (5, {"content": "x", "role": "user"}):
            with pytest.raises(PromptTypeError):
                llm.score(one, "x", use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        (None, lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        ("cosine", lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        ("dot", lambda a, b: a @ b),
        ("euclidean", lambda a, b: -np.sqrt(((a - b) ** 2).sum())),
        ("manhattan", lambda a, b: -np.abs(a - b).sum()),
    ],
)
def test_a_similarity_is_that_of_sentence_transformers(name, formula):
    first, second = np.random.default_rng(0).normal(size=(2, 24))
    got = find_similarity(name)(first.astype(np.float32), second.astype(np.float32))
    assert got == pytest.approx(formula(first, second), rel=1e-5)
    with pytest.raises(CheckpointError, match="'jaccard'; it can be cosine, dot, euclidean, manhattan"):
        find_similarity("jaccard")


def pooled(index: int, data: np.ndarray) -> PoolingRequestOutput:
    return PoolingRequestOutput(str(index), PoolingOutput(data), [index] * len(data))


def test_late_interaction_adds_up_the_best_match_of_each_token_of_the_query():
    draw = np.random.default_rng(0).normal
    query, *documents = (draw(size=(n, 8)).astype(np.float32) for n in (3, 5, 1, 9))
    scoring, pairs = LateScoring(), pair_up("q", ["a", "b", "c"])
    assert [prompt.text for prompt in scoring.prompts(pairs)] == ["q", "a", "b", "c"]
    # A pipeline reads the pairs of a row once more when their vectors come back.
    outputs = scoring.outputs(
        pair_up("q", ["a", "b", "c"]), [pooled(i, data) for i, data in enumerate([query, *documents])]
    )
    expected = [sum(max(float(q @ d) for d in document) for q in query) for document in documents]
    np.testing.assert_allclose([one.outputs.score for one in outputs], expected, rtol=1e-5)
    assert outputs[1].prompt_token_ids == [0, 0, 0, 2] and scoring.pooling_task == "token_embed"


def test_a_call_or_an_engine_compares_the_vectors_of_tokens(tiny_model):
    params = PoolingParams(task="token_embed")
    with engine(tiny_model("llama"), runner="pooling") as llm:
        query, *documents = (
            one.outputs.data for one in llm.encode([QUERY, *DOCUMENTS], pooling_task="token_embed", use_tqdm=False)
        )
        expected = [(query @ document.T).max(1).sum() for document in documents]
        np.testing.assert_allclose(scores(llm, QUERY, DOCUMENTS, pooling_params=params), expected, **CLOSE)
        assert expected[-1] == pytest.approx(len(query), abs=1e-4) and len(query) > len(expected)
        cosines = scores(llm, QUERY, DOCUMENTS)
        assert max(cosines) <= 1 + 1e-6
    with engine(tiny_model("llama"), task="token_embed") as llm:
        np.testing.assert_allclose(scores(llm, QUERY, DOCUMENTS), expected, **CLOSE)
        one_vector = PoolingParams(task="embed")
        np.testing.assert_allclose(scores(llm, QUERY, DOCUMENTS, pooling_params=one_vector), cosines, **CLOSE)


def test_adapters_keep_equal_texts_apart():
    scoring, pairs = EmbeddingScoring(), pair_up("q", ["a", "a"])
    pairs = [replace(pair, adapter=adapter) for pair, adapter in zip(pairs, ("one", "two"), strict=True)]
    prompts = [prompt.text for prompt in scoring.prompts(pairs)]
    runs = [("q", "one"), ("a", "one"), ("q", "two"), ("a", "two")]
    assert list(zip(prompts, scoring.adapters(pairs), strict=True)) == runs


def test_a_cross_encoder_reads_pairs_with_the_separators_of_the_tokenizer(cross_encoder):
    documents = [*DOCUMENTS, ""]
    hf = AutoTokenizer.from_pretrained(cross_encoder)
    token_ids = hf([QUERY] * 6, documents)["input_ids"]
    expected = class_logits(cross_encoder, *token_ids)
    with engine(cross_encoder) as llm:
        outputs = llm.score(QUERY, documents, pooling_params=RAW, use_tqdm=False)
        assert [one.prompt_token_ids for one in outputs] == token_ids
        np.testing.assert_allclose([one.outputs.score for one in outputs], expected, **CLOSE)
        np.testing.assert_allclose(scores(llm, QUERY, documents), 1 / (1 + np.exp(-np.array(expected))), **CLOSE)
        plain = [hf(text, add_special_tokens=False)["input_ids"] for text in (QUERY, documents[0])]
        assert scores(llm, *plain, pooling_params=RAW) == pytest.approx(expected[:1], abs=1e-4)
        assert scores(llm, [QUERY, "x"], [documents[0], ""], pooling_params=RAW) == pytest.approx(
            [expected[0], *class_logits(cross_encoder, hf(["x"], [""])["input_ids"][0])], abs=1e-4
        )


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "deberta-v2"])
def test_scores_are_those_of_sentence_transformers(tmp_path, cross_encoder, family):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tiny_encoder(tmp_path, family, "classes", num_labels=1, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cross_encoder / name, folder / name)
    # CrossEncoder renders a pair by the tokenizer's chat template if there is any; cross-encoders have none.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if family == "xlm-roberta":  # It has one type of tokens.
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    documents = [*DOCUMENTS, "", "the race " * 12]
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu").rank(QUERY, documents)
    with engine(folder) as llm:
        got = scores(llm, QUERY, documents)
    np.testing.assert_allclose(got, [one["score"] for one in sorted(theirs, key=lambda one: one["corpus_id"])], **CLOSE)


def test_token_types_reach_the_sequences_of_a_cross_encoder(cross_encoder, monkeypatch):
    with engine(cross_encoder) as llm:
        made, handler = [], llm.llm_engine.handler
        make_sequences = handler.make_sequences

        def noted(request: PoolingRequest):
            sequences = make_sequences(request)
            made.extend(sequences)
            return sequences

        monkeypatch.setattr(handler, "make_sequences", noted)
        llm.score(QUERY, ["x", ""], use_tqdm=False)
        hf = llm.get_tokenizer()
        types = hf([QUERY] * 2, ["x", ""], return_token_type_ids=True)["token_type_ids"]
        assert sorted(one.num_first_tokens for one in made) == [row.count(0) for row in types] and 1 in types[0]
        llm.classify("x", use_tqdm=False)
        assert made[-1].num_first_tokens is None
        llm.llm_engine.add_request(
            PoolingRequest("r", "x", None, RAW, more_prompts=[ParsedPrompt(None, [5, 6, 7], num_first_tokens=2)])
        )
        assert made[-1].num_first_tokens == 2


def test_a_faulty_pair_is_an_error_of_its_own(cross_encoder):
    with engine(cross_encoder, max_model_len=24) as llm:
        sides = ["x", "\ud800", 5, "word " * 40, {"prompt": "x", "cache_salt": "s"}, [5, 6], [9999]]
        outputs = llm.score("a", sides, use_tqdm=False, on_error="return")
        kinds = [one.error and one.error.kind for one in outputs]
        wrong = ["PromptTypeError"] * 2
        assert kinds == [None, *wrong, "PromptTooLongError", wrong[0], None, "TokenOutOfVocabularyError"]
        assert outputs[0].outputs.score == scores(llm, "a", "x")[0]
        with pytest.raises(PromptTypeError, match="valid Unicode"):
            llm.score("a", sides, use_tqdm=False)
        with pytest.raises(ConfigError, match="got 2 and 3"):
            llm.score(["a", "b"], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({"pooling_params": replace(RAW, truncate_prompt_tokens=-1)}, 24),
        ({"pooling_params": RAW, "truncate_prompt_tokens": 20}, 20),
        ({"pooling_params": RAW, "tokenization_kwargs": {"truncation": True, "max_length": 21}}, 21),
    ],
)
def test_long_pairs_are_cut_if_asked(cross_encoder, given, length):
    long = "Rows stream in, engines stay full. " * 4
    with engine(cross_encoder, max_model_len=24) as llm:
        cut = llm.get_tokenizer()([QUERY], [long], truncation="longest_first", max_length=length)["input_ids"][0]
        (output,) = llm.score(QUERY, long, use_tqdm=False, **given)
    assert output.prompt_token_ids == cut and len(cut) == length
    assert output.outputs.score == pytest.approx(*class_logits(cross_encoder, cut), abs=1e-4)


def test_a_cross_encoder_that_sentence_transformers_writes_has_its_limit_and_activation(tmp_path):
    from sentence_transformers import CrossEncoder

    folder = tiny_encoder(tmp_path / "plain", "bert", "classes", num_labels=1)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # They would render pairs with it.
    theirs = CrossEncoder(str(folder), device="cpu", max_length=30, activation_fn=torch.nn.Tanh())
    theirs.save_pretrained(str(tmp_path / "own"))
    pairs = [(QUERY, document) for document in (*DOCUMENTS, DOCUMENTS[0] * 9)]
    with engine(tmp_path / "own") as llm:
        outputs = llm.score(QUERY, [document for _, document in pairs], use_tqdm=False)
        assert len(outputs[-1].prompt_token_ids) == 30
        np.testing.assert_allclose([one.outputs.score for one in outputs], theirs.predict(pairs), **CLOSE)
        assert len(llm.classify(DOCUMENTS[0] * 9, use_tqdm=False)[0].prompt_token_ids) == 30
    settings = tmp_path / "own" / "config_sentence_transformers.json"
    prompt = {"prompts": {"find": "Find: "}, "default_prompt_name": "find"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | prompt))
    with pytest.raises(CheckpointError, match="default_prompt_name, a text in front of pairs"):
        engine(tmp_path / "own")


TEMPLATE = (
    "query: {{ (messages | selectattr('role', 'eq', 'query') | first).content }}\n"
    "document: {{ (messages | selectattr('role', 'eq', 'document') | first).content }}"
)


def test_a_chat_template_renders_a_pair(cross_encoder, tmp_path):
    (tmp_path / "pair.jinja").write_text(TEMPLATE)
    with engine(cross_encoder) as llm:
        text = f"query: {QUERY}\ndocument: x"
        expected = [pytest.approx(*class_logits(cross_encoder, ids(llm, text)), abs=1e-4)]
        for template in (TEMPLATE, str(tmp_path / "pair.jinja")):
            (output,) = llm.score(QUERY, "x", chat_template=template, pooling_params=RAW, use_tqdm=False)
            assert [output.outputs.score] == expected and output.prompt == text
        outputs = llm.score("a", [[5, 6], "x"], chat_template=TEMPLATE, use_tqdm=False, on_error="return")
        assert "takes texts" in outputs[0].error.message and outputs[1].error is None
    with engine(cross_encoder, chat_template=TEMPLATE) as llm:
        assert scores(llm, QUERY, "x", pooling_params=RAW) == expected
    with (
        engine(cross_encoder, skip_tokenizer_init=True) as llm,
        pytest.raises(ConfigError, match="needs a tokenizer to join"),
    ):
        llm.score("a", "b")


def reranker(family: str, tokens: list[str | int], **fields) -> dict:
    names = {"qwen3": "Qwen3", "llama": "Llama", "granite": "Granite", "gemma2": "Gemma2", "phi": "Phi"}
    architectures = [f"{names[family]}ForSequenceClassification"]
    return {"hf_overrides": {"architectures": architectures, "classifier_from_token": tokens, **fields}}


@torch.inference_mode()
def token_logits(folder: Path, token_ids: list[int], tokens: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([token_ids])).logits[0, -1, tokens].numpy()


NO, YES = "n", "y"


@pytest.mark.parametrize("family", ["qwen3", "llama", "granite"])
def test_two_rows_of_an_output_head_make_a_reranker(tiny_model, family):
    folder = tiny_model(family)
    hf = AutoTokenizer.from_pretrained(folder)
    no, yes = hf.convert_tokens_to_ids([NO, YES])
    text = f"<Query>: {QUERY}\n<Document>: {DOCUMENTS[0]}\nyes or no?"
    logits = token_logits(folder, hf(text)["input_ids"], [no, yes])
    expected = np.exp(logits[1]) / np.exp(logits).sum()
    with engine(folder, **reranker(family, [NO, yes], is_original_qwen3_reranker=True)) as llm:
        (output,) = llm.score(f"<Query>: {QUERY}\n", f"<Document>: {DOCUMENTS[0]}\nyes or no?", use_tqdm=False)
        assert output.outputs.score == pytest.approx(expected, abs=1e-4) and 0.001 < expected < 0.999
        assert output.prompt == text and output.prompt_token_ids == hf(text)["input_ids"]
        assert scores(llm, *([ord(c) for c in side] for side in ("a", "b"))) == scores(llm, [97], [98])
        assert "in one form" in llm.score("a", [[97]], use_tqdm=False, on_error="return")[0].error.message
    with engine(folder, **reranker(family, [YES, NO, yes], method="no_post_processing")) as llm:
        (each,) = llm.classify(text, pooling_params=RAW, use_tqdm=False)
        np.testing.assert_allclose(each.outputs.probs, logits[[1, 0, 1]], **CLOSE)
        with pytest.raises(ConfigError, match="classifier of one class; this one has 3"):
            llm.score("a", "b")


def test_a_reranker_of_one_row_with_separators_is_saved_and_loaded(tiny_model, tmp_path):
    folder = tiny_model("qwen3")
    fields = reranker("qwen3", [YES], method="no_post_processing", use_sep_token=True)
    with engine(folder, **fields) as llm:
        token_ids = llm.get_tokenizer()([QUERY], ["x"])["input_ids"][0]
        expected = token_logits(folder, token_ids, [llm.get_tokenizer().convert_tokens_to_ids(YES)])
        assert scores(llm, QUERY, "x", pooling_params=RAW) == pytest.approx(expected, abs=1e-4)
        llm.save_sharded_state(tmp_path)
    with engine(tmp_path, load_format="sharded_state", **fields) as llm:
        assert scores(llm, QUERY, "x", pooling_params=RAW) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": "yes"}, ConfigError, "must be a list of tokens; got 'yes'"),
        ({"tokens": []}, ConfigError, "must be a list of tokens"),
        ({"tokens": [True]}, ConfigError, "must be a list of tokens"),
        (
            {"tokens": [NO, YES]},
            ConfigError,
            "'method' is None; it can be 'from_2_way_softmax' .* 'no_post_processing'",
        ),
        ({"tokens": [YES], "method": "from_2_way_softmax"}, ConfigError, "takes two tokens"),
        ({"tokens": ["no such"], "method": "no_post_processing"}, ConfigError, "has no token 'no such'"),
        ({"tokens": [10**6], "method": "no_post_processing"}, ConfigError, "1000000 is no token of the model's 384"),
        ({"tokens": [-1], "method": "no_post_processing"}, ConfigError, "-1 is no token"),
        ({"tokens": [5], "method": "no_post_processing", "use_sep_token": 3}, UnsupportedModelError, "use_sep_token"),
    ],
)
def test_wrong_fields_of_a_reranker_are_named(tiny_model, fields, error, message):
    with pytest.raises(error, match=message):
        engine(tiny_model("llama"), **reranker("llama", **fields))


def test_what_cannot_become_a_reranker_is_refused(tiny_model, tmp_path):
    fields = {"classifier_from_token": [5], "method": "no_post_processing"}
    with pytest.raises(ConfigError, match=r"'LlamaForCausalLM', which is no classifier; name it with hf_overrides"):
        engine(tiny_model("llama"), hf_overrides=fields)
    for family, named in (("gemma2", "final_logit_softcapping"), ("phi", "lm_head.bias")):
        with pytest.raises(UnsupportedModelError, match=named):
            engine(tiny_model(family), **reranker(family, [5], method="no_post_processing"))
    bare = tiny_classifier(tmp_path, "llama", num_labels=1)
    with pytest.raises(CheckpointError, match=r"score.weight is a head for classes of its own"):
        engine(bare, **reranker("llama", [5], method="no_post_processing"))
    save_file(
        {name: each for name, each in load_file(bare / "model.safetensors").items() if name != "score.weight"},
        bare / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="has no lm_head, of whose rows"):
        engine(bare, **reranker("llama", [5], method="no_post_processing"))
