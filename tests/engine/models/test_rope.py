"""Rotary parameters of configs: of a part of each head, by layer type, in two lists. Families test the maths too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints import tiny_checkpoint, tiny_config
from millrace.engine.errors import UnsupportedModelError
from millrace.engine.layers import RotateAndStore, StoreOnly
from millrace.engine.llm import LLM
from millrace.engine.models import Decoder, ModelOptions, describe_model, load_hf_config, load_model
from millrace.engine.models.rope import rope_fields, rope_spec
from millrace.engine.sampling_params import SamplingParams
from oracles import greedy
from paged import PagedSequences, random_sequences, schedule_by

KINDS = ["sliding_attention", "full_attention"]
BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def config_with(rope: Any, **fields: Any) -> Any:
    config = tiny_config("mistral", layer_types=KINDS, **fields)
    config.rope_parameters = rope
    return config


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_a_part_of_a_head_is_rotated_where_the_architecture_can(scaling: dict[str, Any]) -> None:
    config = config_with({**scaling, "rope_theta": 1e4, "partial_rotary_factor": 0.25})
    frequencies = [theta / scaling.get("factor", 1.0) for theta in (1.0, 0.1, 0.01, 0.001)]
    assert rope_spec(config, partial=True).inv_freq == pytest.approx(frequencies)
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        rope_spec(config)


@pytest.mark.parametrize("factor", [0, 1.5, 0.1, 0.01, None, "half", float("nan"), True])
def test_a_part_that_is_no_even_part_is_refused(factor: Any) -> None:
    config = config_with({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor})
    with pytest.raises(UnsupportedModelError, match=r"'head_dim' and 'partial_rotary_factor' are 32 and"):
        rope_spec(config, partial=True)


def test_each_layer_type_has_its_own_frequencies() -> None:
    local, whole = rope_fields(config_with(BY_TYPE))["layer_ropes"]
    assert local == rope_spec(config_with(BY_TYPE["sliding_attention"]))
    assert whole == rope_spec(config_with(BY_TYPE["full_attention"]))
    assert rope_fields(config_with({**BY_TYPE, "full_attention": None}))["layer_ropes"] == (local, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": BY_TYPE["full_attention"]},
        {**BY_TYPE, "rope_theta": 1e4},
        {**BY_TYPE, "full_attention": {"rope_type": "spiral", "rope_theta": 1e4}},
        {**BY_TYPE, "full_attention": "default"},
    ],
)
def test_entries_by_layer_type_that_are_not_complete_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="rope_parameters"):
        rope_fields(config_with(rope))


def test_layers_with_the_same_parameters_share_one_table() -> None:
    spec = describe_model(tiny_config("llama", num_hidden_layers=4))
    slow = replace(spec.rope, inv_freq=tuple(f / 2 for f in spec.rope.inv_freq))
    spec = replace(spec, rope=None, layer_ropes=(spec.rope, slow, None, spec.rope))
    first, second, third, last = (
        layer.attention.rotate_and_store
        for layer in Decoder(spec, dtype=torch.float32, device=torch.device("meta")).layers
    )
    assert isinstance(first, RotateAndStore) and isinstance(second, RotateAndStore) and isinstance(third, StoreOnly)
    assert first.table is last.table and first.table is not second.table


def test_overrides_by_layer_type_replace_the_fields_of_older_configs(tmp_path: Path) -> None:
    fields = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps({**fields, **old}))
    assert load_hf_config(tmp_path).rope_parameters == {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    assert load_hf_config(tmp_path, {"rope_parameters": BY_TYPE}).rope_parameters == BY_TYPE
    with pytest.raises(UnsupportedModelError, match="rope_parameters"):
        rope_fields(load_hf_config(tmp_path, {"rope_theta": 7.0}))


LIMIT = 8
"""Tokens up to which transformers uses the short list of frequencies of `two_lists`."""


@pytest.fixture(scope="module")
def two_lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longrope")
    return tiny_checkpoint(folder, "phi3", original_max_position_embeddings=LIMIT, sliding_window=None)


@pytest.mark.parametrize("max_model_len", [LIMIT, LIMIT + 1, None])
@torch.inference_mode()
def test_the_longest_possible_sequence_chooses_between_two_lists(two_lists: Path, max_model_len: int | None) -> None:
    options = ModelOptions(max_model_len=max_model_len)
    model = load_model(two_lists, load_hf_config(two_lists), torch.float32, "cpu", options)
    reference = AutoModelForCausalLM.from_pretrained(two_lists, dtype=torch.float32, attn_implementation="eager")
    sequences = random_sequences()
    compared = 0
    for ours, tokens in zip(
        PagedSequences(model, sequences, torch.float32).run(schedule_by(6)), sequences, strict=True
    ):
        if (len(tokens) > LIMIT) is (max_model_len != LIMIT):
            theirs = reference(torch.tensor([tokens])).logits[0]
            torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=0)
            compared += 1
    assert compared >= 2


def test_the_engine_says_which_list_it_uses(two_lists: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [[5, 77, 301, 9, 42, 42, 130, 8, 201], [44, 6, 88]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    short, long = LIMIT, LIMIT + 8
    tokens = {}
    for max_model_len in (short, long):
        caplog.clear()
        given = prompts[1:] if max_model_len == short else prompts[:1]
        with LLM(str(two_lists), dtype="float32", device="cpu", max_model_len=max_model_len) as llm:
            tokens[max_model_len] = llm.generate(given, params, use_tqdm=False)[0].outputs[0].token_ids
        assert (f"max_model_len={long}" in caplog.text and f"set max_model_len={LIMIT}" in caplog.text) is (
            max_model_len == long
        )
    longer, shorter = greedy(two_lists, prompts, 4)
    assert tokens == {short: shorter.token_ids, long: longer.token_ids}


def test_older_configs_of_longrope_mean_the_same(tmp_path: Path, two_lists: Path) -> None:
    config = load_hf_config(two_lists)
    fields = json.loads((two_lists / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    old = {name: rope[name] for name in ("short_factor", "long_factor")}
    written = {**fields, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": {**old, "type": "longrope"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert describe_model(load_hf_config(tmp_path)) == describe_model(config)


def test_the_old_fields_of_gpt_neox_are_read(tmp_path: Path) -> None:
    fields = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 64}
    fields |= {"num_attention_heads": 4, "num_hidden_layers": 2, "rotary_pct": 0.5, "rotary_emb_base": 100}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rope = describe_model(load_hf_config(tmp_path)).rope
    assert rope is not None and rope.inv_freq == pytest.approx([1, 100**-0.25, 100**-0.5, 100**-0.75])
