"""Which task an engine has, and that all that is peculiar to a task is in its object."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from millrace.engine import LLM, EngineConfig, GenerateRequest, PoolingParams, PoolingRequest, SamplingParams
from millrace.engine.config import CHOICES
from millrace.engine.errors import ConfigError
from millrace.engine.inputs import PromptReader
from millrace.engine.models import load_hf_config
from millrace.engine.pooling.params import POOLING_TASKS
from millrace.engine.step.pooling_head import PoolingHead
from millrace.engine.tasks import choose
from millrace.engine.tasks.choose import TASKS, choose_task
from millrace.engine.tasks.embed import Embed
from millrace.engine.tasks.task import Task

CHOSEN = [
    ("LlamaForCausalLM", {}, "generate"),
    ("LlamaForCausalLM", {"runner": "generate"}, "generate"),
    ("LlamaForCausalLM", {"runner": "pooling"}, "embed"),
    ("LlamaForCausalLM", {"task": "embed"}, "embed"),
    ("LlamaModel", {}, "embed"),
    ("LlamaModel", {"runner": "pooling"}, "embed"),
    ("LlamaForSequenceClassification", {}, "classify"),
    ("LlamaForSequenceClassification", {"runner": "pooling"}, "classify"),
    ("LlamaForSequenceClassification", {"task": "embed"}, "embed"),
    ("LlamaForSequenceClassification", {"task": "score"}, "classify"),
    ("LlamaForSequenceClassification", {"task": "reward"}, "classify"),
    ("LlamaForCausalLM", {"task": "score"}, "embed"),
    ("LlamaForCausalLM", {"task": "token_embed"}, "embed"),
]
REFUSED = [
    ("LlamaForCausalLM", {"task": "reward"}, r"needs .* \*ForSequenceClassification, and .*; use runner='generate'"),
    ("LlamaForCausalLM", {"task": "classify"}, r"\*ForSequenceClassification, and .*; use runner='generate'"),
    ("LlamaModel", {"task": "classify"}, r"\*ForSequenceClassification, and .*; use runner='pooling'"),
    ("LlamaModel", {"runner": "generate"}, r"task='generate' needs .* \*ForCausalLM, and .*; use runner='pooling'"),
    ("LlamaForSequenceClassification", {"task": "generate"}, r"\*ForCausalLM, and .*; use runner='pooling'"),
]


@pytest.fixture
def chosen(tiny_model):
    """Returns a function: the task of an engine, from the architecture of its checkpoint and its settings."""
    folder = tiny_model("llama")

    def choose(architecture: str, settings: dict[str, str]) -> Task:
        hf_config = load_hf_config(folder, {"architectures": [architecture], "num_labels": 3})
        return choose_task(EngineConfig(model=str(folder), **settings), hf_config)

    return choose


@pytest.mark.parametrize(("architecture", "settings", "name"), CHOSEN)
def test_the_task_follows_from_the_checkpoint_and_the_settings(chosen, architecture, settings, name):
    assert chosen(architecture, settings).name == name


@pytest.mark.parametrize(("architecture", "settings", "message"), REFUSED)
def test_a_task_that_the_checkpoint_is_not_made_for_is_refused(chosen, architecture, settings, message):
    with pytest.raises(ConfigError, match=message):
        chosen(architecture, settings)


def test_every_task_has_a_name_that_settings_and_parameters_know():
    names = [name for task in TASKS for name in task.all_names()]
    assert {*names, "score", "reward"} == set(CHOICES["task"].values()) - {"auto"}
    assert [name for task in TASKS if task.runner == "pooling" for name in task.all_names()] == list(POOLING_TASKS)


REQUESTS = {
    "generate": GenerateRequest("0", None, [5, 6], SamplingParams(max_tokens=3)),
    "pooling": PoolingRequest("0", None, [5, 6], PoolingParams()),
}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"])
def test_a_handler_opens_requests_of_its_own_kind_only(chosen, architecture):
    task = chosen(architecture, {})
    handler = task.make_handler(PromptReader(None, vocab_size=100, max_model_len=8))
    (sequence,) = handler.open(REQUESTS[task.runner])
    assert sequence.token_ids == [5, 6] and sequence.reads_prefix_cache
    (other,) = REQUESTS.keys() - {task.runner}
    with pytest.raises(ConfigError) as caught:
        handler.open(REQUESTS[other])
    assert str(caught.value) == task.refusal and f"runner={other!r}" in task.refusal


def test_the_log_probabilities_of_a_prompt_are_not_read_from_the_prefix_cache(chosen):
    handler = chosen("LlamaForCausalLM", {}).make_handler(PromptReader(None, vocab_size=100, max_model_len=8))
    first, second = handler.open(GenerateRequest("0", None, [5, 6], SamplingParams(n=2, prompt_logprobs=1)))
    assert not first.reads_prefix_cache and second.reads_prefix_cache


@pytest.mark.parametrize(
    ("pooling_type", "asked", "reads"), [("LAST", None, True), ("LAST", True, False), ("MEAN", None, False)]
)
def test_a_vector_of_every_token_is_not_read_from_the_prefix_cache(chosen, pooling_type, asked, reads):
    task = chosen("LlamaModel", {"pooler_config": {"pooling_type": pooling_type}})
    handler = task.make_handler(PromptReader(None, vocab_size=100, max_model_len=8))
    params = PoolingParams(skip_reading_prefix_cache=asked)
    (sequence,) = handler.open(PoolingRequest("0", None, [5, 6], params))
    assert sequence.reads_prefix_cache is reads


class PositiveHead(PoolingHead):
    """Takes the sizes of the hidden numbers, without their signs."""

    def project(self, vectors: Tensor) -> Tensor:
        return super().project(vectors).abs()


class EmbedPositive(Embed):
    """A task that no module of the engine knows."""

    head_type = PositiveHead


def test_an_engine_runs_a_task_that_only_the_list_of_tasks_names(tiny_model, monkeypatch):
    folder, prompts = str(tiny_model("llama")), [[5, 6, 7], [8] * 40]
    settings = {"dtype": "float32", "runner": "pooling", "max_num_batched_tokens": 16}
    with LLM(folder, **settings) as llm:
        expected = [np.abs(one.outputs.embedding) for one in llm.embed(prompts, use_tqdm=False)]
    monkeypatch.setattr(choose, "TASKS", (choose.Generate, EmbedPositive, choose.Classify))
    with LLM(folder, **settings) as llm:
        got = [one.outputs.embedding for one in llm.embed(prompts, use_tqdm=False)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
