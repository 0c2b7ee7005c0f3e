"""The task that draws tokens until a stop token, a stop string or the length limit: `Generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from ..config import EngineConfig
from ..inputs import PromptReader
from ..loading.generation_config import read_eos_token_ids, read_generation_config
from ..loading.model_source import resolve_model
from ..models.decoder import Decoder
from ..outputs import RequestOutput
from ..request import GenerateRequest
from ..sequence import Sequence
from ..step.head import Head, StepResult
from ..step.tables import Tables
from ..step.token_head import TokenHead
from ..step_plan import StepPlan
from ..structured.grammar import Grammars
from .generate_inputs import SequenceMaker
from .generate_outputs import CompletionBuilder
from .task import RequestHandler, Task

__all__ = ["Generate", "GenerateHandler"]


@dataclass(frozen=True)
class Generate(Task):
    """Draws tokens.

    Attributes:
        config: The engine's settings.
        hf_config: The model's config.
    """

    name = "generate"
    runner = "generate"
    architecture_ending = "ForCausalLM"
    model_head = "lm_head"
    decodes = True
    request_type = GenerateRequest
    refusal = "this engine generates text; construct it with runner='pooling' to embed or classify"

    config: EngineConfig
    hf_config: Any

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """As `Task.create`."""
        return cls(config, hf_config)

    def make_head(self, model: Decoder, tables: Tables) -> Head:
        """As `Task.make_head`."""
        return TokenHead(model, tables)

    def make_handler(self, prompts: PromptReader) -> GenerateHandler:
        """As `Task.make_handler`."""
        tokenizer = prompts.tokenizer
        advice = read_generation_config(resolve_model(self.config.model))
        eos_token_ids = read_eos_token_ids(tokenizer, advice, self.hf_config.to_dict())
        grammars = None if tokenizer is None else Grammars(tokenizer, prompts.vocab_size, eos_token_ids)
        return GenerateHandler(self, prompts, eos_token_ids, grammars)


class GenerateHandler(RequestHandler[GenerateRequest, Sequence]):
    """Serves requests to generate.

    Args:
        task: The task.
        prompts: Turns prompts into tokens.
        eos_token_ids: The model's end-of-sequence tokens, the tokenizer's own first.
        grammars: Compiles the grammars that outputs follow; None without a tokenizer.
    """

    def __init__(
        self, task: Generate, prompts: PromptReader, eos_token_ids: list[int], grammars: Grammars | None = None
    ) -> None:
        super().__init__(task, prompts)
        config = task.config
        self.grammars = grammars
        self._sequences = SequenceMaker(prompts, config.max_logprobs, eos_token_ids, config.seed, grammars)
        self._outputs = CompletionBuilder(prompts.tokenizer)

    def make_sequences(self, request: GenerateRequest) -> list[Sequence]:
        """As `RequestHandler.make_sequences`: one for each of the request's n outputs."""
        return self._sequences.make(request)

    def make_output(self, request: GenerateRequest, sequences: list[Sequence]) -> RequestOutput:
        """As `RequestHandler.make_output`."""
        return self._outputs.build(request, sequences)

    def prepare(self, plan: StepPlan) -> None:
        """As `RequestHandler.prepare`: adds the tokens that grammars allow."""
        if self.grammars is not None and self.grammars.is_used:
            plan.token_masks = self.grammars.masks(sequence.grammar for sequence in plan.sampled)

    def record(self, plan: StepPlan, result: StepResult) -> None:
        """As `RequestHandler.record`: keeps log-probabilities."""
        self._outputs.record_logprobs(plan, result)
