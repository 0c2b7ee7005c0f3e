"""`CompletionBuilder`: makes the output of a request that generates, with texts, log-probabilities and durations."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from itertools import filterfalse

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
            return RequestOutput.from_error(
                request.request_id, failed, request.prompt, prompt_token_ids, request.lora_request
            )
        self._name_prompt_tokens(first)
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
            lora_request=request.lora_request,
        )

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        wants_logprobs = sequence.params.logprobs is not None
        token_ids = sequence.output_token_ids
        logprobs = sequence.logprobs[: len(token_ids)]  # Drops tokens drawn after the end.
        text, parts = self._text(sequence)
        total = None
        if wants_logprobs:
            self._name_tokens(logprobs, token_ids, parts)
            total = sum(entry[token_id].logprob for entry, token_id in zip(logprobs, token_ids, strict=True))
        return CompletionOutput(
            index=sequence.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=total,
            logprobs=logprobs if wants_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _text(self, sequence: Sequence) -> tuple[str, list[str]]:
        """Returns the text of a finished sequence, cut at the stop string or without the stop token, and its parts.

        There is a part for each output token if the request asks for log-probabilities. Joined, they are the text.
        """
        params = sequence.params
        if self.tokenizer is None or not params.detokenize:
            return "", []
        prompt_token_ids = sequence.token_ids[: sequence.num_prompt_tokens]
        token_ids = self._shown_token_ids(sequence)
        if sequence.matcher is not None and sequence.matcher.matched is not None:
            text = sequence.matcher.text
        else:
            text = self.tokenizer.decode(prompt_token_ids, token_ids, params.skip_special_tokens)
        if params.logprobs is None:
            return text, []
        parts = self.tokenizer.split(prompt_token_ids, token_ids, text, params.skip_special_tokens)
        return text, parts + [""] * (sequence.num_output_tokens - len(parts))

    def _shown_token_ids(self, sequence: Sequence) -> list[int]:
        token_ids = sequence.output_token_ids
        ends_with_stop = (
            sequence.finish_reason == "stop" and token_ids[-1:] and token_ids[-1] in sequence.stop_token_ids
        )
        return token_ids[:-1] if ends_with_stop and not sequence.params.include_stop_str_in_output else token_ids

    def _name_prompt_tokens(self, sequence: Sequence) -> None:
        """Gives each token in the log-probabilities of a prompt its text; joined, the prompt's tokens are its text."""
        if self.tokenizer is None or not sequence.params.detokenize or not sequence.prompt_logprobs:
            return
        token_ids = sequence.token_ids[: sequence.num_prompt_tokens]
        text = self.tokenizer.decode_ids(token_ids, skip_special_tokens=False)
        self._name_tokens(sequence.prompt_logprobs, token_ids, self.tokenizer.split([], token_ids, text, False))

    def _name_tokens(
        self, entries: abc.Sequence[dict[int, Logprob] | None], token_ids: list[int], parts: list[str]
    ) -> None:
        """Gives each token in log-probabilities its text: a chosen token its part, another one a spelling of its own.

        Args:
            entries: Log-probabilities of each position.
            token_ids: The token at each position.
            parts: Part of the text that each of these tokens adds; empty if tokens have no texts.
        """
        if self.tokenizer is None or not parts:
            return
        for entry, token_id, part in zip(entries, token_ids, parts, strict=True):
            taken = {part}
            for other_id, other in (entry or {}).items():
                spellings = [part] if other_id == token_id else self.tokenizer.spellings_of_token(other_id)
                other.decoded_token = next(filterfalse(taken.__contains__, spellings), spellings[-1])
                taken.add(other.decoded_token)

    def _entry(self, sequence: Sequence, scores: HostLogprobs, i: int, num_logprobs: int) -> dict[int, Logprob]:
        """Returns token id -> `Logprob` for row i of `scores`: the row's token first, then the most probable tokens.

        The texts of the tokens are added when the sequence has ended.
        """
        num_columns = scores.token_ids.shape[1] if num_logprobs == -1 else num_logprobs + 1
        token_ids = scores.token_ids[i, :num_columns].tolist()
        logprobs = scores.logprobs[i, :num_columns].tolist()
        entry: dict[int, Logprob] = {}
        for column, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            rank = column or int(scores.ranks[i])
            entry.setdefault(token_id, Logprob(logprob, rank))
        return entry
