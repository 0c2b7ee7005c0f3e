"""Engines of many ranks give what one process gives. Real processes, gloo and shared memory, tiny models on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from checkpoints import tiny_checkpoint, tiny_classifier
from millrace.engine.errors import CheckpointError, ConfigError
from millrace.engine.llm import LLM
from millrace.engine.models.decoder import Decoder
from millrace.engine.outputs import RequestOutput
from millrace.engine.parallel import rendezvous
from millrace.engine.sampling_params import SamplingParams
from oracles import greedy

pytestmark = pytest.mark.slow

PROMPTS = [[5 + i % 7, 30, 31, 32, *range(40, 40 + 9 * (i % 4))] for i in range(9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1)
SAMPLED = [
    SamplingParams(
        temperature=0.8, top_p=0.9, seed=i, max_tokens=10, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.1
    )
    for i in range(len(PROMPTS))
]
# Prompts are cut into chunks, and blocks are so few that requests are preempted.
SETTINGS = {"dtype": "float32", "device": "cpu", "max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 64}
NUM_BLOCKS = {"exaone4": 36, "phi3": 10, "mistral": 10, "qwen2": 36, "gemma2": 24}
"""Blocks of families with windows, whose sequences hold few but in each group of layers; the others have 18."""


def few_blocks(folder: Path) -> dict[str, int]:
    """Returns settings of a KV cache in which the prompts do not all fit; the folder has the family's name."""
    return {"num_gpu_blocks_override": NUM_BLOCKS.get(folder.name, 18), "block_size": 4}


def generate(folder: Path, **kwargs) -> tuple[list[RequestOutput], list[RequestOutput]]:
    with LLM(str(folder), **SETTINGS, **few_blocks(folder), **kwargs) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False), llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
        llm.llm_engine.check_integrity()
        assert llm.stats().counters.num_preemptions > 0
        return outputs


def assert_same(ours: list[RequestOutput], theirs: list[RequestOutput]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        (one,), (two,) = mine.outputs, other.outputs
        assert one.token_ids == two.token_ids and one.text == two.text
        for a, b in ((one.logprobs, two.logprobs), (mine.prompt_logprobs, other.prompt_logprobs)):
            for x, y in zip(a or [], b or [], strict=True):
                assert (x is None) == (y is None)
                for token_id, logprob in (x or {}).items():
                    assert token_id in (y or {}), "another token is among the best"
                    assert logprob.logprob == pytest.approx(y[token_id].logprob, abs=1e-4)


# Every rank is a process that imports torch, so a case costs half a minute of a core. The quick cases place ranks in
# every way: for a family without windows, one with a window, one with both kinds of layers, one with latents and
# experts, and one with states.
QUICK = [("llama", 2, 2), ("mistral", 1, 2), ("gemma2", 2, 1), ("deepseek-v3", 2, 2), ("bamba", 2, 2)]
SLOW = [
    ("llama", 2, 1),
    ("llama", 1, 2),
    ("mistral", 2, 1),
    ("mistral", 2, 2),
    ("qwen2", 1, 2),
    ("qwen3", 4, 1),
    ("gemma2", 2, 2),
    ("olmo2", 4, 1),
    ("phi3", 2, 2),
    ("exaone4", 2, 2),
    ("bamba", 2, 1),
    ("bamba", 1, 2),
    ("qwen3-next", 2, 1),
    ("qwen3-next", 1, 2),
    ("nemotron-h", 2, 2),
    ("opt", 2, 1),
    ("opt", 1, 2),
    ("opt", 2, 2),
    ("opt-350m", 2, 2),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.soak) for case in SLOW)]


@pytest.fixture(scope="module")
def one_process(tiny_model):
    """What one process gives, by family."""
    known: dict[str, tuple[list[RequestOutput], list[RequestOutput]]] = {}

    def run(family: str) -> tuple[list[RequestOutput], list[RequestOutput]]:
        if family not in known:
            known[family] = generate(tiny_model(family))
        return known[family]

    return run


