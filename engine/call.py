"""`Call`: one call of a method of `LLM`. It tokenises the prompts together and runs them until each has an output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from tqdm.auto import tqdm

from .engine import LLMEngine
from .errors import ConfigError, UserError, quote
from .inputs import Parsed, ParsedPrompt, attempt, encode_text
from .lora.request import LoRARequest, LoRARequests, check_lora_request
from .request import EngineOutput, Request, longest_first

__all__ = ["Call", "OnError", "as_list", "one_for_each"]

OnError = Literal["raise", "return"]

MakeRequest = Callable[..., Request]
"""The class of the requests of a call: `GenerateRequest` or `PoolingRequest`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a method of `LLM`, which runs all of its prompts.

    Attributes:
        engine: The engine that runs the prompts.
        request_ids: Iterator over unused request ids, which all calls of an `LLM` share.
        use_tqdm: Whether to show a progress bar, or a function that makes the bar as `tqdm` does.
        on_error: How the call treats a prompt that fails: ``"raise"`` ends the call with the error, ``"return"`` gives
            the prompt an output with the error.
    """

    engine: LLMEngine
    request_ids: Iterator[int]
    use_tqdm: bool | Callable[..., Any]
    on_error: OnError

    def __post_init__(self) -> None:
        if not isinstance(self.on_error, str) or self.on_error not in ("raise", "return"):
            raise ConfigError(f"on_error must be 'raise' or 'return'; got {quote(self.on_error)}")
        if not isinstance(self.use_tqdm, int | None) and not callable(self.use_tqdm):
            raise ConfigError(
                f"use_tqdm must be True, False or a function that makes a bar; got {quote(self.use_tqdm)}"
            )

    def tokenize(self, parsed: list[Parsed], add_special_tokens: bool = True, prefix: str | None = None) -> None:
        """Tokenises all prompts that are texts, together, and puts the results into the list `parsed`.

        Args:
            parsed: The prompts of the call. A text that the tokenizer cannot read is replaced by its error.
            add_special_tokens: Whether the tokenizer adds the special tokens that the model expects.
            prefix: Text in front of every text; None for the model's default prompt.
        """
        tokenizer = self.engine.tokenizer
        untokenized = {i: one for i, one in enumerate(parsed) if isinstance(one, ParsedPrompt) and one.is_text}
        if tokenizer is None or not untokenized:
            return
        texts = [one.text or "" for one in untokenized.values()]
        try:
            encoded = tokenizer.encode_batch(texts, add_special_tokens, prefix)
        except Exception:  # noqa: BLE001  # One unreadable text fails all texts, so each is tried alone.
            encoded = [attempt(encode_text, tokenizer, text, add_special_tokens, prefix) for text in texts]
        for (i, one), token_ids in zip(untokenized.items(), encoded, strict=True):
            parsed[i] = token_ids if isinstance(token_ids, UserError) else replace(one, token_ids=token_ids)

    def run(
        self,
        parsed: list[Parsed],
        make: MakeRequest,
        params: Sequence[Any],
        priority: Sequence[int] | None,
        lora_request: LoRARequests = None,
    ) -> list[Any]:
        """Runs the prompts and waits until each has an output.

        Args:
            parsed: The prompts.
            make: Class of the requests: `GenerateRequest` or `PoolingRequest`.
            params: Sampling or pooling parameters of each prompt, or the error that says why they cannot be used.
            priority: Priority of each prompt; prompts with lower numbers run first. None gives all priority 0.
            lora_request: Names the adapter of all prompts, or is a list with that of each; None for the model alone.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: A prompt or its parameters cannot be used, and `on_error` is ``"raise"``; or the engine has
                unfinished requests of another caller.
        """
        if self.engine.has_unfinished_requests():
            raise ConfigError(
                "the engine has unfinished requests of another caller: of a call that is still running in this thread, "
                "e.g. because its progress bar makes a call, or of llm_engine.add_request; finish or abort them first"
            )
        priorities = one_for_each("priorities", 0 if priority is None else priority, len(parsed))
        adapters = [attempt(_check_adapter, one) for one in one_for_each("lora_request", lora_request, len(parsed))]
        outputs: dict[str, EngineOutput] = {}
        requests = []
        for item, row_params, row_priority, adapter in zip(parsed, params, priorities, adapters, strict=True):
            request_id = str(next(self.request_ids))
            errors = [one for one in (item, row_params, adapter) if isinstance(one, UserError)]
            if errors or isinstance(item, UserError):
                named = None if isinstance(adapter, UserError) else adapter
                request = make(request_id, None, None, row_params, row_priority, lora_request=named)
                outputs[request_id] = self._failed(request, errors[0])
                continue
            extras: dict[str, Any] = {
                "cache_salt": item.cache_salt,
                "prompt_embeds": item.embeddings,
                "lora_request": adapter,
            }
            if item.num_first_tokens is not None:
                extras["num_first_tokens"] = item.num_first_tokens
            requests.append(make(request_id, item.text, item.token_ids, row_params, row_priority, **extras))
        try:
            num_added = sum([self._add(request, outputs) for request in longest_first(requests)])
            self._drain(num_added, outputs)
        except Exception:
            self.engine.abort(request.request_id for request in requests)
            raise
        except BaseException:  # Ctrl-C can interrupt the engine at any point, so its state is not trusted.
            self.engine.reset()
            raise
        return [outputs[request_id] for request_id in sorted(outputs, key=int)]

    def _failed(self, request: Request, error: UserError) -> EngineOutput:
        if self.on_error == "raise":
            raise error
        return request.failed(error)

    def _add(self, request: Request, outputs: dict[str, EngineOutput]) -> bool:
        try:
            self.engine.add_request(request)
        except UserError as error:
            outputs[request.request_id] = self._failed(request, error)
            return False
        return True

    def _drain(self, num_requests: int, outputs: dict[str, EngineOutput]) -> None:
        """Runs steps of the engine until every request has an output."""
        with Progress(num_requests, self.use_tqdm) as progress:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.error is not None and self.on_error == "raise":
                        raise output.error.to_exception()
                    outputs[output.request_id] = output
                    progress.count(output)


def _check_adapter(given: Any) -> LoRARequest | None:
    return None if given is None else check_lora_request(given)


def as_list(what: str, given: Any) -> Any:
    """Returns an array of numpy or torch as a list, and any other value as it is; `what` is its name, for the error."""
    if not hasattr(given, "tolist"):
        return given
    try:
        return given.tolist()
    except Exception as error:  # A tensor without numbers, e.g. on the meta device, raises errors of several kinds.
        raise ConfigError(f"{what} must hold values that can be read; {error!s:.200}; got {quote(given)}") from error


def one_for_each(what: str, given: Any, num_prompts: int) -> list[Any]:
    """Returns a list with one value for each prompt.

    Args:
        what: Name of the argument, for the error message.
        given: One value for all prompts, or a sequence with the value of each prompt.
        num_prompts: Number of prompts.

    Raises:
        ConfigError: The length of the sequence is not the number of prompts.
    """
    given = as_list(what, given)
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        return [given] * num_prompts
    if len(given) != num_prompts:
        raise ConfigError(f"The lengths of prompts ({num_prompts}) and {what} ({len(given)}) must be the same.")
    return list(given)


class Progress:
    """The progress bar of one call: it shows the finished requests, and prompt and output tokens per second."""

    def __init__(self, num_requests: int, use_tqdm: bool | Callable[..., Any]) -> None:
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = make(total=num_requests, desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm)
        self._num_in = 0
        self._num_out = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, output: EngineOutput) -> None:
        """Adds a finished request to the bar."""
        self._num_in += len(output.prompt_token_ids or ())
        self._num_out += output.num_generated_tokens
        elapsed_s = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_in / elapsed_s:.0f} toks/s, output: {self._num_out / elapsed_s:.0f} toks/s",
            refresh=False,
        )
        self._bar.update()
