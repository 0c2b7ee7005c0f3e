"""Adapters of output heads, token embeddings and whole heads of classifiers give what PEFT gives, in mixed batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from checkpoints import tiny_checkpoint, tiny_classifier
from fake_device import CallAgain
from fallback import fallback_checkpoint
from millrace.engine import PoolingParams
from millrace.engine.config import EngineConfig
from millrace.engine.errors import AdapterError
from millrace.engine.llm import LLM
from millrace.engine.loading.adapter_base import describe_adapter_base
from millrace.engine.lora import table_rows
from millrace.engine.lora.base import AdapterBase
from millrace.engine.lora.reader import read_adapter
from millrace.engine.lora.request import LoRARequest
from millrace.engine.lora.routing import NO_SLOT
from millrace.engine.lora.slots import SlotSizes
from millrace.engine.models import load_hf_config, load_model
from millrace.engine.models.options import DEFAULT_OPTIONS
from millrace.engine.outputs import RequestOutput
from millrace.engine.parallel.context import SINGLE, ParallelContext
from millrace.engine.quantization.group_embedding import GroupEmbedding
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.step.cuda_graph import DecodeGraphs

PROMPTS = [[7, 301, 12, 12, 45], [9, 8, 77, 7], [301, 5, 6, 7, 8, 9, 10, 11, 12], [45]]
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)


def write_adapter(folder: Path, base: Path, *, seed: int, auto: Any = AutoModelForCausalLM, **config: Any) -> Path:
    """Lets PEFT write a random adapter."""
    model = auto.from_pretrained(base, dtype=torch.float32)
    adapter = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    adapter.save_pretrained(folder)
    return folder


def base_of(folder: Path) -> AdapterBase:
    """Returns what the reader of adapters knows about a model."""
    config = EngineConfig(model=str(folder), enable_lora=True)
    return describe_adapter_base(config, load_hf_config(folder), "lm_head", torch.float32)


def peft_model(base: Path, adapter: Path | None, auto: Any = AutoModelForCausalLM) -> torch.nn.Module:
    """Returns the model of transformers, with an adapter that PEFT loads."""
    model: torch.nn.Module = auto.from_pretrained(base, dtype=torch.float32)
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def open_engine(base: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float32", "enable_lora": True, "max_loras": 2, "max_logprobs": -1, "skip_tokenizer_init": True}
    return LLM(str(base), **fixed, max_num_seqs=16, max_num_batched_tokens=32, **settings)


def generate(
    llm: LLM, jobs: list[tuple[list[int], Path | None]], params: SamplingParams, names: list[Path]
) -> list[RequestOutput]:
    """Runs prompts, each with an adapter or with none, in one batch: the adapters are read before the first step."""
    for index, (prompt, path) in enumerate(jobs):
        request = None if path is None else LoRARequest(path.name, 1 + names.index(path), str(path))
        if request is not None:
            llm.add_lora(request)
        llm.llm_engine.add_request(GenerateRequest(str(index), None, prompt, params, lora_request=request))
    outputs: dict[int, RequestOutput] = {}
    while llm.llm_engine.has_unfinished_requests():
        outputs.update((int(output.request_id), output) for output in llm.llm_engine.step())
    return [outputs[index] for index in range(len(jobs))]


def logprobs_of(output: RequestOutput) -> Tensor:
    """Returns the log-probabilities of all tokens after each position but the last, `[num_positions, vocab_size]`."""
    rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


@torch.inference_mode()
def check_against_peft(base: Path, adapters: list[Path], prompts: list[list[int]] = PROMPTS, **settings: Any) -> None:
    """Checks a batch that mixes the adapters and rows without: log-probabilities of all tokens, and greedy tokens."""
    jobs = [(prompt, path) for prompt in prompts for path in (*adapters, None)]
    with open_engine(base, **settings) as llm:
        greedy, outputs = (generate(llm, jobs, params, adapters) for params in (GREEDY, SCORED))
    models = {path: peft_model(base, path) for path in (*adapters, None)}
    for (prompt, path), output, drawn in zip(jobs, outputs, greedy, strict=True):
        assert output.error is None, output.error
        tokens = list(output.outputs[0].token_ids)
        wanted = models[path](torch.tensor([prompt + tokens])).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(logprobs_of(output), wanted, atol=1e-4, rtol=0)
        assert drawn.outputs[0].token_ids == output.outputs[0].token_ids
    plain = models[None](torch.tensor([prompts[0]])).logits
    for path in adapters:
        assert (models[path](torch.tensor([prompts[0]])).logits - plain).abs().max() > 0.1, f"{path.name} does nothing"


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_output_head_changes_the_logits_of_its_rows(tmp_path: Path, tied: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=tied)
    adapters = [
        write_adapter(tmp_path / "head", base, seed=1, target_modules=["lm_head"]),
        write_adapter(tmp_path / "mixed", base, seed=2, r=7, target_modules=["lm_head", "q_proj", "down_proj"]),
        write_adapter(tmp_path / "inner", base, seed=3, target_modules=["v_proj"]),
    ]
    check_against_peft(base, adapters)


@pytest.mark.parametrize(("kind", "head"), [("apertus", "lm_head"), ("biogpt", "output_projection")])
def test_the_head_of_a_module_of_transformers_takes_adapters(tmp_path: Path, kind: str, head: str) -> None:
    base = fallback_checkpoint(tmp_path / "base", kind)
    adapter = write_adapter(tmp_path / "head", base, seed=1, target_modules=[head, "q_proj"])
    check_against_peft(base, [adapter], prompts=[[7, 31, 12, 12, 45], [45]])


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3"])
def test_an_adapter_of_the_token_embedding_changes_the_embeddings_of_its_rows(tmp_path: Path, family: str) -> None:
    base = tiny_checkpoint(tmp_path / "base", family)
    adapters = [
        write_adapter(tmp_path / "embed", base, seed=1, target_modules=["embed_tokens"]),
        write_adapter(tmp_path / "both", base, seed=2, r=7, target_modules=["embed_tokens", "lm_head", "q_proj"]),
        write_adapter(tmp_path / "tied", base, seed=3, target_modules=["embed_tokens"], ensure_weight_tying=True),
    ]
    check_against_peft(base, adapters)


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_have_rows_of_their_own(tmp_path: Path, tied: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=tied)
    tokens = {"embed_tokens": [12, 7], "lm_head": [301, 1, 99]}
    adapters = [
        write_adapter(tmp_path / "list", base, seed=1, target_modules=["q_proj"], trainable_token_indices=[301, 7, 12]),
        write_adapter(tmp_path / "dict", base, seed=2, target_modules=["q_proj"], trainable_token_indices=tokens),
    ]
    check_against_peft(base, adapters)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_tables_of_an_adapter_replace_those_of_the_model(tmp_path: Path, tied: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=tied)
    adapters = [
        write_adapter(tmp_path / "head", base, seed=1, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        write_adapter(tmp_path / "embed", base, seed=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        write_adapter(
            tmp_path / "both", base, seed=3, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
        ),
    ]
    check_against_peft(base, adapters)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_adapters_of_tables_run_on_several_ranks(tmp_path: Path, sizes: dict[str, int]) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", vocab_size=383, tie_word_embeddings=True)
    adapters = [
        write_adapter(tmp_path / "rows", base, seed=1, target_modules=["q_proj"], trainable_token_indices=[301, 7, 12]),
        write_adapter(tmp_path / "both", base, seed=2, target_modules=["embed_tokens", "lm_head", "o_proj"]),
        write_adapter(tmp_path / "head", base, seed=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ]
    check_against_peft(base, adapters, **sizes)


def test_tables_of_adapters_depend_on_no_other_row_in_a_deterministic_engine(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapters = [
        write_adapter(tmp_path / "embed", base, seed=1, target_modules=["embed_tokens"]),
        write_adapter(tmp_path / "head", base, seed=2, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    ]
    llm = open_engine(base, deterministic=True)
    jobs = [(prompt, path) for prompt in PROMPTS for path in adapters]
    together = generate(llm, jobs, SCORED, adapters)
    for job, output in zip(jobs, together, strict=True):
        assert torch.equal(logprobs_of(generate(llm, [job], SCORED, adapters)[0]), logprobs_of(output))


def test_prompt_embeddings_are_taken_as_they_are(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "gemma")
    adapter = write_adapter(tmp_path / "embed", base, seed=1, target_modules=["embed_tokens"])
    llm = open_engine(base, enable_prompt_embeds=True)
    table = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    prompt, request = {"prompt_embeds": table[PROMPTS[0]].detach()}, LoRARequest("embed", 1, str(adapter))
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    first = [llm.generate(prompt, params, lora_request=one)[0].outputs[0].logprobs for one in (None, request)]
    assert first[0] == first[1]


def test_recorded_steps_are_left_to_adapters_that_can_be_recorded(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapters = [
        write_adapter(tmp_path / "embed", base, seed=1, target_modules=["embed_tokens"]),
        write_adapter(tmp_path / "head", base, seed=2, target_modules=["lm_head"]),
        write_adapter(tmp_path / "inner", base, seed=3, target_modules=["v_proj"]),
    ]
    llm, wanted = open_engine(base), open_engine(base)
    runner = llm.llm_engine.executor._runner
    graphs = DecodeGraphs(runner._decode, [1, 4], CallAgain(), draw=runner._head.draw)
    runner._recorder = graphs
    for paths in ([adapters[0]], [adapters[1], None], [adapters[2]], [None]):
        jobs = [(PROMPTS[index], path) for index, path in enumerate(paths)]
        ours, theirs = (generate(engine, jobs, GREEDY, adapters) for engine in (llm, wanted))
        assert [one.outputs[0].token_ids for one in ours] == [one.outputs[0].token_ids for one in theirs]
    with_routing = [key for key in graphs._steps._recordings if key[2] is not None]
    assert len(with_routing) == 2  # One sequence of the inner adapter, and two of which one has that of the head.


@torch.inference_mode()
def test_adapters_of_a_classifier_have_heads_of_their_own(tmp_path: Path) -> None:
    base = tiny_classifier(tmp_path / "base", "llama", num_labels=3)
    made = {"auto": AutoModelForSequenceClassification}
    adapters = [
        write_adapter(tmp_path / "saved", base, seed=1, target_modules=["q_proj"], task_type="SEQ_CLS", **made),
        write_adapter(tmp_path / "score", base, seed=2, target_modules=["q_proj", "score"], **made),
        write_adapter(tmp_path / "embed", base, seed=3, target_modules=["embed_tokens"], **made),
    ]
    llm = open_engine(base)
    jobs = [(prompt, path) for prompt in PROMPTS for path in (*adapters, None)]
    requests = [
        None if path is None else LoRARequest(path.name, 1 + adapters.index(path), str(path)) for _, path in jobs
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in jobs]
    params = PoolingParams(use_activation=False)
    for request in requests[: len(adapters)]:  # So that prompts with and without adapters run in the same steps.
        assert request is not None and llm.add_lora(request)
    outputs = llm.classify(prompts, pooling_params=params, lora_request=requests, use_tqdm=False)
    models = {path: peft_model(base, path, AutoModelForSequenceClassification) for path in (*adapters, None)}
    for (prompt, path), output in zip(jobs, outputs, strict=True):
        wanted = models[path](torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.tensor(output.outputs.probs), wanted, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_embeddings_of_prompts_are_those_of_their_adapters(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "qwen3")
    adapters = [
        write_adapter(tmp_path / "inner", base, seed=1, target_modules=["q_proj", "down_proj"]),
        write_adapter(tmp_path / "tokens", base, seed=2, target_modules=["q_proj"], trainable_token_indices=[7, 45]),
    ]
    llm = open_engine(base, runner="pooling")
    requests = [LoRARequest(path.name, 1 + index, str(path)) for index, path in enumerate(adapters)]
    assert all(llm.add_lora(request) for request in requests), "so that all prompts run in the same steps"
    for prompt in PROMPTS:
        asked = [{"prompt_token_ids": prompt}] * 3
        outputs = llm.embed(asked, lora_request=[*requests, None], use_tqdm=False)
        for output, path in zip(outputs, (*adapters, None), strict=True):
            body = peft_model(base, path)(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
            wanted = torch.nn.functional.normalize(body, dim=0)
            torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, atol=1e-4, rtol=0)


def _edit(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Changes the tensors and the config of an adapter."""
    tensors, fields = load_file(folder / "adapter_model.safetensors"), json.loads((folder / CONFIG).read_text())
    change(tensors, fields)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(json.dumps(fields))


