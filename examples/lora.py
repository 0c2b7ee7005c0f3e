"""Runs prompts with different LoRA adapters, and with none, in one call.

    python examples/lora.py

The script first writes two small adapters for the model that ships with Millrace, in the layout of PEFT. Their numbers
are random: the weak one makes the model less certain of its answer, and the strong one makes it write nonsense.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from millrace import LLM, LoRARequest, SamplingParams

LINE = "Inv #4821 - due 3 March '24 - total USD 1,204.50"
NUM_LAYERS, NUM_INPUTS, NUM_OUTPUTS = 6, 512, 192
"""Number of layers of the bundled model, and the sizes of the matrix `down_proj` of each."""


def write_adapter(folder: Path, rank: int, alpha: float, seed: int) -> Path:
    """Writes an adapter that changes one matrix of each layer by a random product of two narrow matrices."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, NUM_INPUTS, generator=random) * NUM_INPUTS**-0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(NUM_OUTPUTS, rank, generator=random) * rank**-0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def main() -> None:
    """Writes the adapters, and answers one line three times in one call."""
    with tempfile.TemporaryDirectory() as folder:
        weak = write_adapter(Path(folder, "weak"), rank=8, alpha=20, seed=1)
        strong = write_adapter(Path(folder, "strong"), rank=4, alpha=40, seed=2)

        adapters = [None, LoRARequest("weak", 1, str(weak)), LoRARequest("strong", 2, str(strong))]
        conversation = [{"role": "user", "content": LINE}]
        greedy = SamplingParams(temperature=0.0, max_tokens=48, logprobs=0)
        with LLM("bundled:invoices", enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
            for output in llm.chat([conversation] * 3, greedy, use_tqdm=False, lora_request=adapters):
                name = output.lora_request.name if output.lora_request else "no adapter"
                answer = output.outputs[0]
                print(f"{name} (log-probability {answer.cumulative_logprob:.4f}): {answer.text}")
            print("adapters in memory:", sorted(llm.list_loras()))


if __name__ == "__main__":
    main()
