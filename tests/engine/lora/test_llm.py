"""`LLM` with adapters: each prompt runs with the adapter that it names, and a wrong adapter fails its prompts alone."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from adapters import make_adapter
from encoders import reference, tiny_encoder
from millrace.engine.errors import AdapterError, ConfigError, EngineDeadError, PromptError
from millrace.engine.llm import LLM
from millrace.engine.lora.request import LoRARequest
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1)
PROMPTS = ["Hello, my name is", "The sky", "One two three four five six seven", "Once upon a time"]

CHANGES: list[dict[str, Any]] = [
    {"rank": 4, "targets": ["q_proj", "v_proj"]},
    {"rank": 8, "alpha": 3.0, "use_rslora": True},
    {"rank": 1, "targets": ["down_proj"], "alpha": 20.0},
]
"""Ranks, targets and scales of the adapters."""


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def requests(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    """Requests of three adapters that differ in all that may differ."""
    made = tmp_path_factory.mktemp("adapters")
    paths = [make_adapter(made / str(i), folder, seed=i, **change) for i, change in enumerate(CHANGES)]
    return [LoRARequest(f"tune-{i}", i + 1, path) for i, path in enumerate(paths)]


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", max_num_seqs=8, enable_lora=True, max_loras=2, max_cpu_loras=3) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The engine, without adapters; a test must leave no request in it."""
    for number in shared_llm.list_loras():
        shared_llm.remove_lora(number)
    yield shared_llm
    assert not shared_llm.llm_engine.has_unfinished_requests()
    shared_llm.llm_engine.check_integrity()


def generate(llm: LLM, prompts: Any, lora_request: Any = None, **settings: Any) -> list[Any]:
    return llm.generate(prompts, PARAMS, use_tqdm=False, lora_request=lora_request, **settings)


