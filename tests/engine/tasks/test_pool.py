"""What a pooling request may ask for: lengths that prompts are cut to, long prompts in parts, tasks, step tags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel

from checkpoints import tiny_checkpoint, tiny_classifier
from millrace.engine import LLM, PoolingParams, PoolingRequest
from millrace.engine.errors import ConfigError, PoolingParamsError
from millrace.engine.pooling.config import PoolerConfig

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = "The mill wheel turns as long as water comes down the race. " * 3
SETTINGS = {"dtype": "float32", "runner": "pooling", "max_num_batched_tokens": 16, "block_size": 4}


def data(outputs) -> np.ndarray:
    return np.stack([output.outputs.data for output in outputs])


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A model whose tokenizer puts special tokens at both edges of a text."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("ended"), "llama")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [tokenizer.bos_token, tokenizer.eos_token]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{names[0]} $A {names[1]}",
        special_tokens=list(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True)),
    )
    tokenizer.save_pretrained(folder)
    with LLM(str(folder), max_model_len=32, **SETTINGS) as llm:
        yield llm


def test_long_prompts_are_cut_as_the_tokenizer_cuts_texts(ended):
    hf = ended.get_tokenizer()
    whole = hf(TEXT)["input_ids"]
    assert len(whole) > 32 and whole[0] == hf.bos_token_id and whole[-1] == hf.eos_token_id
    for cut, size in ((7, 7), (-1, 32), (2, 2), (3, 3)):
        expected = hf(TEXT, truncation=True, max_length=size)["input_ids"]
        outputs = ended.embed([TEXT, whole], pooling_params=PoolingParams(truncate_prompt_tokens=cut), use_tqdm=False)
        assert [one.prompt_token_ids for one in outputs] == [expected] * 2
    for arguments in (
        {"truncate_prompt_tokens": 7},
        {"tokenization_kwargs": {"truncate_prompt_tokens": 7}},
        {"tokenization_kwargs": {"truncation": True, "max_length": 7}},
    ):
        (output,) = ended.embed([5] * 9, use_tqdm=False, **arguments)
        assert output.prompt_token_ids == [5] * 7, "tokens without special ones are cut at the end"
    ended.llm_engine.add_request(PoolingRequest("r", TEXT, None, PoolingParams(truncate_prompt_tokens=7)))
    (output,) = [one for _ in range(9) if ended.llm_engine.has_unfinished_requests() for one in ended.llm_engine.step()]
    assert output.prompt_token_ids == hf(TEXT, truncation=True, max_length=7)["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, PoolingParamsError, "no"),
        ({"truncate_prompt_tokens": 33}, PoolingParamsError, "more than max_model_len=32"),
        ({"truncate_prompt_tokens": "x"}, PoolingParamsError, "truncate_prompt_tokens must be an integer"),
        ({"tokenization_kwargs": {"padding": True}}, ConfigError, "implemented are truncate_prompt_tokens"),
        ({"tokenization_kwargs": {"max_length": 3}}, ConfigError, "truncation=True with max_length"),
        ({"pooling_params": PoolingParams(step_tag_id=3)}, PoolingParamsError, "step_tag_id is for task='token_embed'"),
        ({"pooling_params": PoolingParams(task="token_embed")}, PoolingParamsError, "differ; keep one of the two"),
        ({"pooling_params": PoolingParams(returned_token_ids=[1])}, PoolingParamsError, "returned_token_ids is for"),
    ],
)
def test_what_a_request_cannot_have_is_named(ended, arguments, kind, message):
    if not arguments:
        with pytest.raises(PoolingParamsError, match="one prompt; make a request of each"):
            ended.llm_engine.add_request(
                PoolingRequest("r", "a", None, PoolingParams(task="token_embed"), more_prompts=["b"])
            )
        return
    with pytest.raises(kind, match=message):
        ended.embed("a", use_tqdm=False, **arguments)


def test_long_prompts_are_run_in_parts_whose_mean_is_taken(tiny_model):
    folder, ids = tiny_model("qwen3"), [5 + i % 90 for i in range(75)]
    config = {"pooling_type": "MEAN", "enable_chunked_processing": True, "max_embed_len": 75}
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        parts = [model(torch.tensor([ids[start : start + 32]])).last_hidden_state[0] for start in (0, 32, 64)]
    expected = torch.nn.functional.normalize(torch.cat(parts).mean(0), dim=-1)
    with LLM(str(folder), max_model_len=32, pooler_config=config, **SETTINGS) as llm:
        outputs = llm.embed([ids, ids[:5], [*ids, 9]], use_tqdm=False, on_error="return")
        np.testing.assert_allclose(outputs[0].outputs.embedding, expected, **CLOSE)
        assert outputs[0].prompt_token_ids == ids and outputs[1].error is None
        assert outputs[2].error.kind == "PromptTooLongError" and "max_embed_len=75" in outputs[2].error.message
        llm.llm_engine.add_request(PoolingRequest("r", None, ids[:5], PoolingParams(), more_prompts=[ids]))
        both = [one for _ in range(20) if llm.llm_engine.has_unfinished_requests() for one in llm.llm_engine.step()]
        np.testing.assert_allclose(both[0].outputs.data[1], expected, **CLOSE)
        (tokens,) = llm.encode([ids], pooling_task="token_embed", use_tqdm=False, on_error="return")
        assert tokens.error.kind == "PromptTooLongError", "vectors of tokens are not made of parts"
        llm.llm_engine.check_integrity()


def test_older_names_are_taken_with_a_warning(tiny_model):
    with pytest.warns(FutureWarning, match="softmax is an older name; use use_activation=False"):
        assert PoolingParams(softmax=False) == PoolingParams(use_activation=False)
    with pytest.warns(FutureWarning, match="pooler_config: activation is an older name"):
        config = PoolerConfig.read({"activation": False})
    with LLM(str(tiny_model("llama")), pooler_config=config, **SETTINGS) as llm:
        (output,) = llm.embed([[5, 6]], use_tqdm=False)
        assert abs(np.linalg.norm(output.outputs.embedding) - 1) > 0.01


def test_a_classifier_of_steps_needs_the_tag_and_knows_its_classes(tmp_path):
    folder = str(tiny_classifier(tmp_path, "llama", num_labels=2))
    with LLM(folder, pooler_config={"pooling_type": "STEP"}, **SETTINGS) as llm:
        with pytest.raises(PoolingParamsError, match="needs the step tag; set step_tag_id"):
            llm.reward([[5, 6]], use_tqdm=False)
        params = PoolingParams(step_tag_id=6, returned_token_ids=[2])
        with pytest.raises(PoolingParamsError, match="holds 2, and the model has 2 classes"):
            llm.reward([[5, 6]], pooling_params=params, use_tqdm=False)
        params = PoolingParams(step_tag_id=6, returned_token_ids=[0])
        assert data(llm.reward([[5, 6, 7]], pooling_params=params, use_tqdm=False)).shape == (1, 1, 1)
    with pytest.raises(ConfigError, match="has no mean"):
        LLM(folder, pooler_config={"enable_chunked_processing": True}, **SETTINGS)
