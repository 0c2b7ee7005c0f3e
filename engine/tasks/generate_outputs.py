"""Builds the output of a request that generates: text, log-probabilities and times."""

from __future__ import annotations

from dataclasses import dataclass

from ..outputs import CompletionOutput, Logprob, RequestOutput
from ..request import GenerateRequest
from ..sequence import Sequence
from ..step.head import HostLogprobs, StepResult
from ..step_plan import StepPlan
from ..text.tokenizer import Tokenizer
from .task import first_error, metrics_of

__all__ = ["CompletionBuilder"]


@dataclass(frozen=True, slots=True)
class CompletionBuilder:
    """Turns sequences into outputs.

    Attributes:
        tokenizer: Turns tokens into text; without one the text is empty.
    """

    tokenizer: Tokenizer | None

    def record_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        """Keeps the log-probabilities that a step gave, in the sequences that asked for them."""
        if result.logprobs is not None:
            for i, sequence in enumerate(plan.owners(result.num_drawn)):
                if sequence.params.logprobs is not None and not sequence.is_finished and result.drawn[i] >= 0:
                    sequence.logprobs.append(self._entry(sequence, result.logprobs, i, sequence.params.logprobs))
        for i, scores in result.prompt_logprobs.items():
            sequence = plan.sequences[i]
            num_logprobs = sequence.params.prompt_logprobs
            assert num_logprobs is not None
            if not sequence.prompt_logprobs:
                sequence.prompt_logprobs = [None] * sequence.num_prompt_tokens
            for j in range(len(scores.ranks)):
                entry = self._entry(sequence, scores, j, num_logprobs)
                sequence.prompt_logprobs[plan.starts[i] + 1 + j] = entry

    def build(self, request: GenerateRequest, sequences: list[Sequence]) -> RequestOutput:
        """Builds the output of a request whose sequences have ended, or of which one has failed."""
        first = sequences[0]
        prompt_token_ids = first.token_ids[: first.num_prompt_tokens]
        wants_scores = request.sampling_params.prompt_logprobs is not None
        if (failed := first_error(sequences)) is not None:
            return RequestOutput.from_error(request.request_id, failed, request.prompt, prompt_token_ids)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=prompt_token_ids,
            # A prompt of one token has nothing to score: its only entry is the first, which is always None.
            prompt_logprobs=(first.prompt_logprobs or [None]) if wants_scores else None,
            outputs=[self._completion(sequence) for sequence in sequences],
            finished=True,
            metrics=metrics_of(sequences),
            num_cached_tokens=first.num_cached_tokens,
        )

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        wants_logprobs = sequence.params.logprobs is not None
        token_ids = sequence.output_token_ids
        logprobs = sequence.logprobs[: len(token_ids)]  # A step may have drawn tokens after the last one.
        total = None
        if wants_logprobs:
            total = sum(entry[token_id].logprob for entry, token_id in zip(logprobs, token_ids, strict=True))
        return CompletionOutput(
            index=sequence.index,
            text=self._text(sequence),
            token_ids=token_ids,
            cumulative_logprob=total,
            logprobs=logprobs if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _text(self, sequence: Sequence) -> str:
        """Makes the text once; a stop string has already cut it, a stop token has no place in it."""
        params = sequence.params
        if self.tokenizer is None or not params.detokenize:
            return ""
        if sequence.matcher is not None and sequence.matcher.matched is not None:
            return sequence.matcher.text
        token_ids = sequence.output_token_ids
        if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        prompt_token_ids = sequence.token_ids[: sequence.num_prompt_tokens]
        return self.tokenizer.decode(prompt_token_ids, token_ids, params.skip_special_tokens)

    def _entry(self, sequence: Sequence, scores: HostLogprobs, i: int, num_logprobs: int) -> dict[int, Logprob]:
        """Makes the entry of one position: the token itself first, then the most probable ones."""
        num_columns = scores.token_ids.shape[1] if num_logprobs == -1 else num_logprobs + 1
        token_ids = scores.token_ids[i, :num_columns].tolist()
        logprobs = scores.logprobs[i, :num_columns].tolist()
        has_text = self.tokenizer is not None and sequence.params.detokenize
        entry: dict[int, Logprob] = {}
        for column, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            rank = column or int(scores.ranks[i])
            text = self.tokenizer.token_text(token_id) if self.tokenizer is not None and has_text else None
            entry.setdefault(token_id, Logprob(logprob, rank, text))
        return entry
