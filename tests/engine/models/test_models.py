"""Every family against Hugging Face's own modules, through a paged cache with shuffled blocks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import FAMILIES, tiny_checkpoint, tiny_config
from encoders import ENCODERS, encoder_name
from filling import load_weights
from millrace.engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from millrace.engine.layers import Linear, TokenEmbedding
from millrace.engine.models import (
    Decoder,
    build_model,
    describe_model,
    find_family,
    load_hf_config,
    load_model,
    supported_architectures,
)
from paged import SCHEDULES, PagedSequences, random_sequences, schedule_mixed

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-mlp-bias-tied": ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-dynamic-rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-gelu-gate": ("llama", {"hidden_act": "gelu"}),
    "mistral-tanh-gate": ("mistral", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral-full-attention": ("mistral", {"sliding_window": None}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma2-unbounded-biased": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "query_pre_attn_scalar": 64,
        },
    ),
    "cohere-biased": (
        "cohere",
        {"use_qk_norm": False, "attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "falcon-7b": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None, "tie_word_embeddings": True}),
    "falcon-11b": ("falcon", {"num_ln_in_parallel_attn": 1, "bias": True, "activation": "relu"}),
    "falcon-rw": (
        "falcon",
        {
            "new_decoder_architecture": False,
            "num_kv_heads": None,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "gpt-neox-in-turn": (
        "gpt-neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "relu",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "factor": 2.0},
        },
    ),
    "mpt-unbounded": ("mpt", {"attn_config": {}, "tie_word_embeddings": False}),
    "phi-without-head-norms": ("phi", {"qk_layernorm": False, "num_key_value_heads": None, "hidden_act": "relu"}),
    "gpt-bigcode-all-heads": ("gpt-bigcode", {"multi_query": False, "scale_attn_weights": False, "n_inner": None}),
    "gpt2-unscaled": (
        "gpt2",
        {
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": False,
            "n_inner": None,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
    ),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "granite-hybrid-dense-rope": ("granite-hybrid", {"num_local_experts": 0, "position_embedding_type": "rope"}),
    "bamba-groups-biased": (
        "bamba",
        {
            "mamba_n_groups": 4,
            "mamba_d_conv": 3,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "deepseek-v2-greedy-biased": ("deepseek-v2", {"topk_method": "greedy", "q_lora_rank": 28, "attention_bias": True}),
    "deepseek-v3-dense-rope-halves": (
        "deepseek-v3",
        {"first_k_dense_replace": 2, "rope_interleave": False, "q_lora_rank": None, "rope_parameters": None},
    ),
    "nemotron-h-dense-biased": (
        "nemotron-h",
        {
            "layers_block_type": ["mlp", "full_attention", "linear_attention"],
            "mlp_hidden_act": "silu",
            "mlp_bias": True,
            "use_bias": True,
            "use_conv_bias": False,
        },
    ),
    "opt-gelu-no-final-norm": ("opt", {"activation_function": "gelu", "_remove_final_layer_norm": True}),
    "opt-bare": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return random_sequences()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = VARIANTS[request.param]
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), family, **overrides)


@pytest.fixture(scope="module")
def model(variant: Path) -> Decoder:
    return load_model(variant, load_hf_config(variant), torch.float32, "cpu")


def hugging_face_model(folder: Path) -> Any:
    """Loads the reference. Falcon's eager attention in transformers adds ALiBi twice, to the mask and to the scores."""
    implementation = "sdpa" if getattr(load_hf_config(folder), "alibi", False) else "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)