@pytest.mark.parametrize(("family", "tp_size", "pp_size"), CASES)
def test_many_ranks_give_what_one_gives(tiny_model, one_process, family: str, tp_size: int, pp_size: int) -> None:
    sizes = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}
    for ours, theirs in zip(generate(tiny_model(family), **sizes), one_process(family), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "whole"),
    [
        (2, 1, True),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in ((2, 1, False), (1, 2, False), (2, 2, True))),
    ],
)
def test_experts_of_many_ranks_give_what_one_gives(
    tiny_model, one_process, tp_size: int, pp_size: int, whole: bool
) -> None:
    folder = tiny_model("qwen3-moe")
    ranks = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size, "enable_expert_parallel": whole}
    for ours, theirs in zip(generate(folder, **ranks), one_process("qwen3-moe"), strict=True):
        assert_same(ours, theirs)


def test_saved_experts_are_whole_or_slices(tiny_model, tmp_path: Path) -> None:
    with LLM(str(tiny_model("qwen3-moe")), **SETTINGS, tensor_parallel_size=2, enable_expert_parallel=True) as llm:
        llm.save_sharded_state(tmp_path)
    with safe_open(tmp_path / "model-rank-1-part-0.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".experts." in name]  # noqa: SIM118
        assert {name.split(".experts.")[1].split(".")[0] for name in names} == {"3", "4", "5"}
        assert file.get_tensor("layers.1.mlp.experts.3.gate.weight").shape == (24, 64)


@pytest.mark.parametrize(
    ("family", "tp_size", "pp_size"), [("llama", 2, 1), pytest.param("opt-350m", 2, 2, marks=pytest.mark.soak)]
)
def test_embeddings_of_a_prompt_reach_all_ranks(tiny_model, family: str, tp_size: int, pp_size: int) -> None:
    folder = tiny_model(family)
    table = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings()
    mixed = [{"prompt_embeds": table(torch.tensor(ids))} if i % 2 else ids for i, ids in enumerate(PROMPTS)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sizes = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size, "enable_prompt_embeds": True}
    runs = []
    for prompts, kwargs in ((PROMPTS, {}), (mixed, sizes)):
        with LLM(str(folder), **SETTINGS, **few_blocks(folder), **kwargs) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm.stats().counters.num_preemptions > 0
        runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("sizes", [pytest.param((2, 1), marks=pytest.mark.soak), (1, 2)])
def test_all_ranks_keep_to_a_grammar(tiny_model, sizes: tuple[int, int]) -> None:
    asked = [None, {"regex": "(?:[a-z]{3} ?){4}"}, {"choice": ["yes", "no"]}]
    params = [SamplingParams(seed=i, max_tokens=12, structured_outputs=asked[i % 3]) for i in range(len(PROMPTS))]
    ranks = dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), sizes, strict=True))
    runs = []
    for kwargs in ({}, ranks):
        with LLM(str(tiny_model("llama")), **SETTINGS, **kwargs) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        runs.append([output.outputs[0].token_ids for output in outputs])
        assert {output.outputs[0].text for output in outputs[2::3]} <= {"yes", "no"}
    assert runs[0] == runs[1]


def test_ranks_draw_from_their_own_columns_of_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "llama", vocab_size=385)  # Rank 1 has one column fewer.
    params = [
        SamplingParams(temperature=(0, 0.8, 1.5)[i % 3], min_p=0.02 * (i % 2), seed=i, max_tokens=10, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    runs = []
    for kwargs in ({}, {"tensor_parallel_size": 2}):
        with LLM(str(folder), **SETTINGS, **kwargs) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        runs.append([output.outputs[0].token_ids for output in outputs])
        monkeypatch.setattr(Decoder, "gather_logits", None)  # Rank 0 gathers nothing in the second run.
    assert runs[0] == runs[1]


def test_without_shared_memory_sums_go_over_gloo(tiny_model, one_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "can_share_memory", lambda: False)  # Rank 0 decides for its stage.
    for ours, theirs in zip(generate(tiny_model("llama"), tensor_parallel_size=2), one_process("llama"), strict=True):
        assert_same(ours, theirs)


def test_three_stages_and_an_odd_vocabulary_match_transformers(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "qwen2", vocab_size=385)
    expected = greedy(folder, PROMPTS, 8)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 3}):
        with LLM(str(folder), **SETTINGS, **sizes) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [reference.token_ids for reference in expected]


