"""Looks up every form that random steps of some models ask for among those that a rehearsal asks for.

Nothing is compiled: Triton tells a hook the key of each form that it does not have, and the hook declines it. A script
of its own, for test_rehearsal.py, because it replaces Triton's driver.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_gpu
import torch
import transformers
import triton

from millrace.engine.config import EngineConfig
from millrace.engine.loading.rehearsal import META, Rehearsal
from millrace.engine.lora.routing import NO_SLOT
from millrace.engine.lora.slots import SlotSizes
from millrace.engine.models import ModelOptions, build_model
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.pooling.config import PoolerConfig
from millrace.engine.pooling.pooler import Pooler, normalize
from millrace.engine.step.pooling_mode import Mean
from millrace.engine.step.runner import ModelRunner
from millrace.engine.step_plan import StepPlan
from millrace.engine.tasks.embed import Embed
from millrace.engine.tasks.generate import Generate

MAX_NUM_SEQS, MAX_MODEL_LEN, NUM_STEPS = 1024, 8192, 25
SIZES = {"num_hidden_layers": 2, "vocab_size": 151_936, "max_position_embeddings": MAX_MODEL_LEN}
QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
GEMMA2 = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 1}
YOUTU = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 16}
OPT = {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "word_embed_proj_dim": 768}


def rehearsals() -> Iterator[tuple[str, Rehearsal]]:
    """Yields the rehearsals of models that differ in their kernels."""
    qwen3 = transformers.Qwen3Config(**SIZES, **QWEN3, head_dim=128, architectures=["Qwen3ForCausalLM"])
    gemma2 = transformers.Gemma2Config(**SIZES, **GEMMA2, head_dim=256, architectures=["Gemma2ForCausalLM"])
    gemma3 = transformers.Gemma3TextConfig(**SIZES, **GEMMA2, head_dim=256, architectures=["Gemma3ForCausalLM"])
    olmo2 = transformers.Olmo2Config(**SIZES, **QWEN3, architectures=["Olmo2ForCausalLM"])
    llama = transformers.LlamaConfig(**SIZES, **LLAMA, architectures=["LlamaForCausalLM"])
    youtu = transformers.YoutuConfig(**SIZES, **YOUTU, architectures=["YoutuForCausalLM"])
    opt = transformers.OPTConfig(**SIZES, **OPT, architectures=["OPTForCausalLM"])
    config = EngineConfig(model="none", max_model_len=MAX_MODEL_LEN)
    alone = ParallelContext()
    bfloat16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    plain, generate = ModelOptions(), Generate(config, qwen3)
    of_qwen3 = Rehearsal(config, qwen3, generate, plain, bfloat16, bfloat16, MAX_NUM_SEQS, alone)
    yield "qwen3", of_qwen3
    yield "qwen3 fp8", replace(of_qwen3, options=ModelOptions("fp8"), kv_dtype=fp8)
    yield "qwen3 deterministic", replace(of_qwen3, options=ModelOptions(deterministic=True))
    adapted = replace(config, enable_lora=True, max_loras=4)
    slots = ModelOptions(adapter_slots=SlotSizes(4, 16))
    yield "qwen3 with adapters", replace(of_qwen3, config=adapted, options=slots)
    yield "qwen3, rank 1 of 2", replace(of_qwen3, parallel=ParallelContext.of_rank(1, 2, 1))
    yield "qwen3, stage 1 of 2", replace(of_qwen3, parallel=ParallelContext.of_rank(1, 1, 2))
    yield "gemma2", replace(of_qwen3, hf_config=gemma2)
    yield "llama", replace(of_qwen3, hf_config=llama, dtype=torch.float16, kv_dtype=torch.float16, max_num_seqs=7)
    yield "gemma3", replace(of_qwen3, hf_config=gemma3)
    yield "olmo2, rank 1 of 2", replace(of_qwen3, hf_config=olmo2, parallel=ParallelContext.of_rank(1, 2, 1))
    yield "opt", replace(of_qwen3, hf_config=opt, dtype=torch.float32, kv_dtype=torch.float32)
    yield "youtu", replace(of_qwen3, hf_config=youtu)
    no_sharing = replace(config, enable_prefix_caching=False)
    yield (
        "qwen3 embed",
        replace(of_qwen3, config=no_sharing, task=Embed(Pooler(PoolerConfig(), normalize), (Mean,), 1024)),
    )


def random_plan(draw: random.Random, max_num_seqs: int, shares: bool) -> StepPlan:
    """Returns a step of a random batch: prompts, chunks and decodes of odd numbers and lengths."""
    num_seqs = min(max_num_seqs, draw.choice([1, 2, 3, 15, 16, 17, 255, 256, draw.randint(1, 1024)]))
    num_decodes = draw.choice([0, num_seqs, draw.randint(0, num_seqs)])
    counts = [1] * num_decodes + [draw.randint(2, 40) for _ in range(num_seqs - num_decodes)]
    longest = draw.choice([48, 300, MAX_MODEL_LEN - 48])
    return StepPlan(
        rows=list(range(num_seqs)),
        starts=[draw.randint(0, longest) for _ in counts],
        counts=counts,
        samples=[True] + [draw.random() < 0.8 for _ in counts[1:]],
        num_decodes=num_decodes,
        num_shared_blocks=draw.randint(0, 1) if shares and num_decodes > 1 else 0,
    )


class Forms:
    """The keys of forms that launches ask for, for Triton's hook."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, str]] = set()

    def decline(self, *, key: str, fn: Any, **_: Any) -> bool:
        """Notes a form, and keeps Triton from compiling it."""
        self.asked.add((fn.name.rpartition(".")[2], key))
        return True

    def take(self) -> set[tuple[str, str]]:
        """Returns the forms since the last call."""
        taken, self.asked = self.asked, set()
        return taken


def random_steps(rehearsal: Rehearsal) -> None:
    """Runs random steps on the meta device."""
    model = build_model(rehearsal.hf_config, rehearsal.dtype, META, rehearsal.options)
    runner = ModelRunner(
        model,
        META,
        num_blocks=5,
        block_size=16,
        max_num_seqs=rehearsal.max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        dtype=rehearsal.kv_dtype,
        make_head=rehearsal.task.make_head,
    )
    new_rows = next(rehearsal.plans(MAX_MODEL_LEN)).new_rows
    for seed in range(NUM_STEPS):
        draw = random.Random(seed)
        plan = random_plan(draw, rehearsal.max_num_seqs, rehearsal.config.enable_prefix_caching)
        if rehearsal.config.enable_lora:
            for row in new_rows:
                row.sequence.adapter_slot = draw.randint(NO_SLOT, rehearsal.config.max_loras - 1)
        runner.execute(replace(plan, new_rows=new_rows))


def main() -> None:
    """Prints the number of forms of each rehearsal, and fails with the forms that it lacks."""
    fake_gpu.install()
    forms = Forms()
    triton.knobs.runtime.jit_cache_hook = forms.decline
    for name, rehearsal in rehearsals():
        rehearsal.run()
        rehearsed = forms.take()
        if rehearsal.parallel.num_ranks == 1:
            random_steps(rehearsal)
            missing = forms.take() - rehearsed
            assert not missing, f"{name}: {sorted(missing)}"
        print(f"{name}: {len(rehearsed)}")


if __name__ == "__main__":
    main()
