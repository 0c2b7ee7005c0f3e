"""Models that reward texts or steps of solutions give what the formula of their head gives on transformers' states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from checkpoints import tiny_checkpoint
from millrace.engine import PoolingParams
from millrace.engine.llm import LLM

PROMPTS = [[7, 301, 12, 5, 45], [9], list(range(100, 160))]


def reward_checkpoint(folder: Path, ending: str, num_classes: int) -> dict[str, torch.Tensor]:
    """Writes a reward model with random weights, and returns the tensors of its head."""
    tiny_checkpoint(folder, "qwen2", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    size = tensors["model.norm.weight"].numel()
    torch.manual_seed(0)
    shapes = {"0.weight": (size, size), "0.bias": (size,), "2.weight": (num_classes, size), "2.bias": (num_classes,)}
    head = {f"score.{name}": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    save_file(
        {name: one for name, one in tensors.items() if name != "lm_head.weight"} | head, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [f"Qwen2{ending}"]}))
    return head


@torch.no_grad()
@pytest.mark.parametrize(("ending", "num_classes"), [("ForRewardModel", 1), ("ForProcessRewardModel", 2)])
def test_rewards_are_those_of_the_formula(tmp_path: Path, ending: str, num_classes: int) -> None:
    head = reward_checkpoint(tmp_path, ending, num_classes)
    with LLM(str(tmp_path), dtype="float32", max_num_batched_tokens=32) as llm:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.reward(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        hidden = model(torch.tensor([prompt])).last_hidden_state[0]
        inner = torch.relu(hidden @ head["score.0.weight"].mT + head["score.0.bias"])
        wanted = inner @ head["score.2.weight"].mT + head["score.2.bias"]
        torch.testing.assert_close(torch.tensor(output.outputs.data), wanted, atol=1e-4, rtol=1e-4)