CONFIG = "adapter_config.json"
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.weight"
EMBED_A = "base_model.model.model.embed_tokens.lora_embedding_A"

REFUSED: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "a token behind the vocabulary": (lambda _, c: c["trainable_token_indices"].__setitem__(0, 9999), "token 9999"),
    "a token twice": (lambda _, c: c.update(trainable_token_indices=[7, 7]), "different token ids"),
    "tokens that are texts": (lambda _, c: c.update(trainable_token_indices=["a", "b"]), "different token ids"),
    "no tokens": (lambda _, c: c.update(trainable_token_indices=None), "does not say of which"),
    "too few rows": (lambda t, _: t.update({DELTA: t[DELTA][:1]}), r"\[1, 64\].*ask for \[2, 64\]"),
    "no rows": (lambda t, _: t.pop(DELTA), "holds no rows"),
    "a head in place of rows": (lambda t, _: t.update({HEAD: 2 * t.pop(DELTA)[:1].expand(384, 64)}), "holds no rows"),
    "NaN": (lambda t, _: t[DELTA].fill_(torch.nan), "embed_tokens.*NaN"),
    "a saved head that is missing": (lambda _, c: c.update(modules_to_save=["lm_head"]), "does not hold it"),
    "a longer vocabulary": (lambda t, _: t.update({HEAD: torch.ones(400, 64)}), r"\[400, 64\].*vocabulary"),
    "the head of a classifier": (lambda t, _: t.update({"base_model.model.score.weight": torch.ones(3, 64)}), "score"),
    "a bias of the head": (lambda t, _: t.update({"base_model.model.lm_head.bias": torch.ones(384)}), "lm_head.bias"),
    "A of another vocabulary": (lambda t, _: t.update({EMBED_A: torch.ones(4, 9)}), "lora_B.* no lora_A|no lora_B"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_rows_and_tables_that_do_not_fit_are_refused_by_name(
    tuned_tokens: tuple[Path, Path], tmp_path: Path, change: Callable[..., None], message: str
) -> None:
    base, adapter = tuned_tokens
    folder = shutil.copytree(adapter, tmp_path / "tune")
    _edit(folder, change)
    with pytest.raises(AdapterError, match=f"(?s)adapter 'tune' .*{message}"):
        read_adapter(LoRARequest("tune", 1, str(folder)), base_of(base))


@pytest.fixture(scope="module")
def tuned_tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an adapter with rows of two tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    base = tiny_checkpoint(folder / "base", "llama")
    made = {"target_modules": ["q_proj"], "trainable_token_indices": [7, 45]}
    return base, write_adapter(folder / "tune", base, seed=1, **made)


def test_a_head_with_a_bias_takes_matrices_but_no_rows(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "phi")
    check_against_peft(base, [write_adapter(tmp_path / "head", base, seed=1, target_modules=["lm_head"])])
    made = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 45]}}
    adapter = write_adapter(tmp_path / "rows", base, seed=1, **made)
    with pytest.raises(AdapterError, match="replaces rows of 'lm_head', which has a bias"):
        read_adapter(LoRARequest("rows", 1, str(adapter)), base_of(base))