def test_steps_of_all_stages_are_under_way_at_once(tiny_model) -> None:
    with LLM(str(tiny_model("llama")), **SETTINGS, pipeline_parallel_size=2) as llm:
        engine, depths = llm.llm_engine, []
        execute = engine.executor.execute

        def count(plan):
            handle = execute(plan)
            depths.append(len(engine._in_flight) + 1)
            return handle

        engine.executor.execute = count
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert max(depths) == 2 and depths.count(2) > len(depths) / 2


@pytest.mark.parametrize("sizes", [(1, 1), pytest.param((2, 1), marks=pytest.mark.soak), (2, 2)])
def test_saved_shards_are_loaded(tiny_model, one_process, tmp_path: Path, sizes: tuple[int, int]) -> None:
    ranks = dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), sizes, strict=True))
    with LLM(str(tiny_model("opt")), **SETTINGS, **ranks) as llm:
        llm.save_sharded_state(tmp_path / "saved")
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == [f"model-rank-{rank}-part-0.safetensors" for rank in range(sizes[0] * sizes[1])]
    with safe_open(tmp_path / "saved" / files[-1], framework="pt") as file:
        assert file.get_tensor("layers.1.mlp.up.weight").shape == (96 // sizes[0], 64)
        assert ("layers.0.mlp.up.weight" in file.keys()) == (sizes[1] == 1)  # noqa: SIM118
        assert "embed_tokens.weight" in file.keys()  # noqa: SIM118  # It is tied, so the last stage has it too.
    for ours, theirs in zip(
        generate(tmp_path / "saved", load_format="sharded_state", **ranks), one_process("opt"), strict=True
    ):
        assert_same(ours, theirs)


def test_what_cannot_be_saved_is_said_and_nothing_ends(tiny_model, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    with LLM(str(folder), **SETTINGS, load_format="dummy") as llm:
        for target, given in ((folder, str(folder)), (tmp_path, "load_format='dummy'")):
            with pytest.raises(ConfigError, match=given):
                llm.save_sharded_state(target)
        assert llm.generate(PROMPTS[:1], SAMPLED[0], use_tqdm=False)[0].error is None


def test_shards_of_other_ranks_are_refused(tiny_model, tmp_path: Path) -> None:
    with LLM(str(tiny_model("llama")), **SETTINGS, tensor_parallel_size=2) as llm:
        llm.save_sharded_state(tmp_path)
    with pytest.raises(ConfigError, match=r"saved for .*tensor_parallel_size=1"):
        LLM(str(tmp_path), **SETTINGS, load_format="sharded_state")
    (tmp_path / "model-rank-1-part-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no model-rank-1-part"):  # What rank 1 met, raised by rank 0.
        LLM(str(tmp_path), **SETTINGS, load_format="sharded_state", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("task", "tp_size", "pp_size"), [pytest.param("embed", 2, 1, marks=pytest.mark.soak), ("classify", 1, 2)]
)
def test_vectors_of_many_ranks_are_those_of_one(tmp_path, tiny_model, task, tp_size, pp_size):
    folder = tiny_model("qwen3") if task == "embed" else tiny_classifier(tmp_path, "llama", num_labels=3)
    vectors = []
    for kwargs in ({}, {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}):
        with LLM(str(folder), task=task, **{**SETTINGS, **kwargs}) as llm:
            outputs = llm.encode(PROMPTS, pooling_task=task, use_tqdm=False)
            vectors.append([output.outputs.data.tolist() for output in outputs])
    for ours, theirs in zip(*vectors, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["launched", "recorded"])
def test_two_gpus_give_what_one_gives(tiny_model, enforce_eager: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = {**SETTINGS, "device": "cuda", "enforce_eager": enforce_eager}
    runs = []
    for sizes in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with LLM(str(tiny_model("llama")), **settings, **sizes) as llm:
            outputs = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
            runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[1] == runs[0] and runs[2] == runs[0]
