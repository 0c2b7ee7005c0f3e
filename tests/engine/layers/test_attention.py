"""What attention layers take from a spec beyond what today's families ask for: learned sinks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_checkpoint
from filling import load_weights
from millrace.engine.models import Decoder, describe_model, find_family, load_hf_config
from millrace.engine.models.spec import AttentionSpec
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.weights.checkpoint import load_dummy_weights
from millrace.engine.weights.model_slots import weight_slots
from paged import SCHEDULES, PagedSequences, random_sequences

CPU = torch.device("cpu")


def with_sinks(folder: Path, scores: float) -> Decoder:
    """Returns the model of a checkpoint, each of whose query heads has a sink with the same score."""
    config = load_hf_config(folder)
    spec = replace(describe_model(config), attention=AttentionSpec(sinks=True))
    model = Decoder(spec, dtype=torch.float32, device=CPU)
    plain = Decoder(describe_model(config), dtype=torch.float32, device=CPU)
    load_weights(plain, folder, find_family(config).weight_map(describe_model(config)))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"layers.{i}.attention.sinks" for i in range(spec.num_layers)] and not unexpected
    for name in missing:
        model.get_parameter(name).fill_(scores)
    return model


@torch.inference_mode()
def run(model: Decoder, schedule: str) -> torch.Tensor:
    return torch.cat(PagedSequences(model, random_sequences(), torch.float32).run(SCHEDULES[schedule]()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sink_takes_its_share_of_the_softmax(tmp_path: Path, schedule: str) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    config = load_hf_config(folder)
    plain = Decoder(describe_model(config), dtype=torch.float32, device=CPU)
    load_weights(plain, folder, find_family(config).weight_map(describe_model(config)))
    expected = run(plain, schedule)
    # A score of minus infinity has no share; one of 1e4 has all of it, so attention adds nothing to the residual.
    torch.testing.assert_close(run(with_sinks(folder, -torch.inf), schedule), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(with_sinks(folder, 1.0), schedule), expected, atol=1e-3)
    for layer in plain.layers:
        layer.attention.out.weight.zero_()
    torch.testing.assert_close(run(with_sinks(folder, 1e4), schedule), run(plain, schedule), rtol=1e-5, atol=1e-5)


def test_a_rank_has_the_sinks_of_its_heads(tmp_path: Path) -> None:
    config = load_hf_config(tiny_checkpoint(tmp_path, "llama"))
    spec = replace(describe_model(config), attention=AttentionSpec(sinks=True))
    parallel = ParallelContext.of_rank(1, tp_size=2, pp_size=1)
    model = Decoder(spec, dtype=torch.float32, device=CPU, parallel=parallel)
    load_dummy_weights(model)
    slot = weight_slots(model)["layers.0.attention.sinks"]
    assert slot.whole_shape == (spec.num_heads,)
    whole = torch.arange(spec.num_heads, dtype=torch.float32)
    slot.fill(slot.cut(whole))
    assert model.layers[0].attention.sinks.tolist() == whole[spec.num_heads // 2 :].tolist()
