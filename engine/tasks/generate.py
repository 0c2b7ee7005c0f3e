"""`Generate`: the task that draws tokens until a stop token, a stop string or the length limit."""

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
from ..sampling_params import SamplingParams
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
    """The task that generates text: the engine draws one token after another until a sequence ends.

    Attributes:
        config: Settings of the engine.
        hf_config: Config of the model.
    """

    name = "generate"
    runner = "generate"
    architecture_endings = ("ForCausalLM", "LMHeadModel")
    model_head = "lm_head"
    decodes = True
    request_type = GenerateRequest
    refusal = "this engine generates text; construct it with runner='pooling' to embed or classify"

    config: EngineConfig
    hf_config: Any

    @classmethod
    def create(cls, config: EngineConfig, hf_config: Any) -> Self:
        """Makes the task, see `Task.create`."""
        return cls(config, hf_config)

    def make_head(self, model: Decoder, tables: Tables) -> Head:
        """Makes the head that draws tokens, see `Task.make_head`."""
        return TokenHead(model, tables)

    def make_handler(self, prompts: PromptReader) -> GenerateHandler:
        """Makes the handler; reads the model's end-of-sequence tokens. See `Task.make_handler`."""
        tokenizer = prompts.tokenizer
        advice = read_generation_config(resolve_model(self.config.model, self.config.hub))
        own = getattr(self.hf_config, "eos_token_id", None)
        eos_token_ids = read_eos_token_ids(tokenizer, prompts.vocab_size, advice.get("eos_token_id"), own)
        grammars = None if tokenizer is None else Grammars(tokenizer, prompts.vocab_size, eos_token_ids)
        return GenerateHandler(self, prompts, eos_token_ids, grammars)


class GenerateHandler(RequestHandler[GenerateRequest, Sequence]):
    """Handles requests that generate: makes n sequences of each, and an output with texts and log-probabilities.

    Args:
        task: The task of the engine.
        prompts: Reader that turns prompts into tokens.
        eos_token_ids: The model's end-of-sequence tokens, the one of the tokenizer first.
        grammars: Compiler of the grammars that outputs follow; None if the engine has no tokenizer.
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
        """Makes one sequence for each of the request's n outputs, see `RequestHandler.make_sequences`."""
        return self._sequences.make(request)

    def probe_request(self) -> GenerateRequest:
        """Returns a request that draws one token after a prompt of one, see `RequestHandler.probe_request`."""
        return GenerateRequest("probe", None, [0], SamplingParams(max_tokens=1, detokenize=False))

    def make_output(self, request: GenerateRequest, sequences: list[Sequence]) -> RequestOutput:
        """Makes the output with texts and log-probabilities, see `RequestHandler.make_output`."""
        return self._outputs.build(request, sequences)

    def prepare(self, plan: StepPlan) -> None:
        """Adds the token masks of sequences that follow a grammar to the plan, see `RequestHandler.prepare`."""
        if self.grammars is not None and self.grammars.is_used:
            plan.token_masks = self.grammars.masks(sequence.grammar for sequence in plan.sampled)

    def record(self, plan: StepPlan, result: StepResult) -> None:
        """Stores the step's log-probabilities in the sequences, see `RequestHandler.record`."""
        self._outputs.record_logprobs(plan, result)