@pytest.fixture(scope="module")
def hugging_face_logits(variant: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    reference = hugging_face_model(variant)
    with torch.inference_mode():
        return [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.inference_mode()
def test_log_probabilities_equal_hugging_face(
    model: Decoder, hugging_face_logits: list[torch.Tensor], sequences: list[list[int]], schedule: str
) -> None:
    logits = PagedSequences(model, sequences, torch.float32).run(SCHEDULES[schedule]())
    for ours, theirs in zip(logits, hugging_face_logits, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_greedy_tokens_equal_hugging_face(model: Decoder, variant: Path) -> None:
    prompt, num_new_tokens = [5, 77, 301, 9, 42, 42, 130], 12
    reference = hugging_face_model(variant)
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=num_new_tokens, min_new_tokens=num_new_tokens, do_sample=False
    )[0].tolist()
    sequence = prompt + [0] * num_new_tokens
    pages = PagedSequences(model, [sequence], torch.float32)
    logits = pages.step({0: len(prompt)})[0][-1]
    for position in range(len(prompt), len(sequence)):
        logits[2] = -torch.inf  # min_new_tokens keeps the end-of-sequence token out of the reference
        sequence[position] = int(logits.argmax())
        logits = pages.step({0: 1})[0][-1]
    assert sequence == expected


@torch.inference_mode()
def test_bfloat16_stays_near_float32(
    variant: Path, hugging_face_logits: list[torch.Tensor], sequences: list[list[int]]
) -> None:
    model = load_model(variant, load_hf_config(variant), torch.bfloat16, "cpu")
    logits = PagedSequences(model, sequences, torch.bfloat16).run(schedule_mixed())
    assert all(ours.dtype == torch.float32 for ours in logits)
    cosine = torch.nn.functional.cosine_similarity(torch.cat(logits), torch.cat(hugging_face_logits), dim=-1)
    # Rounding sends a few tokens to other experts, and later tokens of the sequence attend to these. A state keeps the
    # rounding of all earlier tokens.
    share = 0.9 if model.spec.experts else 0.95 if model.spec.state else 1
    assert (cosine > 0.99).float().mean() >= share, cosine.min()
    assert cosine.min() > (0 if model.spec.experts else 0.98)


@torch.inference_mode()
def test_without_causality_a_token_sees_later_tokens_up_to_its_window(
    tmp_path: Path, sequences: list[list[int]]
) -> None:
    folder = tiny_checkpoint(tmp_path, "gemma2")
    config = load_hf_config(folder)
    spec = describe_model(config)
    spec = replace(spec, attention=replace(spec.attention, causal=False))
    model = Decoder(spec, dtype=torch.float32, device=torch.device("cpu"))
    load_weights(model, folder, find_family(config).weight_map(describe_model(config)), set())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for ours, tokens in zip(
        PagedSequences(model, sequences, torch.float32).run(SCHEDULES["prefill"]()), sequences, strict=True
    ):
        positions = torch.arange(len(tokens))
        outside = (positions[:, None] - positions).abs() >= config.sliding_window
        hidden = torch.zeros(1, 1, len(tokens), len(tokens)).masked_fill(outside, torch.finfo(torch.float32).min)
        masks = {"full_attention": torch.zeros_like(hidden), "sliding_attention": hidden}
        theirs = reference(torch.tensor([tokens]), attention_mask=masks).logits[0]
        torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_scale_of_an_embedding_is_rounded_to_its_dtype() -> None:
    embed = TokenEmbedding(5, 64, scale=3072**0.5, dtype=torch.bfloat16, device=torch.device("cpu"))
    embed.weight.normal_()
    expected = embed.weight * torch.tensor(55.5, dtype=torch.bfloat16)
    assert torch.equal(embed(torch.arange(5)), expected)
    assert not torch.equal(expected, embed.weight * 3072**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_linear_computes_the_same(dtype: torch.dtype, bias: bool) -> None:
    device = torch.device("cpu")
    linear = Linear(72, {"gate": 40, "up": 24}, bias=bias, dtype=dtype, device=device)
    for _, slot in linear.slots():
        slot.fill(torch.randn(slot.shape))
    rows = torch.randn(33, 100, dtype=dtype)
    plain = [linear(x) for x in (rows[:, :72], rows[:1, 20:92], rows[:0, :72])]
    linear.pack()
    packed = [linear(x) for x in (rows[:, :72], rows[:1, 20:92], rows[:0, :72])]
    torch.testing.assert_close(packed, plain, atol=1e-4 if dtype == torch.float32 else 0.25, rtol=1e-2)


def test_every_architecture_has_a_checkpoint_to_test_it() -> None:
    tested = {architecture for _, architecture, _ in FAMILIES.values()} | {encoder_name(name) for name in ENCODERS}
    # The checkpoints of the hub's own code are in test_encoder_folders.py, those of T5's heads in test_encoders.py.
    beside = {"NewModel", "JinaBertModel", "LlamaBidirectionalModel"} | {"T5ForTokenClassification"}
    others = {"LLaMAForCausalLM", "MT5ForTokenClassification"} | beside
    assert set(supported_architectures()) - tested == others


def test_an_unknown_architecture_names_the_supported_and_the_nearest() -> None:
    config = tiny_config("llama", architectures=["LlamaForCausaLM"])
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausaLM.*OPTForCausalLM.*nearest is LlamaForCausalLM"):
        build_model(config, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "hidden_act", "relu"),
        ("llama", "num_key_value_heads", 3),
        ("llama", "quantization_config", {"quant_method": "awq"}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rms_norm_eps", None),
        ("llama", "rms_norm_eps", float("inf")),
        ("llama", "rms_norm_eps", 1e30),
        ("llama", "hidden_size", 2**40),
        ("llama", "max_position_embeddings", None),
        ("llama", "is_causal", "no"),
        ("qwen3", "use_bidirectional_attention", 1),
        ("qwen2", "layer_types", ["full_attention", "linear_attention", "full_attention"]),
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", [[], {}, None]),
        ("qwen2", "layer_types", 3),
        ("gemma2", "hidden_activation", "relu"),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "attn_logit_softcapping", -1.0),
        ("gemma2", "final_logit_softcapping", True),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("ministral3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("granite", "residual_multiplier", 0),
        ("granite", "logits_scaling", None),
        ("smollm3", "no_rope_layers", [1, 0]),
        ("smollm3", "no_rope_layers", [1, 0, "no"]),
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("bloom", "slow_but_exact", True),
        ("bloom", "seq_length", 0),
        ("cohere", "logit_scale", None),
        ("cohere", "use_qk_norm", None),
        ("cohere2", "sliding_window", None),
        ("falcon", "num_kv_heads", 3),
        ("falcon", "num_ln_in_parallel_attn", 3),
        ("falcon", "parallel_attn", False),
        ("falcon", "alibi", None),
        ("gpt-neox", "num_attention_heads", 5),
        ("gpt-neox", "use_parallel_residual", None),
        ("gptj", "rotary_dim", 5),
        ("gptj", "rotary_dim", 18),
        ("gptj", "tie_word_embeddings", True),
        ("codegen", "n_head", 2),
        ("mpt", "no_bias", False),
        ("mpt", "expansion_ratio", 2),
        ("mpt", "norm_type", "rmsnorm"),
        ("phi", "qk_layernorm", None),
        ("phi", "tie_word_embeddings", True),
        ("gpt-bigcode", "multi_query", None),
        ("gpt-bigcode", "add_cross_attention", True),
        ("gpt2", "n_head", 5),
        ("gpt2", "activation_function", "tanh"),
        ("gpt2", "add_cross_attention", True),
        ("deepseek-v2", "norm_topk_prob", True),
        ("deepseek-v2", "topk_method", "noaux_tc"),
        ("deepseek-v2", "moe_layer_freq", 2),
        ("deepseek-v3", "scoring_func", "softmax"),
        ("deepseek-v3", "quantization_config", {"quant_method": "fp8", "weight_block_size": [128]}),
        ("glm4-moe-lite", "mlp_layer_types", ["sparse", "hash"]),
        ("deepseek-v3", "rope_parameters", {**FAMILIES["deepseek-v3"][2]["rope_parameters"], "factor": None}),
        ("youtu", "kv_lora_rank", None),
        ("youtu", "num_key_value_heads", 2),
        ("youtu", "v_head_dim", 17),
        ("youtu", "head_dim", 8),
        ("youtu", "qk_rope_head_dim", 5),
        ("minicpm3", "attention_bias", True),
        ("minicpm3", "scale_depth", 0),
        ("bamba", "time_step_limit", (0.01, float("inf"))),
        ("bamba", "hidden_act", "gelu"),
        ("granite-hybrid", "position_embedding_type", "alibi"),
        ("granite-hybrid", "layer_types", ["linear_attention", "sliding_attention"]),
        ("qwen3.5", "linear_num_key_heads", 3),
        ("qwen3-next", "hidden_act", "gelu"),
        ("bamba", "mamba_d_conv", 5),
        ("bamba", "mamba_n_groups", 3),
        ("nemotron-h", "layers_block_type", ["linear_attention", "full_attention", "moee"]),
        ("nemotron-h", "layers_block_type", ["linear_attention", "mlp", "moe"]),
        ("nemotron-h", "time_step_limit", (0.0, 0.1)),
        ("nemotron-h", "moe_latent_size", 20),
        ("nemotron-h", "n_shared_experts", 2),
        ("nemotron-h", "mlp_hidden_act", "silu"),
        ("nemotron-h", "attention_bias", True),
        ("nemotron-h", "sliding_window", 6),
        ("nemotron-h", "tie_word_embeddings", True),
        ("opt", "num_attention_heads", 5),
        ("opt", "activation_function", "swoosh"),
        ("opt", "do_layer_norm_before", None),
        ("mixtral", "hidden_act", "relu"),
        ("mixtral", "num_experts_per_tok", 6),
        ("qwen3-moe", "mlp_only_layers", "0"),
        ("qwen3-moe", "decoder_sparse_step", 0),
        ("glm4-moe", "n_group", 5),
        ("glm4-moe", "topk_group", 5),
        ("glm4-moe", "first_k_dense_replace", 3),
        ("glm4-moe", "routed_scaling_factor", None),
        ("granite-moe-shared", "shared_intermediate_size", -1),
        ("ernie4_5-moe", "use_bias", True),
        ("ernie4_5-moe", "moe_layer_start_index", None),
        ("mellum", "rope_parameters", {**FAMILIES["mellum"][2]["rope_parameters"], "full_attention": None}),
    ],
)
def test_a_config_value_that_is_not_implemented_is_named(family: str, field: str, value: Any) -> None:
    config = tiny_config(family)
    target = config.rope_parameters if field == "partial_rotary_factor" else config.__dict__
    target[field] = value
    with pytest.raises(UnsupportedModelError, match=field):
        build_model(config, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", False),
        ("attn_type", "multiquery_attention"),
        ("prefix_lm", True),
        ("qk_ln", True),
        ("attn_uses_sequence_id", True),
        ("softmax_scale", -1.0),
        ("clip_qkv", -1.0),
    ],
)
def test_a_value_of_mpts_inner_config_that_is_not_implemented_is_named(field: str, value: Any) -> None:
    config = tiny_config("mpt")
    config.attn_config.__dict__[field] = value
    with pytest.raises(UnsupportedModelError, match=field):
        build_model(config, torch.float32, "cpu")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7, "rope_theta": 1e4},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8, "rope_theta": 1e4},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "rope_theta": 1e4},
        {"rope_type": "spiral", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "default"},
        {"rope_type": "default", "rope_theta": float("inf")},
        {"rope_type": "default", "rope_theta": float("nan")},
        {"rope_type": "default", "rope_theta": 1e-320},
        {"rope_type": "default", "rope_theta": 10**400},
        {"rope_type": "default", "rope_theta": True},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": float("inf")},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": None},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": "2"},
    ],
)
def test_rope_parameters_that_are_not_implemented_are_named(rope: dict[str, Any]) -> None:
    config = tiny_config("llama")
    config.rope_parameters = rope
    with pytest.raises(UnsupportedModelError, match="rope_"):
        build_model(config, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}},
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0},
        ),
    ],
)
def test_old_and_new_rope_fields_mean_the_same(
    tmp_path: Path, written: dict[str, Any], expected: dict[str, Any]
) -> None:
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **written}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rope = load_hf_config(tmp_path).rope_parameters
    assert {name: rope[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rope_theta": 9.0}, {"rope_type": "llama3", "rope_theta": 9.0, "factor": 8.0}),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, {"rope_type": "default", "rope_theta": 3.0}),
    ],
)
def test_overrides_reach_rope_in_either_form(
    tmp_path: Path, overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    tiny_config("llama3-rope").save_pretrained(tmp_path)
    rope = load_hf_config(tmp_path, overrides).rope_parameters
    assert {name: rope[name] for name in expected} == expected
    assert ("low_freq_factor" in rope) == (expected["rope_type"] == "llama3")


def test_a_model_type_with_the_fields_of_another_is_read_as_that(tmp_path: Path) -> None:
    tiny_config("deepseek-v3").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "kimi_k2"}))
    assert describe_model(load_hf_config(tmp_path)) == describe_model(tiny_config("deepseek-v3"))