def drawn(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@torch.inference_mode()
def run_peft(folder: Path, request: LoRARequest | None, token_ids: list[int]) -> Any:
    """Runs the model of transformers, with the adapter in it as PEFT puts it there."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = model if request is None else PeftModel.from_pretrained(model, request.path)
    return model.eval()(torch.tensor([token_ids]), output_hidden_states=True)


def test_prompts_with_adapters_and_without_are_mixed_and_each_gets_what_peft_computes(folder, llm, requests):
    each = [requests[0], None, requests[1], requests[2]]
    for request in requests:  # So that all prompts run in the same steps.
        llm.add_lora(request)
    for output, request in zip(generate(llm, PROMPTS, each), each, strict=True):
        assert output.lora_request == request
        token_ids, num_prompt = output.outputs[0].token_ids, len(output.prompt_token_ids)
        logits = run_peft(folder, request, output.prompt_token_ids + token_ids).logits
        expected = logits[0, num_prompt - 1 : -1].log_softmax(-1)
        assert token_ids == expected.argmax(-1).tolist()
        ours = [entry[token_id].logprob for entry, token_id in zip(output.outputs[0].logprobs, token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(ours), expected.amax(-1), atol=1e-4, rtol=0)


def test_one_adapter_is_for_all_prompts_and_none_is_for_none(llm, requests):
    alone = [drawn(generate(llm, prompt, requests[1]))[0] for prompt in PROMPTS]
    outputs = generate(llm, PROMPTS, requests[1])
    assert drawn(outputs) == alone
    assert [output.lora_request for output in pickle.loads(pickle.dumps(outputs))] == [requests[1]] * len(PROMPTS)
    plain = generate(llm, PROMPTS)
    assert drawn(plain) == drawn(generate(llm, PROMPTS, [None] * len(PROMPTS)))
    assert drawn(plain) != alone
    assert plain[0].lora_request is None


def test_conversations_take_adapters_and_the_tokenizer_of_the_model(llm, requests, tmp_path, caplog):
    adapter = Path(shutil.copytree(requests[0].path, tmp_path / "adapter"))
    (adapter / "chat_template.jinja").write_text("another {{ template }}", encoding="utf-8")
    (adapter / "added_tokens.json").write_text(json.dumps({"<|think|>": 300, "a": 5}), encoding="utf-8")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:2]]
    settings: dict[str, Any] = {"sampling_params": PARAMS, "use_tqdm": False}
    outputs = llm.chat(chats, lora_request=[None, LoRARequest("own template", 9, str(adapter))], **settings)
    plain = llm.chat(chats, **settings)
    assert [output.prompt for output in outputs] == [output.prompt for output in plain]
    assert drawn(outputs)[0] == drawn(plain)[0] and drawn(outputs)[1] != drawn(plain)[1]
    assert "the adapter 'own template' has a chat template of its own, which is not used" in caplog.text
    assert "lacks tokens that the adapter 'own template' has (1, such as '<|think|>')" in caplog.text


def test_an_adapter_with_the_tokenizer_of_the_model_or_with_damaged_files_runs(llm, folder, requests, tmp_path, caplog):
    for name in ("same", "damaged"):
        shutil.copytree(requests[0].path, tmp_path / name)
    template = llm.get_tokenizer().chat_template
    settings = {"chat_template": f"{template}\n", "added_tokens_decoder": {"3": {"content": "a"}}}
    (tmp_path / "same" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert llm.add_lora(LoRARequest("same", 4, str(tmp_path / "same")))
    assert not caplog.text
    (tmp_path / "damaged" / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert llm.add_lora(LoRARequest("damaged", 5, str(tmp_path / "damaged")))
    assert "files beside the adapter 'damaged' cannot be read, and are not used" in caplog.text


def test_a_wrong_adapter_fails_its_prompts_and_others_run(llm, requests, tmp_path):
    wrong = [LoRARequest("absent", 7, str(tmp_path)), "tune-0", LoRARequest("other", requests[0].lora_int_id, "x")]
    good = generate(llm, PROMPTS[0], requests[0])
    outputs = generate(llm, [PROMPTS[0], *PROMPTS], [requests[0], *wrong, None], on_error="return")
    assert drawn(outputs[:1]) == drawn(good) and outputs[-1].error is None
    errors = [output.error for output in outputs[1:-1]]
    assert [error.kind for error in errors] == ["AdapterError", "ConfigError", "ConfigError"]
    assert "'absent'" in errors[0].message and not errors[0].retryable
    assert "lora_request must be a LoRARequest, or None for the model alone; got 'tune-0'" in errors[1].message
    assert "is the number of the adapter 'tune-0'" in errors[2].message
    assert [output.lora_request for output in outputs[1:-1]] == [wrong[0], None, wrong[2]]
    with pytest.raises(AdapterError, match="'absent'"):
        generate(llm, PROMPTS[:2], [wrong[0], None])
    with pytest.raises(ConfigError, match="got 'tune-0'"):
        generate(llm, PROMPTS[0], "tune-0")
    with pytest.raises(ConfigError, match=r"lengths of prompts \(4\) and lora_request \(2\) must be the same"):
        generate(llm, PROMPTS, requests[:2], on_error="return")


def test_a_prompt_that_cannot_be_run_keeps_the_name_of_its_adapter(llm, requests):
    bad, good = generate(llm, ["", PROMPTS[0]], requests[0], on_error="return")
    assert bad.error.kind == "EmptyPromptError" and bad.lora_request == requests[0] and good.error is None
    with pytest.raises(PromptError):
        generate(llm, [[10**6]], requests[0])


def test_adapters_are_added_listed_pinned_and_removed(llm, requests):
    engine = llm.llm_engine
    assert llm.add_lora(requests[0]) and not llm.add_lora(requests[0])
    assert engine.add_lora(requests[1]) and llm.list_loras() == engine.list_loras() == {1, 2}
    assert llm.pin_lora(1)
    num_loads = llm.stats().num_adapter_loads
    generate(llm, PROMPTS[:2], requests[:2])
    assert llm.stats().num_adapter_loads == num_loads, "the adapters were in memory"
    assert llm.remove_lora(2) and not llm.remove_lora(2)
    assert engine.remove_lora(1) and llm.list_loras() == set()
    with pytest.raises(ConfigError, match="no adapter with lora_int_id=1 is in memory"):
        llm.pin_lora(1)
    with pytest.raises(ConfigError, match="must be a LoRARequest"):
        llm.add_lora(requests[0].path)
    with pytest.raises(AdapterError, match="'absent'"):
        llm.add_lora(LoRARequest("absent", 9, "absent"))
    assert llm.list_loras() == set()


def test_threads_may_add_and_use_adapters_at_once(llm, requests):
    alone = [drawn(generate(llm, PROMPTS, request)) for request in requests]
    for request in requests:
        llm.remove_lora(request.lora_int_id)
    with ThreadPoolExecutor(4) as threads:
        added = [threads.submit(llm.add_lora, request) for request in requests]
        calls = [threads.submit(generate, llm, PROMPTS, request) for request in requests]
    assert [drawn(call.result()) for call in calls] == alone
    assert all(isinstance(one.result(), bool) for one in added)


def test_an_engine_without_adapters_refuses_prompts_that_name_one(folder, requests):
    with LLM(str(folder), dtype="float32", max_num_seqs=4) as llm:
        bad, good = generate(llm, PROMPTS[:2], [requests[0], None], on_error="return")
        assert bad.error.kind == "ConfigError" and "enable_lora=True" in bad.error.message and good.error is None
        for method in (llm.add_lora, llm.remove_lora, llm.pin_lora):
            with pytest.raises(ConfigError, match="enable_lora=True"):
                method(requests[0] if method == llm.add_lora else 1)
        with pytest.raises(ConfigError, match="enable_lora=True"):
            llm.list_loras()


def test_a_closed_engine_says_so(folder, requests):
    llm = LLM(str(folder), dtype="float32", max_num_seqs=4, enable_lora=True)
    llm.close()
    with pytest.raises(EngineDeadError):
        llm.add_lora(requests[0])
    with pytest.raises(EngineDeadError):
        generate(llm, PROMPTS[0], requests[0])


def test_an_engine_checks_the_adapter_of_requests_that_do_not_come_from_llm(llm):
    request: Any = GenerateRequest("1", None, [5, 6], PARAMS, lora_request={"lora_name": "a"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a LoRARequest"):
        llm.llm_engine.add_request(request)


def test_embeddings_and_scores_take_adapters(folder, requests):
    with LLM(str(folder), dtype="float32", task="embed", max_num_seqs=4, enable_lora=True, max_loras=2) as llm:
        each = [requests[0], None, requests[1]]
        outputs = llm.embed(PROMPTS[:3], lora_request=each, use_tqdm=False)
        for output, request in zip(pickle.loads(pickle.dumps(outputs)), each, strict=True):
            hidden = run_peft(folder, request, output.prompt_token_ids).hidden_states[-1][0, -1]
            expected = torch.nn.functional.normalize(hidden, dim=0)
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected, atol=1e-4, rtol=0)
            assert output.lora_request == request
        scores = llm.score(PROMPTS[0], PROMPTS[1:], lora_request=each, use_tqdm=False)
        for text, score, request in zip(PROMPTS[1:], scores, each, strict=True):
            two = llm.embed([PROMPTS[0], text], lora_request=request, use_tqdm=False)
            cosine = torch.tensor(two[0].outputs.embedding) @ torch.tensor(two[1].outputs.embedding)
            assert score.lora_request == request and score.outputs.score == pytest.approx(cosine.item(), abs=1e-5)
        (vector,) = llm.encode(PROMPTS[0], pooling_task="embed", lora_request=requests[0], use_tqdm=False)
        assert vector.outputs.data.tolist() == pytest.approx(outputs[0].outputs.embedding, abs=1e-5)
        bad, good = llm.embed(PROMPTS[:2], lora_request=["x", None], on_error="return", use_tqdm=False)
        assert bad.error.kind == "ConfigError" and good.error is None


@pytest.mark.parametrize(("model_type", "unused"), [("bert", "pooler.dense"), ("albert", "pooler")])
def test_an_encoder_takes_adapters_whose_targets_name_the_pooler_too(model_type, unused, tmp_path, caplog):
    encoder, adapter, token_ids = tiny_encoder(tmp_path / "model", model_type), tmp_path / "adapter", [5, 6, 7, 8, 9]
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    peft_model: Any = get_peft_model(AutoModel.from_pretrained(encoder, dtype=torch.float32), config).eval()
    peft_model.save_pretrained(adapter)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(peft_model(torch.tensor([token_ids])).last_hidden_state[0], dim=-1)
    plain = torch.nn.functional.normalize(reference(encoder, [token_ids])[0], dim=-1)
    assert (expected - plain).abs().max() > 0.01
    settings: dict[str, Any] = {"dtype": "float32", "task": "embed", "max_num_seqs": 4, "enable_lora": True}
    with LLM(str(encoder), **settings) as llm:
        prompts, each = [{"prompt_token_ids": token_ids}] * 2, [LoRARequest("tune", 1, adapter), None]
        outputs = llm.encode(prompts, pooling_task="token_embed", lora_request=each, use_tqdm=False)
    for output, wanted in zip(outputs, (expected, plain), strict=True):
        torch.testing.assert_close(torch.as_tensor(output.outputs.data), wanted, atol=1e-5, rtol=0)
    assert f"the adapter 'tune' changes '{unused}' and 0 more, which the model does not run" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_name": ""}, "lora_name must be a text that is not empty"),
        ({"lora_name": 3}, "lora_name must be a text"),
        ({"lora_int_id": 0}, "lora_int_id of 'a' must be an integer of 1 or more; got 0"),
        ({"lora_int_id": True}, "lora_int_id of 'a' must be an integer"),
        ({"lora_int_id": "1"}, "lora_int_id of 'a' must be an integer"),
        ({"lora_path": 3}, "lora_path of 'a' must be a path or a text; got 3"),
        ({"base_model_name": 3}, "base_model_name of 'a' must be a text or None"),
        ({"load_inplace": 1}, "load_inplace of 'a' must be True or False"),
    ],
)
def test_a_wrong_field_of_a_request_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        LoRARequest(**{"lora_name": "a", "lora_int_id": 1, "lora_path": "there", **values})


def test_a_request_has_the_names_of_vllm_and_can_be_sent():
    request = LoRARequest("a", 2, Path("there"))  # type: ignore[arg-type]
    assert (request.name, request.adapter_id, request.path) == ("a", 2, "there")
    assert pickle.loads(pickle.dumps(request)) == request and len({request, request}) == 1


def test_a_request_shows_no_password_of_its_url():
    shown = repr(LoRARequest("a", 2, "https://user:hush@host/adapter"))
    assert shown.startswith("LoRARequest(lora_name='a', lora_int_id=2, lora_path='https://")
    assert "host/adapter" in shown and "hush" not in shown
