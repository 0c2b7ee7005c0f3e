"""`CompletionBuilder`: makes the output of a request that generates, with texts, log-probabilities and durations."""

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
    """Makes the outputs of requests from their sequences.

    Attributes:
        tokenizer: Tokenizer that decodes the tokens; None if the engine has none, so that all texts are empty.
    """

    tokenizer: Tokenizer | None

    def record_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        """Stores the log-probabilities of a step in the sequences of the requests that asked for them."""
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
        """Makes the output of a request after all of its sequences have ended, or after one has failed."""
        first = sequences[0]
        prompt_token_ids = first.token_ids[: first.num_prompt_tokens]
        wants_scores = request.sampling_params.prompt_logprobs is not None
        if (failed := first_error(sequences)) is not None:
            return RequestOutput.from_error(request.request_id, failed, request.prompt, prompt_token_ids)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=prompt_token_ids,
            # The first entry is always None, because no token stands before it. A prompt of one token has no other.
            prompt_logprobs=(first.prompt_logprobs or [None]) if wants_scores else None,
            outputs=[self._completion(sequence) for sequence in sequences],
            finished=True,
            metrics=metrics_of(sequences),
            num_cached_tokens=first.num_cached_tokens,
        )

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        wants_logprobs = sequence.params.logprobs is not None
        token_ids = sequence.output_token_ids
        logprobs = sequence.logprobs[: len(token_ids)]  # Drops tokens drawn after the end.
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
        """Returns the text of a finished sequence: cut at the stop string, or without the stop token."""
        params = sequence.params
        if self.tokenizer is None or not params.detokenize:
            return ""
        if sequence.matcher is not None and sequence.matcher.matched is not None:
            return sequence.matcher.text
        token_ids = sequence.output_token_ids
        ends_with_stop = (
            sequence.finish_reason == "stop" and token_ids[-1:] and token_ids[-1] in sequence.stop_token_ids
        )
        if ends_with_stop and not params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        prompt_token_ids = sequence.token_ids[: sequence.num_prompt_tokens]
        return self.tokenizer.decode(prompt_token_ids, token_ids, params.skip_special_tokens)

    def _entry(self, sequence: Sequence, scores: HostLogprobs, i: int, num_logprobs: int) -> dict[int, Logprob]:
        """Returns token id -> `Logprob` for row i of `scores`: the row's token first, then the most probable tokens."""
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
