"""Folders of encoders as the hub has them: older fields of configs, heads of the training, models without an oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import tiny_tokenizer
from encoders import SIZES, reference, tiny_encoder
from millrace.engine import PoolingParams
from millrace.engine.errors import UnsupportedModelError
from millrace.engine.llm import LLM
from millrace.engine.models.registry import describe_model, load_hf_config

PROMPTS = [[7, 301, 12, 12, 45], [9], list(range(2, 80))]

OLDER_NOMIC = {
    "model_type": "nomic_bert",
    "architectures": ["NomicBertModel"],
    "vocab_size": 512,
    "n_embd": 64,
    "n_head": 4,
    "n_inner": 96,
    "n_layer": 3,
    "n_positions": 80,
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-12,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "prenorm": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "type_vocab_size": 2,
}
JINA_ALIBI = SIZES | {
    "model_type": "bert",
    "architectures": ["JinaBertModel"],
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
}
MODERNBERT = SIZES | {"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"]}
EUROBERT = SIZES | {"model_type": "eurobert", "architectures": ["EuroBertForSequenceClassification"]}
GTE = SIZES | {"model_type": "new", "architectures": ["NewModel"]}


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def assert_hidden_states(folder: Path, wanted: list[Tensor]) -> None:
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "task": "embed"}
    with LLM(str(folder), pooler_config={"pooling_type": "MEAN", "normalize": False}, **settings) as llm:
        outputs = llm.embed([{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False)
    for output, hidden in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), hidden.mean(0), atol=1e-5, rtol=1e-4)


def test_nomic_bert_has_sizes_under_older_names(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "nomic_bert")
    wanted = reference(folder, PROMPTS)
    assert_hidden_states(write_config(folder, OLDER_NOMIC), wanted)


def test_positions_that_nomic_bert_was_not_trained_for_are_not_there(tmp_path: Path) -> None:
    fields = OLDER_NOMIC | {"rotary_scaling_factor": 2, "max_trained_positions": 40}
    assert describe_model(load_hf_config(write_config(tmp_path, fields))).max_position_embeddings == 40


def test_the_older_form_of_gte_scales_its_rotary_frequencies(tmp_path: Path) -> None:
    same = {"rope_type": "linear", "factor": 8 ** (2 / 16), "rope_theta": 8 * 20000.0}
    folder = tiny_encoder(tmp_path, "gte", rope_parameters=same, type_vocab_size=0)
    wanted = reference(folder, PROMPTS)
    rope = {"rope_theta": 20000.0, "rope_scaling": {"type": "ntk", "factor": 8.0}, "position_embedding_type": "rope"}
    assert_hidden_states(write_config(folder, GTE | {"type_vocab_size": 0} | rope), wanted)


def test_jina_bert_lowers_scores_by_distance(tmp_path: Path) -> None:
    weights = jina_weights()
    save_file(weights, tmp_path / "model.safetensors")
    tiny_tokenizer().save_pretrained(tmp_path)
    write_config(tmp_path, JINA_ALIBI)
    assert_hidden_states(tmp_path, [jina_hidden(weights, prompt) for prompt in PROMPTS])


def jina_weights() -> dict[str, Tensor]:
    """Returns random weights with the names that Jina's folders have."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"word": (512, 64), "token_type": (2, 64)}
    found = {f"embeddings.{name}_embeddings.weight": shape for name, shape in shapes.items()}
    norms, block = ["embeddings.LayerNorm"], {"attention.self.query": (64, 64), "attention.self.key": (64, 64)}
    block |= {"attention.self.value": (64, 64), "attention.output.dense": (64, 64), "mlp.wo": (64, 96)}
    for layer in range(3):
        found |= {f"encoder.layer.{layer}.{name}.weight": shape for name, shape in block.items()}
        found |= {f"encoder.layer.{layer}.{name}.bias": shape[:1] for name, shape in block.items()}
        found[f"encoder.layer.{layer}.mlp.gated_layers.weight"] = (192, 64)
        norms += [f"encoder.layer.{layer}.{name}" for name in ("attention.output.LayerNorm", "mlp.layernorm")]
    weights = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in found.items()}
    for norm in norms:
        weights[f"{norm}.weight"] = 1 + torch.randn(64, generator=generator) * 0.15
        weights[f"{norm}.bias"] = torch.randn(64, generator=generator) * 0.15
    return weights


