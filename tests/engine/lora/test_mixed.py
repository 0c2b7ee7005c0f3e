"""Eight adapters in one call, beside prompts without: each prompt gets PEFT's log-probabilities, however it is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from checkpoints import tiny_checkpoint
from compressed_tensors_files import write_compressed_tensors
from millrace.engine.llm import LLM
from millrace.engine.lora.request import LoRARequest
from millrace.engine.outputs import RequestOutput
from millrace.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=0, prompt_logprobs=0)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 8,
    "max_lora_rank": 16,
    "block_size": 4,
}

TUNES: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "lora_alpha": 5, "target_modules": "all-linear"},
    {"r": 1, "lora_alpha": 3, "target_modules": ["down_proj"]},
    {
        "r": 4,
        "lora_alpha": 9,
        "use_rslora": True,
        "alpha_pattern": {"o_proj": 1},
        "target_modules": ["k_proj", "o_proj"],
    },
    {"r": 3, "lora_alpha": 6, "target_modules": r".*layers\.1\.(self_attn|mlp)\..*_proj"},
    {"r": 6, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0]},
    {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 7},
        "alpha_pattern": {"up_proj": 1},
    },
    {"r": 5, "lora_alpha": 10, "target_modules": "all-linear", "exclude_modules": ["o_proj"]},
]
"""Ranks, targets and scales of the adapters."""

NUM_PROMPTS = 19


def prompts() -> list[list[int]]:
    """Returns prompts of many lengths; the first tokens are the same, so that a shared block would show."""
    random = torch.Generator().manual_seed(3)
    lengths = [4 + 5 * (i % 6) for i in range(NUM_PROMPTS)]
    return [[5, 6, 7, 8, *torch.randint(3, 300, (length,), generator=random).tolist()] for length in lengths]


def adapter_of(index: int) -> int | None:
    """Returns the adapter of a prompt; each third prompt has none."""
    return None if index % 3 == 2 else index % len(TUNES)


class Tuned:
    """A model with PEFT's eight adapters on it.

    Args:
        model: Folder of the model, in full precision.
        made: Folder for the adapters.
    """

    def __init__(self, model: Path, made: Path) -> None:
        self._model: Any = None
        self.requests: list[LoRARequest] = []
        for index, tune in enumerate(TUNES):
            torch.manual_seed(index)
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **tune)
            get_peft_model(base, config).save_pretrained(made / str(index))
            self.requests.append(LoRARequest(f"tune-{index}", index + 1, str(made / str(index))))
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(base, made / "0", adapter_name="0").eval()
        for index in range(1, len(TUNES)):
            self._model.load_adapter(made / str(index), adapter_name=str(index))

    def request_of(self, index: int) -> LoRARequest | None:
        """Returns the request of the adapter of a prompt."""
        adapter = adapter_of(index)
        return None if adapter is None else self.requests[adapter]

    @torch.inference_mode()
    def log_probabilities(self, token_ids: list[int], adapter: int | None) -> torch.Tensor:
        """Returns PEFT's log-probabilities of the tokens after each token, `[num_tokens, vocab_size]`."""
        tokens = torch.tensor([token_ids])
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(tokens).logits[0].log_softmax(-1)
        self._model.set_adapter(str(adapter))
        return self._model(tokens).logits[0].log_softmax(-1)

    def check(self, outputs: list[RequestOutput], tolerance: float = 1e-4) -> None:
        """Checks the log-probabilities of all tokens of prompts and outputs against PEFT's."""
        for index, output in enumerate(outputs):
            (completion,) = output.outputs
            token_ids = [*(output.prompt_token_ids or []), *completion.token_ids]
            wanted = self.log_probabilities(token_ids, adapter_of(index))
            ours = [*(output.prompt_logprobs or [])[1:], *(completion.logprobs or [])]
            for position, token_id in enumerate(token_ids[1:]):
                got = ours[position][token_id].logprob
                assert got == pytest.approx(wanted[position, token_id].item(), abs=tolerance), (index, position)
            assert adapter_of(index) is None or self.changes(token_ids, adapter_of(index)) > 100 * tolerance

    def changes(self, token_ids: list[int], adapter: int | None) -> float:
        """Returns how much an adapter changes the log-probabilities at most."""
        without = self.log_probabilities(token_ids, None)
        return (self.log_probabilities(token_ids, adapter) - without).abs().max().item()

    def run(self, folder: Path, **settings: Any) -> tuple[list[RequestOutput], LLM]:
        """Runs the prompts in one call; returns the outputs and the closed engine."""
        with LLM(str(folder), **{**SETTINGS, **settings}) as llm:
            for request in self.requests:  # So that prompts with and without adapters run in the same steps.
                llm.add_lora(request)
            asked = [self.request_of(index) for index in range(NUM_PROMPTS)]
            outputs = llm.generate(prompts(), PARAMS, use_tqdm=False, lora_request=asked)
            llm.llm_engine.check_integrity()
            return outputs, llm


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(folder, tmp_path_factory.mktemp("adapters"))


def test_eight_adapters_in_one_call_give_what_peft_gives(folder: Path, tuned: Tuned) -> None:
    outputs, llm = tuned.run(folder)
    tuned.check(outputs)
    assert llm.stats().num_adapter_loads == llm.stats().num_adapter_uploads == len(TUNES)


def test_preempted_sequences_keep_their_adapters(folder: Path, tuned: Tuned) -> None:
    outputs, llm = tuned.run(folder, num_gpu_blocks_override=22, max_loras=3)
    assert llm.stats().counters.num_preemptions > 0
    tuned.check(outputs)


def test_chunks_of_prompts_are_computed_with_the_adapter(folder: Path, tuned: Tuned) -> None:
    outputs, llm = tuned.run(folder, max_num_batched_tokens=9)
    assert llm.stats().counters.num_chunked_prefills > 0
    tuned.check(outputs)


def test_steps_planned_ahead_have_the_right_adapters(folder: Path, tuned: Tuned) -> None:
    tuned.check(tuned.run(folder, overlap_depth=1, max_loras=2)[0])


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_ranks_have_their_parts_of_the_adapters(folder: Path, tuned: Tuned, tp_size: int, pp_size: int) -> None:
    sizes = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}
    tuned.check(tuned.run(folder, max_loras=3, **sizes)[0])


@pytest.mark.parametrize("preset", ["w4a16", "w8a16-naive-asym"])
def test_a_quantised_base_gives_what_its_dequantised_copy_gives(tmp_path: Path, preset: str) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", "llama", intermediate_size=160)
    groups = {preset: ["re:.*_proj$"]}
    quantised = write_compressed_tensors(plain, tmp_path / "quantised", groups)
    tuned = Tuned(plain, tmp_path / "adapters")
    tuned.check(tuned.run(quantised)[0], tolerance=1e-3)