def test_an_override_that_no_config_has_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    load_hf_config(tmp_path, {"rope_theta": 5.0, "num_hidden_layers": 1, "layer_types": None, "head_dim": 16})
    assert not caplog.text
    load_hf_config(tmp_path, {"hidden_sizes": 5})
    assert "hf_overrides sets 'hidden_sizes', which no Qwen3Config has; did you mean 'hidden_size'?" in caplog.text


def test_overrides_replace_fields(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    config = load_hf_config(tmp_path, {"num_hidden_layers": 1, "layer_types": None, "max_position_embeddings": 99})
    spec = build_model(config, torch.float32, "cpu").spec
    assert (spec.num_layers, spec.max_position_embeddings) == (1, 99)


def test_a_config_inside_of_a_config_is_merged(tmp_path: Path) -> None:
    text = tiny_config("gemma2", num_hidden_layers=2).to_dict() | {"model_type": "gemma3_text"}
    fields = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    overrides = {"text_config": {"num_hidden_layers": 1, "layer_types": None}, "image_token_index": 7}
    config = load_hf_config(tmp_path, overrides)
    assert (config.text_config.num_hidden_layers, config.text_config.head_dim) == (1, text["head_dim"])
    assert config.image_token_index == 7


def test_a_function_changes_the_config_and_may_name_the_architecture(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(fields))

    def change(config: Any) -> Any:
        config.architectures, config.num_hidden_layers = ["LlamaForCausalLM"], 1
        return config

    assert build_model(load_hf_config(tmp_path, change), torch.float32, "cpu").spec.num_layers == 1
    with pytest.raises(CheckpointError, match=r"architectures=None; .* are needed"):
        load_hf_config(tmp_path, lambda config: config)
    with pytest.raises(ConfigError, match="must return the config; it returned None"):
        load_hf_config(tmp_path, lambda config: None)
    with pytest.raises(ConfigError, match="the function hf_overrides failed: ZeroDivisionError"):
        load_hf_config(tmp_path, lambda config: 1 / 0)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "default"}, 256),
    ],
)
def test_scaled_rope_stretches_the_length(rope: dict[str, Any], expected: int) -> None:
    config = tiny_config("llama", rope_parameters={**rope, "rope_theta": 1e4})
    assert build_model(config, torch.float32, "cpu").spec.max_position_embeddings == expected


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_a_damaged_config_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": ["llama"], "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "architectures": [3]},
        {"model_type": "llama", "architectures": "LlamaForCausalLM"},
    ],
)
def test_a_config_of_no_model_says_so(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="does not say which model"):
        load_hf_config(tmp_path)
    complete = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert load_hf_config(tmp_path, complete).architectures == ["LlamaForCausalLM"]


def test_a_model_type_transformers_does_not_know_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="'lama'"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "wide"),
        ("num_labels", 2**31),
        ("num_hidden_layers", 2**31),
        ("rope_scaling", [2.0]),
        ("rope_parameters", "yarn"),
    ],
)
def test_a_value_that_no_config_can_have_says_so(tmp_path: Path, field: str, value: Any) -> None:
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], field: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match=field):
        load_hf_config(tmp_path)


def test_packing_frees_the_plain_weights_but_not_a_tied_embedding(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3")
    model = load_model(folder, load_hf_config(folder), torch.float32, "cpu")
    names = {name for name, _ in model.named_parameters()}
    assert "embed_tokens.weight" in names
    if torch.backends.mkldnn.is_available():
        assert not any("qkv.weight" in name or "lm_head" in name for name in names)


def test_checkpoints_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = (tiny_checkpoint(tmp_path / name, "llama", seed=3) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    shutil.rmtree(second)
    other = tiny_checkpoint(second, "llama", seed=4)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
