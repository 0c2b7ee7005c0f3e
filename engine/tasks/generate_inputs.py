"""`SequenceMaker`: checks a request that generates against the model, and makes its sequences."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ..errors import SamplingParamsError
from ..inputs import ParsedPrompt, PromptReader, describe, hash_salt
from ..request import GenerateRequest
from ..sampling_params import SamplingParams
from ..sequence import Sequence
from ..structured.grammar import Grammar, Grammars
from ..text.detokenizer import StopStringMatcher
from ..text.spellings import NO_EDGES

__all__ = ["SequenceMaker", "derive_seed"]


@dataclass(frozen=True, slots=True)
class SequenceMaker:
    """Makes the sequences of requests that generate.

    Attributes:
        prompts: Reader that turns prompts into tokens.
        max_logprobs: Most log-probabilities that a request may ask for, for each token.
        eos_token_ids: The model's end-of-sequence tokens, the one of the tokenizer first.
        seed: Seed of the engine, from which the seeds of requests without a seed are derived.
        grammars: Compiler of the grammars that outputs follow; None if the engine has no tokenizer.
    """

    prompts: PromptReader
    max_logprobs: int
    eos_token_ids: list[int]
    seed: int
    grammars: Grammars | None = None

    def make(self, request: GenerateRequest) -> list[Sequence]:
        """Checks a request and returns a sequence for each of its n outputs.

        Raises:
            PromptError: The prompt cannot be run.
            SamplingParamsError: The sampling parameters do not fit the model.
        """
        params = request.sampling_params
        if not isinstance(params, SamplingParams):
            raise SamplingParamsError(f"sampling_params must be SamplingParams; got {describe(params)}")
        given = ParsedPrompt(request.prompt, request.prompt_token_ids, embeddings=request.prompt_embeds)
        prompt = self.prompts.read(given, num_new_tokens=1)
        params.check_against_model(self.prompts.vocab_size, self.max_logprobs)
        self._check_text_features(params)
        if prompt.spans:
            _check_no_prompt_ids(params)
        max_tokens_total = self._max_tokens_total(params, len(prompt.token_ids))
        seed = params.seed if params.seed is not None else derive_seed(self.seed, request.request_id)
        bad_word_edges = self._bad_word_edges(params)
        grammar = self._grammar(params)
        cache_salt = hash_salt(request.cache_salt)
        return [
            Sequence(
                request_id=request.request_id,
                index=index,
                # Only the first sequence scores the prompt; the others may take it from the prefix cache.
                params=params if index == 0 else params.clone(prompt_logprobs=None),
                seed=_wrap_int64(seed + index),
                token_ids=list(prompt.token_ids),
                num_prompt_tokens=len(prompt.token_ids),
                max_tokens_total=max_tokens_total,
                stop_token_ids=self._stop_token_ids(params),
                priority=request.priority,
                cache_salt=cache_salt,
                spans=prompt.spans,
                matcher=self._matcher(params, prompt.token_ids),
                bad_word_edges=bad_word_edges,
                grammar=grammar and grammar.copy(),
                # The log-probabilities of a prompt are known only if a step computes all of its tokens.
                reads_prefix_cache=index > 0 or params.prompt_logprobs is None,
            )
            for index in range(params.n)
        ]

    def _max_tokens_total(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        if params.max_tokens is None:
            room = self.prompts.max_model_len - num_prompt_tokens
            if params.min_tokens > room:
                raise SamplingParamsError(
                    f"min_tokens={params.min_tokens}, but a prompt of {num_prompt_tokens} tokens leaves room for {room}"
                )
            return self.prompts.max_model_len
        return min(self.prompts.max_model_len, num_prompt_tokens + params.max_tokens)

    def _check_text_features(self, params: SamplingParams) -> None:
        if self.prompts.tokenizer is None and (params.stop or params.bad_words):
            raise SamplingParamsError(
                "stop strings and bad_words need text, and the engine has no tokenizer (skip_tokenizer_init); "
                "use stop_token_ids or logit_bias"
            )

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if params.structured_outputs is None:
            return None
        if self.grammars is None:
            raise SamplingParamsError(
                "structured_outputs need to know the text of tokens, and the engine has no tokenizer "
                "(skip_tokenizer_init); construct it with one"
            )
        return self.grammars.start(params.structured_outputs)

    def _stop_token_ids(self, params: SamplingParams) -> dict[int, int | None]:
        """Returns the tokens that end a sequence -> the stop reason; None for the tokenizer's end-of-sequence token."""
        stops: dict[int, int | None] = {token_id: token_id for token_id in params.stop_token_ids or ()}
        if not params.ignore_eos:
            stops.update({token_id: token_id for token_id in self.eos_token_ids})
            stops.update(dict.fromkeys(self.eos_token_ids[:1]))
        return stops

    def _matcher(self, params: SamplingParams, prompt_token_ids: list[int]) -> StopStringMatcher | None:
        if self.prompts.tokenizer is None or not params.stop:
            return None
        return StopStringMatcher(
            self.prompts.tokenizer,
            prompt_token_ids,
            params.stop_strings,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=params.include_stop_str_in_output,
            special_tokens=self.prompts.tokenizer.special_tokens,
        )

    def _bad_word_edges(self, params: SamplingParams) -> np.ndarray:
        if self.prompts.tokenizer is None or not params.bad_words:
            return NO_EDGES
        edges = self.prompts.tokenizer.bad_word_edges(params.bad_words)
        # A tokenizer may have tokens that the model cannot draw. Sequences with the same words share one array.
        is_drawn = edges[:, 1] < self.prompts.vocab_size
        return edges if is_drawn.all() else edges[is_drawn]


def _check_no_prompt_ids(params: SamplingParams) -> None:
    """Raises if the parameters need the token ids of a prompt, which a prompt given as embeddings does not have."""
    if params.prompt_logprobs is not None or params.repetition_penalty != 1:
        raise SamplingParamsError(
            "prompt_logprobs and repetition_penalty need the tokens of the prompt, and prompt_embeds have none; drop "
            "them (presence_penalty and frequency_penalty count generated tokens only), or give prompt_token_ids. A "
            "model's generation_config.json may recommend a repetition_penalty: pass SamplingParams to leave it out"
        )


def derive_seed(seed: int, name: str) -> int:
    """Returns a signed 64-bit seed, a hash of the engine's seed and the name of the request."""
    digest = blake2b(f"{seed}:{name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
