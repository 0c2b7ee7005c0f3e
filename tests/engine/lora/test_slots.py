"""Adapters in the adapter slots of a model: each token gets the products of its own adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import tiny_checkpoint
from millrace.engine.batch import ForwardBatch
from millrace.engine.lora.adapter import Adapter, LowRank
from millrace.engine.lora.routing import NO_SLOT, Routing, pack_routing
from millrace.engine.lora.slots import SlotSizes
from millrace.engine.models import Decoder, ModelOptions, load_hf_config, load_model
from millrace.engine.models.options import DEFAULT_OPTIONS
from paged import SCHEDULES, PagedSequences, random_sequences

WITH_SLOTS = replace(DEFAULT_OPTIONS, adapter_slots=SlotSizes(num_slots=3, max_rank=8))
NAMES = {
    "attention.qkv.query": "self_attn.q_proj",
    "attention.qkv.key": "self_attn.k_proj",
    "attention.qkv.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate_up.gate": "mlp.gate_proj",
    "mlp.gate_up.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class RoutedSequences(PagedSequences):
    """Sequences of which each has an adapter slot, or none."""

    slots: tuple[int, ...] = ()

    def batch(self, num_scheduled_tokens: dict[int, int]) -> ForwardBatch:
        """Sets the routing of the step, which stays until the next one."""
        of_tokens = np.repeat([self.slots[i] for i in num_scheduled_tokens], list(num_scheduled_tokens.values()))
        assert self.model.adapters is not None
        packed = torch.from_numpy(pack_routing(of_tokens, 3, len(of_tokens) + 2))
        self.model.adapters.routing = Routing(packed, 3)
        return super().batch(num_scheduled_tokens)

    def step(self, num_scheduled_tokens: dict[int, int]) -> dict[int, torch.Tensor]:
        """As in the base class, whose logits are computed without adapters."""
        hidden = self.model(self.batch(num_scheduled_tokens), self.kv_cache)
        assert self.model.adapters is not None
        self.model.adapters.routing = None
        logits = self.model.compute_logits(hidden).split(list(num_scheduled_tokens.values()))
        for index, count in num_scheduled_tokens.items():
            self.num_computed_tokens[index] += count
        return dict(zip(num_scheduled_tokens, logits, strict=True))


def random_adapter(model: Decoder, seed: int, rank: int, parts: set[str]) -> Adapter:
    """Returns an adapter of random matrices for some parts of all layers."""
    assert model.adapters is not None
    random = torch.Generator().manual_seed(seed)
    updates = {
        name: LowRank(torch.randn(rank, columns, generator=random) / 8, torch.randn(rows, rank, generator=random) / 8)
        for layer in model.adapters.layers
        for name, (rows, columns) in layer.parts.items()
        if name.split(".", 2)[-1] in parts
    }
    return Adapter(f"adapter-{seed}", bytes([seed]), updates, 0)


def merged(folder: Path, adapter: Adapter) -> Path:
    """Writes a copy of a checkpoint of Llama with an adapter added to its matrices."""
    copy = folder.parent / f"{folder.name}-{adapter.name}"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    for name, update in adapter.updates.items():
        _, index, part = name.split(".", 2)
        tensors[f"model.layers.{index}.{NAMES[part]}.weight"] += update.b @ update.a
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def load(folder: Path, options: ModelOptions) -> Decoder:
    return load_model(folder, load_hf_config(folder), torch.float32, "cpu", options)


@torch.inference_mode()
@pytest.mark.parametrize("schedule", ["prefill", "mixed"])
def test_each_sequence_is_computed_as_by_the_model_with_its_adapter_merged(tmp_path: Path, schedule: str) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    model, sequences = load(folder, WITH_SLOTS), random_sequences()
    assert model.adapters is not None
    targets = [{"attention.qkv.query", "attention.qkv.value", "mlp.gate_up.up"}, set(NAMES), {"mlp.down"}]
    adapters = [
        random_adapter(model, seed, rank, parts)
        for seed, (rank, parts) in enumerate(zip((3, 8, 1), targets, strict=True))
    ]
    model.adapters.load(1, random_adapter(model, 9, 8, set(NAMES)))  # What is in a slot before leaves no trace.
    for slot, adapter in enumerate(adapters):
        model.adapters.load(slot, adapter)
    paged = RoutedSequences(model, sequences, torch.float32)
    paged.slots = (1, NO_SLOT, 0, 2, 1)
    ours = paged.run(SCHEDULES[schedule]())
    wanted = {slot: load(merged(folder, adapter), DEFAULT_OPTIONS) for slot, adapter in enumerate(adapters)}
    wanted[NO_SLOT] = load(folder, DEFAULT_OPTIONS)
    for index, slot in enumerate(paged.slots):
        expected = PagedSequences(wanted[slot], sequences, torch.float32).run(SCHEDULES["prefill"]())[index]
        torch.testing.assert_close(ours[index].log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_step_without_adapters_is_the_same_to_the_bit_as_without_slots(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    with_slots = PagedSequences(load(folder, WITH_SLOTS), random_sequences(), torch.float32)
    without = PagedSequences(load(folder, DEFAULT_OPTIONS), random_sequences(), torch.float32)
    for ours, wanted in zip(with_slots.run(SCHEDULES["mixed"]()), without.run(SCHEDULES["mixed"]()), strict=True):
        assert torch.equal(ours, wanted)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_layer_adds_the_products_of_adapters_in_full(tmp_path: Path, quantization: str) -> None:
    model = load(tiny_checkpoint(tmp_path, "llama"), replace(WITH_SLOTS, quantization=quantization))
    assert model.adapters is not None
    adapter = random_adapter(model, 1, 8, set(NAMES))
    model.adapters.load(2, adapter)
    layer = model.layers[0].attention.qkv
    x = torch.randn(5, model.spec.hidden_size, generator=torch.Generator().manual_seed(2))
    without = layer(x)
    with model.adapters.routed(Routing(torch.from_numpy(pack_routing(np.array([2, -1, 2, 2, -1]), 3, 5)), 3)):
        changed = layer(x)
    updates = [adapter.updates[f"layers.0.attention.qkv.{part}"] for part in ("query", "key", "value")]
    added = torch.cat([x @ update.a.t() @ update.b.t() for update in updates], dim=1)
    added[[1, 4]] = 0
    torch.testing.assert_close(changed, without + added, atol=1e-5, rtol=1e-5)


def test_the_routing_lists_the_tokens_of_each_slot_and_leaves_out_those_without_an_adapter() -> None:
    routing = Routing(torch.from_numpy(pack_routing(np.array([2, -1, 0, 2, 0, -1]), 4, 8)), 4)
    assert routing.starts.tolist() == [0, 2, 2, 4, 4]
    assert routing.tokens[:4].tolist() == [2, 4, 0, 3]
    assert len(routing.tokens) == 8