def test_an_empty_list_of_tokens_changes_nothing(tuned_tokens: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = tuned_tokens
    folder = shutil.copytree(adapter, tmp_path / "tune")
    _edit(
        folder, lambda t, c: (t.update({DELTA: t[DELTA][:0]}), c.update(trainable_token_indices={"embed_tokens": []}))
    )
    assert not read_adapter(LoRARequest("tune", 1, str(folder)), base_of(base)).new_rows


def test_at_most_so_many_rows_are_replaced(tuned_tokens: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = tuned_tokens
    described = base_of(base)
    monkeypatch.setattr(table_rows, "MAX_NEW_ROWS", 1)
    with pytest.raises(AdapterError, match=r"replaces 2 rows of 'model\.embed_tokens', and at most 1"):
        read_adapter(LoRARequest("tune", 1, str(adapter)), described)


def test_a_copy_of_the_models_own_table_takes_no_memory_even_if_it_was_rounded(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapter = write_adapter(tmp_path / "tune", base, seed=1, target_modules=["embed_tokens", "lm_head"])
    _edit(adapter, lambda t, _: t.update({name: one.bfloat16() for name, one in t.items() if "base_layer" in name}))
    described = base_of(base)
    read = read_adapter(LoRARequest("tune", 1, str(adapter)), described)
    assert read.updates.keys() == {"embed_tokens", "lm_head"} and not read.new_rows
    name = "base_model.model.lm_head.base_layer.weight"
    _edit(adapter, lambda t, _: t.update({name: t[name].index_fill(0, torch.tensor([5]), 3.0)}))
    assert read_adapter(LoRARequest("tune", 1, str(adapter)), described).new_rows["lm_head"].indices.tolist() == [5]


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_have_their_part_of_the_tables(tmp_path: Path, tied: bool) -> None:
    """The last rank has fewer tokens than the first: 192 and 191."""
    base = tiny_checkpoint(tmp_path / "base", "llama", vocab_size=383, tie_word_embeddings=tied)
    tokens = {"embed_tokens": [0, 191, 192, 382], "lm_head": [382, 191, 192]}
    made: list[dict[str, Any]] = [
        {"target_modules": ["q_proj"], "trainable_token_indices": tokens},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [192]}},  # None of the first rank.
    ]
    hf_config = load_hf_config(base)
    described = base_of(base)
    adapters = []
    for seed, config in enumerate(made):
        folder = write_adapter(tmp_path / str(seed), base, seed=seed, **config)
        adapters.append(read_adapter(LoRARequest(str(seed), 1, str(folder)), described))
    slots = np.array([0, 1, NO_SLOT, 1, 0, 0, 1, 2])
    token_ids, hidden = torch.tensor([0, 191, 192, 382, 382, 191, 192, 7]), torch.randn(8, 64)
    options = replace(DEFAULT_OPTIONS, adapter_slots=SlotSizes(num_slots=3, max_rank=8))
    whole, *ranks = (
        load_model(base, hf_config, torch.float32, "cpu", options, place)
        for place in (SINGLE, *(ParallelContext.of_rank(rank, 2, 1) for rank in range(2)))
    )
    for model in (whole, *ranks):
        for slot, adapter in enumerate(adapters):
            model.adapters.load(slot, adapter)
        model.adapters.routing = model.adapters.route(slots, len(slots), torch.device("cpu"))
    logits = torch.cat([model.compute_own_logits(hidden) for model in ranks], 1)[:, :383]
    torch.testing.assert_close(logits, whole.compute_logits(hidden), atol=1e-5, rtol=1e-5)
    found: list[Tensor] = []
    for model in ranks:
        model.embed_tokens.unadapted.reduce = lambda part: found.append(part.clone()) or part
        model.embed_tokens(token_ids)
    for model in ranks:
        model.embed_tokens.unadapted.reduce = lambda _: sum(found[:2])
        torch.testing.assert_close(model.embed_tokens(token_ids), whole.embed_tokens(token_ids), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_head_that_shares_a_quantised_table_takes_adapters(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "head", base, seed=1, target_modules=["lm_head", "embed_tokens"])
    options = replace(DEFAULT_OPTIONS, adapter_slots=SlotSizes(1, 8), quantization="int4")
    hf_config = load_hf_config(base)
    model = load_model(base, hf_config, torch.float32, "cpu", options)
    plain = load_model(base, hf_config, torch.float32, "cpu", replace(options, adapter_slots=None))
    assert isinstance(plain.embed_tokens, GroupEmbedding)
    described = base_of(base)
    read = read_adapter(LoRARequest("head", 1, str(adapter)), described)
    model.adapters.load(0, read)
    model.adapters.routing = model.adapters.route(np.array([0, NO_SLOT]), 2, torch.device("cpu"))
    hidden, token_ids = torch.randn(2, 64), torch.tensor([7, 7])
    head, table = read.updates["lm_head"], read.updates["embed_tokens"]
    wanted = plain.compute_logits(hidden)
    wanted[0] += head.b @ (head.a @ hidden[0])
    torch.testing.assert_close(model.compute_logits(hidden), wanted, atol=1e-5, rtol=1e-5)
    embeddings = plain.embed_tokens(token_ids)
    embeddings[0] += table.b @ table.a[:, 7]
    torch.testing.assert_close(model.embed_tokens(token_ids), embeddings, atol=1e-5, rtol=1e-5)
