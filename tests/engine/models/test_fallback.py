"""Models that run as modules of transformers give the tokens and log-probabilities of transformers, under pressure."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fallback import FALLBACKS, WITH_FAMILY, fallback_checkpoint, fallback_config, own_code_checkpoint, save_drawn
from millrace.engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from millrace.engine.llm import LLM
from millrace.engine.models import build_model, find_family
from millrace.engine.models.fallback import fallback_family
from millrace.engine.models.model_code import ModelCode
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.sampling_params import SamplingParams
from oracles import greedy, score_prompt

MAX_TOKENS = 9
OWN_LENGTHS = (1, 3, 9, 16, 25, 42, 30, 12, 5, 7, 31, 20, 2, 28, 33, 8)
NUM_BLOCKS = {
    **dict.fromkeys(("afmoe", "cohere2_moe", "exaone4", "exaone_moe", "granite_swa", "mimo_v2_flash"), 40),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), 40),
}
"""Blocks of models whose layers, all or some of them, see windows."""


def mixed_prompts() -> list[list[int]]:
    """Returns 16 prompts, every second of which begins with the same 21 tokens."""
    rng = random.Random(0)
    shared = [rng.randrange(3, 99) for _ in range(21)]
    return [shared * (i % 2) + [rng.randrange(3, 99) for _ in range(length)] for i, length in enumerate(OWN_LENGTHS)]


@pytest.mark.parametrize("model_type", [*FALLBACKS, *WITH_FAMILY])
def test_tokens_and_logprobs_equal_those_of_transformers(model_type, tmp_path):
    folder, prompts = fallback_checkpoint(tmp_path, model_type), mixed_prompts()
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    with LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        block_size=4,
        num_gpu_blocks_override=NUM_BLOCKS.get(model_type, 44),
        max_model_len=80,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        model_impl="transformers",
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        _, again = (llm.generate(prompts[1], params, use_tqdm=False)[0] for _ in range(2))
        llm.llm_engine.check_integrity()
        counters = llm.stats().counters
    assert counters.num_preemptions > 0, "the block pool was to be too small"
    assert counters.num_chunked_prefills > 0
    assert again.num_cached_tokens > 0
    assert again.outputs[0].token_ids == outputs[1].outputs[0].token_ids
    for output, reference in zip(outputs, greedy(folder, prompts, MAX_TOKENS), strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == reference.token_ids
        for step, entry in enumerate(completion.logprobs):
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(reference.logprobs[step, token_id].item(), abs=1e-3)


def test_a_module_of_transformers_computes_what_our_family_does(tiny_model):
    prompts = mixed_prompts()[:6]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    answers = []
    for impl in ("millrace", "transformers"):
        with LLM(str(tiny_model("gemma2")), dtype="float32", max_num_batched_tokens=20, model_impl=impl) as llm:
            answers.append(llm.generate(prompts, params, use_tqdm=False))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        for one, other in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert {i: e.logprob for i, e in one.items()} == pytest.approx(
                {i: e.logprob for i, e in other.items()}, abs=1e-4
            )


def test_code_of_the_folder_runs_only_if_it_is_trusted(tmp_path):
    folder, prompts = own_code_checkpoint(tmp_path / "wheel"), [[3, 4, 5], [9] * 17, [8]]
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_batched_tokens": 8}
    with pytest.raises(UnsupportedModelError, match=r"auto_map names.*trust_remote_code=True"):
        LLM(str(folder), **settings)
    with LLM(str(folder), trust_remote_code=True, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    expected = greedy(folder, prompts, 5, trust_remote_code=True)
    assert [output.outputs[0].token_ids for output in outputs] == [one.token_ids for one in expected]


def test_a_module_that_reads_other_tokens_by_itself_is_refused_when_it_is_loaded(tmp_path):
    folder = own_code_checkpoint(tmp_path / "mixing", mixes=0.5)
    with pytest.raises(UnsupportedModelError, match="something else in it reads other tokens"):
        LLM(str(folder), dtype="float32", skip_tokenizer_init=True, trust_remote_code=True)


def test_a_module_whose_own_forward_pass_fails_is_refused_when_it_is_loaded(tmp_path):
    folder = fallback_checkpoint(tmp_path, "minicpm3")
    overrides = {"num_key_value_heads": 2}  # The layers of this module have one key and value for each query head.
    with pytest.raises(UnsupportedModelError, match=r"MiniCPM3ForCausalLM.*fails on two short prompts"):
        LLM(str(folder), skip_tokenizer_init=True, model_impl="transformers", hf_overrides=overrides)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertLMHeadModel", {}, "attends to 3 of 3 tokens"),
    "codegen": ("CodeGenForCausalLM", {"n_embd": 48, "rotary_dim": 8}, "0 of its 2 layers go through the attention"),
    "diffllama": ("DiffLlamaForCausalLM", {"hidden_size": 48}, "attends twice"),
    "doge": ("DogeForCausalLM", {"hidden_size": 48}, "changes the masks"),
    "llama4_text": (
        "Llama4ForCausalLM",
        {"num_experts_per_tok": 1, "num_local_experts": 4, "attention_chunk_size": 8, "intermediate_size_mlp": 20},
        "chunked",
    ),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, "a state of another kind"),
    "musicgen": ("MusicgenForCausalLM", {}, "text configs"),
    "mamba": ("MambaForCausalLM", {}, "takes no position_ids"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_the_paged_attention_cannot_express_is_refused_before_weights_are_read(model_type):
    architecture, fields, reason = REFUSED[model_type]
    with pytest.raises(UnsupportedModelError, match=reason):
        fallback_family(getattr(transformers, architecture), fallback_config(model_type, architecture, **fields))


def test_frequencies_that_follow_from_the_longest_sequence_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match=r"'rope_parameters'.*dynamic"):
        find_family(fallback_config("jais2", "Jais2ForCausalLM", rope_parameters=rope))


def test_an_architecture_that_nothing_runs_names_the_nearest():
    config = fallback_config("arcee", "ArceForCausalLM")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*the nearest is ArceeForCausalLM"):
        find_family(config)


def test_model_impl_millrace_takes_our_families_only(tmp_path):
    folder = fallback_checkpoint(tmp_path, "jais2")
    with pytest.raises(UnsupportedModelError, match=r"Jais2ForCausalLM.*model_impl='millrace'"):
        LLM(str(folder), skip_tokenizer_init=True, model_impl="millrace")


def test_missing_unknown_and_misshapen_tensors_are_refused_by_name(tmp_path):
    folder = fallback_checkpoint(tmp_path, "minimax_m2")
    settings: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "model_impl": "transformers"}
    file = folder / "model.safetensors"
    whole = load_file(file)
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    for changed, message in (
        ({name: tensor for name, tensor in whole.items() if name != expert}, r"missing .*layers\.1.*experts\.3"),
        ({**whole, "model.layers.9.mlp.weight": torch.zeros(3)}, r"unexpected model\.layers\.9\.mlp\.weight"),
        ({**whole, expert: torch.zeros(56, 21)}, r"experts\.3\.w2\.weight has shape \[56, 21\].*\[56, 20\]"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=message):
            LLM(str(folder), **settings)


def test_linear_layers_are_quantised_as_our_own_are(tmp_path):
    folder = fallback_checkpoint(tmp_path, "jais2")
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True, quantization="int8") as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([mixed_prompts()[5]], params, use_tqdm=False)
    found = [
        entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], mixed_prompts()[5][1:], strict=True)
    ]
    expected = score_prompt(folder, mixed_prompts()[5])[range(len(found)), mixed_prompts()[5][1:]].tolist()
    assert found == pytest.approx(expected, abs=0.3)
    assert found != pytest.approx(expected, abs=1e-3), "nothing was rounded to 8 bits"


def test_prompts_embed_and_classify(tmp_path):
    prompt = mixed_prompts()[5]
    config = fallback_config("hunyuan_v1_dense", "HunYuanDenseV1ForSequenceClassification", num_labels=3)
    model = save_drawn(AutoModelForSequenceClassification.from_config(config), tmp_path).eval()
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        states, logits = model.model(inputs)[0][0, -1], model(inputs).logits[0]
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_batched_tokens": 16}
    with LLM(str(tmp_path), **settings) as llm:
        (classified,) = llm.classify([prompt], use_tqdm=False)
    assert classified.outputs.probs == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)
    with LLM(str(tmp_path), task="embed", **settings) as llm:
        (embedded,) = llm.embed([prompt], use_tqdm=False)
    assert embedded.outputs.embedding == pytest.approx((states / states.norm()).tolist(), abs=1e-4)


def test_two_ranks_divide_a_module_by_its_own_plan(tmp_path):
    folder, prompts = fallback_checkpoint(tmp_path, "exaone4"), mixed_prompts()[:6]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    settings: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_batched_tokens": 24}
    settings |= {"model_impl": "transformers", "device": "cpu"}
    with LLM(str(folder), tensor_parallel_size=2, **settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [one.outputs[0].token_ids for one in outputs] == [one.token_ids for one in greedy(folder, prompts, 4)]


@pytest.mark.parametrize(
    ("model_type", "place", "message"),
    [
        ("biogpt", (0, 2, 1), "tensor_parallel_size=2: BioGptForCausalLM .* has no plan for it"),
        ("minimax_m2", (0, 2, 1), "tensor_parallel_size=2: MiniMaxM2ForCausalLM .* asks for .*experts"),
        ("arcee", (0, 4, 1), "tensor_parallel_size=4: .*self_attn.* cannot divide its 4 query heads and 2"),
        ("arcee", (1, 1, 2), "pipeline_parallel_size=2: ArceeForCausalLM .* whose layers stay together"),
    ],
)
def test_what_the_plan_of_a_module_does_not_divide_is_refused(model_type, place, message):
    architecture, fields = {**FALLBACKS, **WITH_FAMILY}[model_type]
    config = fallback_config(model_type, architecture, **fields)
    ModelCode("transformers").attach(config)
    with pytest.raises(ConfigError, match=message):
        build_model(config, torch.float32, "meta", parallel=ParallelContext.of_rank(*place))


def test_prompts_may_be_embeddings_and_outputs_may_follow_a_grammar(tiny_model):
    settings = {"dtype": "float32", "model_impl": "transformers", "max_num_batched_tokens": 8}
    tokens = [7 + i for i in range(13)]
    table = load_file(tiny_model("llama") / "model.safetensors")["model.embed_tokens.weight"]
    with LLM(str(tiny_model("llama")), enable_prompt_embeds=True, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        by_id, by_embedding = (
            llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
            for prompt in ({"prompt_token_ids": tokens}, {"prompt_embeds": table[tokens]})
        )
        choice = SamplingParams(temperature=0, max_tokens=9, structured_outputs={"choice": ["mill", "wheel"]})
        (chosen,) = llm.generate(["Which?"], choice, use_tqdm=False)
    assert by_id == by_embedding
    assert chosen.outputs[0].text in ("mill", "wheel")


def test_a_config_with_its_code_can_be_shown_and_copied():
    config = fallback_config("arcee", "ArceeForCausalLM")
    family = find_family(config)
    assert "ArceeForCausalLM" in repr(config)
    assert find_family(copy.deepcopy(config)) is family