def jina_hidden(weights: dict[str, Tensor], prompt: list[int]) -> Tensor:
    """Returns the hidden states of the architecture of arXiv:2310.19923, section 3: ALiBi to both sides, GEGLU."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (64,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    embedded = weights["embeddings.word_embeddings.weight"][prompt]
    hidden = norm("embeddings.LayerNorm", embedded + weights["embeddings.token_type_embeddings.weight"][0])
    positions, slopes = torch.arange(len(prompt)), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    bias = -slopes[:, None, None] * (positions[:, None] - positions).abs()
    for layer in range(3):
        at = f"encoder.layer.{layer}."
        heads = [
            linear(f"{at}attention.self.{name}", hidden).unflatten(1, (4, 16)).transpose(0, 1)
            for name in ("query", "key", "value")
        ]
        attended = ((heads[0] @ heads[1].mT / 4 + bias).softmax(-1) @ heads[2]).transpose(0, 1).flatten(1)
        hidden = norm(f"{at}attention.output.LayerNorm", linear(f"{at}attention.output.dense", attended) + hidden)
        gate, up = linear(f"{at}mlp.gated_layers", hidden).chunk(2, dim=1)
        hidden = norm(f"{at}mlp.layernorm", linear(f"{at}mlp.wo", F.gelu(gate) * up) + hidden)
    return hidden


def test_a_bidirectional_llama_scores_the_mean_of_a_text(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "llama", "classes", num_labels=1)
    fields = json.loads((folder / "config.json").read_text())
    del fields["is_causal"]
    score, hidden = load_file(folder / "model.safetensors")["score.weight"], reference(folder, PROMPTS)
    name = {"architectures": ["LlamaBidirectionalForSequenceClassification"], "model_type": "llama_bidirec"}
    write_config(folder, fields | name | {"pooling": "avg", "temperature": 0.25})
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True) as llm:
        params = PoolingParams(use_activation=False)
        outputs = llm.classify([{"prompt_token_ids": prompt} for prompt in PROMPTS], pooling_params=params)
    for output, states in zip(outputs, hidden, strict=True):
        wanted = score @ states.mean(0) / 0.25
        torch.testing.assert_close(torch.tensor(output.outputs.probs), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        (OLDER_NOMIC, {"prenorm": True}),
        (OLDER_NOMIC, {"n_head": "4"}),
        (OLDER_NOMIC, {"rotary_emb_fraction": 0.5}),
        (OLDER_NOMIC, {"moe_every_n_layers": 2}),
        (OLDER_NOMIC, {"activation_function": "glu"}),
        (OLDER_NOMIC, {"rotary_emb_interleaved": True}),
        (GTE, {"logn_attention_scale": True}),
        (GTE, {"position_embedding_type": "absolute"}),
        (GTE, {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.5}}),
        (JINA_ALIBI, {"position_embedding_type": "absolute"}),
        (JINA_ALIBI, {"feed_forward_type": "original"}),
        (GTE, {"num_attention_heads": 0}),
        (EUROBERT, {"classifier_pooling": "late"}),
        (MODERNBERT, {"classifier_activation": "mish"}),
        (MODERNBERT, {"hidden_activation": "mish"}),
        (MODERNBERT, {"classifier_pooling": "max"}),
    ],
)
def test_a_value_that_is_not_implemented_is_named(
    tmp_path: Path, fields: dict[str, Any], changed: dict[str, Any]
) -> None:
    name = "rope_parameters" if "rope_scaling" in changed else next(iter(changed))
    with pytest.raises(UnsupportedModelError, match=name):
        describe_model(load_hf_config(write_config(tmp_path, fields | changed)))
