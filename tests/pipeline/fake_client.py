"""The engine side of a pipeline without an engine: the output is the prompt, read back.

A prompt that begins with a word of these is not answered:

fail               the request fails in the engine
dead               the pool dies
undecodable        the output is a token that no tokenizer knows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from millrace.engine import CompletionOutput, GenerateRequest, RequestOutput, SamplingParams
from millrace.engine.errors import EmptyPromptError, EngineDeadError, NumericalError


class EchoClient:
    """Answers requests backwards, last one first, as an engine may."""

    def __init__(self, pool_name: str = "") -> None:
        self.seen: list[GenerateRequest] = []

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        self.seen += requests
        for request in reversed(requests):
            yield self._answer(request)

    def _answer(self, request: GenerateRequest) -> RequestOutput:
        text = request.prompt if request.prompt is not None else FakeTokenizer().decode([], request.prompt_token_ids)
        prompt_token_ids = request.prompt_token_ids or [ord(letter) for letter in text]
        if text.startswith("dead"):
            raise EngineDeadError("no replica is left")
        if text.startswith("fail"):
            return RequestOutput.from_error(request.request_id, NumericalError("NaN in the logits"), text)
        if not prompt_token_ids:
            return RequestOutput.from_error(request.request_id, EmptyPromptError("the prompt has no token"), text)
        sequences = [echo(index, text, request.sampling_params) for index in range(request.sampling_params.n)]
        return RequestOutput(request.request_id, request.prompt, prompt_token_ids, None, sequences, True)


class ForgetfulClient(EchoClient):
    """Loses the last request."""

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        yield from super().generate(requests[:-1])


def echo(index: int, text: str, params: SamplingParams) -> CompletionOutput:
    """Returns one sequence: the text in capitals, its number, and a stop token."""
    answer = f"{text.upper()}{index}"
    token_ids = [*(ord(letter) for letter in answer), 0]
    if text.startswith("undecodable"):
        token_ids = [-1, 0]
    return CompletionOutput(index, answer if params.detokenize else "", token_ids, finish_reason="stop")


class FakeTokenizer:
    """A token is a letter. A text with a zero byte fails the whole call, as a broken text fails a batch."""

    special_tokens = frozenset({"[TOOL_CALLS]"})

    def __init__(self) -> None:
        self.num_calls = 0

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        self.num_calls += 1
        if any("\0" in text for text in texts):
            raise UnicodeError("a text holds a zero byte")
        return [[*([1] if add_special_tokens else []), *(ord(letter) for letter in text)] for text in texts]

    def decode(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        text = "".join(chr(token_id) for token_id in output_token_ids if token_id > 1)
        return text.replace("[TOOL_CALLS]", "") if skip_special_tokens else text

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, continue_final_message: bool = False, **kw: Any
    ) -> str:
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return text + ("" if continue_final_message else "<assistant>") + "".join(f"{k}={v}" for k, v in kw.items())


class FakePool:
    """A pool that only counts how often it was closed."""

    def __init__(self) -> None:
        self.name = "fake"
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1

    def stats(self, with_engines: bool = False) -> None:
        return None
