"""Adapters of output heads, token embeddings and whole heads of classifiers give what PEFT gives, in mixed batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints import tiny_checkpoint
from millrace.engine.llm import LLM
from millrace.engine.lora.request import LoRARequest
from millrace.engine.outputs import RequestOutput
from millrace.engine.request import GenerateRequest
from millrace.engine.sampling_params import SamplingParams

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


def peft_model(base: Path, adapter: Path | None, auto: Any = AutoModelForCausalLM) -> torch.nn.Module:
    """Returns the model of transformers, with an adapter that PEFT loads."""
    model: torch.nn.Module = auto.from_pretrained(base, dtype=torch.float32)
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def open_engine(base: Path, **settings: Any) -> LLM:
    fixed = {"dtype": "float32", "enable_lora": True, "max_loras": 3, "max_logprobs": -1, "skip_tokenizer_init": True}
    return LLM(str(base), **fixed, max_num_seqs=16, max_num_batched_tokens=32, **settings)


def generate(
    llm: LLM, jobs: list[tuple[list[int], Path | None]], params: SamplingParams, names: list[Path]
) -> list[RequestOutput]:
    """Runs prompts, each with an adapter or with none, in one batch."""
    for index, (prompt, path) in enumerate(jobs):
        request = None if path is None else LoRARequest(path.name, 1 + names.index(path), str(path))
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
def check_against_peft(base: Path, adapters: list[Path], **settings: Any) -> None:
    """Checks a batch that mixes the adapters and rows without: log-probabilities of all tokens, and greedy tokens."""
    llm = open_engine(base, **settings)
    jobs = [(prompt, path) for prompt in PROMPTS for path in (*adapters, None)]
    greedy = generate(llm, jobs, GREEDY, adapters)
    models = {path: peft_model(base, path) for path in (*adapters, None)}
    for (prompt, path), output, drawn in zip(jobs, generate(llm, jobs, SCORED, adapters), greedy, strict=True):
        assert output.error is None, output.error
        tokens = list(output.outputs[0].token_ids)
        wanted = models[path](torch.tensor([prompt + tokens])).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(logprobs_of(output), wanted, atol=1e-4, rtol=0)
        assert drawn.outputs[0].token_ids == output.outputs[0].token_ids
    plain = models[None](torch.tensor([PROMPTS[0]])).logits
    for path in adapters:
        assert (models[path](torch.tensor([PROMPTS[0]])).logits - plain).abs().max() > 0.1, f"{path.name} does nothing"


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_output_head_changes_the_logits_of_its_rows(tmp_path: Path, tied: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=tied)
    adapters = [
        write_adapter(tmp_path / "head", base, seed=1, target_modules=["lm_head"]),
        write_adapter(tmp_path / "mixed", base, seed=2, r=7, target_modules=["lm_head", "q_proj", "down_proj"]),
        write_adapter(tmp_path / "inner", base, seed=3, target_modules=["v_proj"]),
    ]
    check_against_peft(base, adapters)
