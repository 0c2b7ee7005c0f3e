"""`LLM`: the engine for a script. Prompts in, outputs out, in the order of the prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tqdm.auto import tqdm

from .config import EngineConfig
from .engine import EngineStats, LLMEngine
from .errors import (
    ChatTemplateError,
    ConfigError,
    PromptTypeError,
    SamplingParamsError,
    UserError,
    unknown_key_message,
)
from .inputs import PromptType, encode_text, parse_prompt
from .outputs import RequestOutput
from .request import GenerateRequest
from .sampling_params import SamplingParams

OnError = Literal["raise", "return"]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model, ready to generate.

    Use it as a context manager, or call `close`, to give back the memory it took.

    Args:
        model: Folder of a model in Hugging Face's layout, or ``"bundled:NAME"``.
        **kwargs: Fields of `EngineConfig`; other settings of vLLM's `LLM` are taken with a warning where they change
            nothing here, and refused where they cannot be honoured.

    Raises:
        UserError: A setting, the model folder or the tokenizer cannot be used.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine.from_config(EngineConfig.from_kwargs(model=model, **kwargs))
        self._request_ids = itertools.count()

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[RequestOutput]:
        """Generates from prompts.

        Args:
            prompts: One prompt or a list: texts, lists of token ids, or dictionaries with `prompt` or
                `prompt_token_ids`.
            sampling_params: For all, or one for each; None for the model's recommended ones.
            use_tqdm: Whether to show progress, or what makes the progress bar.
            priority: One for each prompt, lower first.
            on_error: What a prompt that cannot be run, or fails, does: ``"raise"`` ends the call with its error before
                or while others run; ``"return"`` gives it an output with `error` set, and the others run.
            **vllm_kwargs: Further arguments of vLLM's method, with their neutral values.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: A prompt or its parameters cannot be used, and `on_error` is ``"raise"``.
        """
        _check_neutral("generate", vllm_kwargs)
        parsed = [_attempt(parse_prompt, prompt) for prompt in _as_prompts(prompts)]
        self._tokenize(parsed)
        return self._run(parsed, sampling_params, priority, use_tqdm, on_error)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[RequestOutput]:
        """Generates the next message of conversations.

        Args:
            messages: One conversation, a list of dictionaries with `role` and `content`, or a list of conversations.
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            chat_template: Jinja text that replaces the tokenizer's template.
            add_generation_prompt: Whether to open the assistant's turn.
            continue_final_message: Whether the last message is the beginning of the answer.
            tools: Descriptions of tools, for templates that take them.
            chat_template_kwargs: Further variables of the template; they count before the arguments above.
            priority: As in `generate`.
            on_error: As in `generate`.
            **vllm_kwargs: As in `generate`.

        Returns:
            One output for each conversation, in order.

        Raises:
            UserError: A conversation or its parameters cannot be used, and `on_error` is ``"raise"``.
        """
        _check_neutral("chat", vllm_kwargs)
        tokenizer = self.llm_engine.tokenizer
        if tokenizer is None:
            raise ConfigError("chat needs a tokenizer; construct the LLM without skip_tokenizer_init")
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }

        def render(conversation: Messages) -> tuple[str, list[int] | None]:
            return tokenizer.render_chat(conversation, **options), None

        parsed = [_attempt(render, conversation) for conversation in _as_conversations(messages)]
        # The template has written the special tokens that the model expects.
        self._tokenize(parsed, add_special_tokens=False)
        return self._run(parsed, sampling_params, priority, use_tqdm, on_error)

    def get_tokenizer(self) -> Any:
        """Returns the Hugging Face tokenizer; None if it was skipped."""
        return self.llm_engine.tokenizer and self.llm_engine.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of prompts that bring none: the model's recommended ones."""
        return self.llm_engine.default_params.clone()

    def stats(self) -> EngineStats:
        """Returns what the engine is doing and has done."""
        return self.llm_engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes and returns that it did."""
        self.llm_engine.reset_prefix_cache()
        return True

    def save_sharded_state(self, folder: str | Path) -> None:
        """Writes each rank's part of the weights to files of its own, which start faster than a checkpoint.

        Args:
            folder: Where to; made if absent. Load it with `load_format="sharded_state"` and the same numbers of ranks.

        Raises:
            ConfigError: The engine has read no checkpoint, or the folder is where it is.
        """
        self.llm_engine.save_sharded_state(folder)

    def close(self) -> None:
        """Frees the model and the KV cache."""
        self.llm_engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokenize(self, parsed: list[Parsed], add_special_tokens: bool = True) -> None:
        """Tokenises the texts that have no token ids yet, all together."""
        tokenizer = self.llm_engine.tokenizer
        where = [i for i, item in enumerate(parsed) if not isinstance(item, UserError) and item[1] is None]
        if tokenizer is None or not where:
            return
        texts = [str(parsed[i][0]) for i in where]  # type: ignore[index]  # errors are not in `where`
        try:
            encoded = tokenizer.encode_batch(texts, add_special_tokens)
        except Exception:  # noqa: BLE001  # One text the tokenizer cannot read fails the batch; find it.
            for i, text in zip(where, texts, strict=True):
                parsed[i] = _attempt(lambda text=text: (text, encode_text(tokenizer, text, add_special_tokens)))
            return
        for i, text, token_ids in zip(where, texts, encoded, strict=True):
            parsed[i] = (text, token_ids)

    def _run(
        self,
        parsed: list[Parsed],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        use_tqdm: bool | Callable[..., Any],
        on_error: OnError,
    ) -> list[RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ConfigError(f"on_error must be 'raise' or 'return'; got {on_error!r}")
        params = self._params_for_each(sampling_params, len(parsed))
        priorities = _one_for_each("priorities", priority or 0, len(parsed))
        outputs: dict[str, RequestOutput] = {}
        requests = []
        for item, row_params, row_priority in zip(parsed, params, priorities, strict=True):
            request_id = str(next(self._request_ids))
            if isinstance(item, UserError):
                outputs[request_id] = _failed(request_id, item, on_error)
            else:
                requests.append(GenerateRequest(request_id, *item, row_params, row_priority))
        try:
            num_added = sum([self._add(request, outputs, on_error) for request in _in_good_order(requests)])
            self._drain(num_added, outputs, use_tqdm, on_error)
        except Exception:
            self.llm_engine.abort(request.request_id for request in requests)
            raise
        except BaseException:  # Ctrl-C, anywhere.
            self.llm_engine.reset()
            raise
        return [outputs[request_id] for request_id in sorted(outputs, key=int)]

    def _add(self, request: GenerateRequest, outputs: dict[str, RequestOutput], on_error: OnError) -> bool:
        try:
            self.llm_engine.add_request(request)
        except UserError as error:
            outputs[request.request_id] = _failed(request.request_id, error, on_error, request)
            return False
        return True

    def _drain(
        self,
        num_requests: int,
        outputs: dict[str, RequestOutput],
        use_tqdm: bool | Callable[..., Any],
        on_error: OnError,
    ) -> None:
        """Steps until every request has its output."""
        with _Progress(num_requests, use_tqdm) as progress:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    if output.error is not None and on_error == "raise":
                        raise output.error.to_exception()
                    outputs[output.request_id] = output
                    progress.count(output)

    def _params_for_each(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.llm_engine.default_params
        each = _one_for_each("params", sampling_params, num_prompts)
        for params in each:
            if not isinstance(params, SamplingParams):
                raise SamplingParamsError(f"sampling_params must be SamplingParams; got {type(params).__name__}")
        return each


Parsed = tuple[str | None, list[int] | None] | UserError
"""A prompt's (text, token ids), or why it cannot be run."""


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "lora_request": (None,),
    "tokenization_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "chat_template_content_format": ("auto", "string"),
}
"""Arguments of vLLM's methods that this release has no use for, and the values that ask for nothing."""


def _check_neutral(method: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in NEUTRAL:
            raise ConfigError(unknown_key_message(f"LLM.{method}", name, NEUTRAL))
        if value not in NEUTRAL[name]:
            allowed = " or ".join(map(repr, NEUTRAL[name]))
            raise ConfigError(f"{name}={value!r} is not supported in this release; it can be {allowed}")


def _attempt(parse: Callable[..., Any], *args: Any) -> Any:
    """Calls, and returns instead of raising what is wrong with the argument."""
    try:
        return parse(*args)
    except UserError as error:
        return error


def _failed(
    request_id: str, error: UserError, on_error: OnError, request: GenerateRequest | None = None
) -> RequestOutput:
    if on_error == "raise":
        raise error
    if request is None:
        return RequestOutput.from_error(request_id, error)
    return RequestOutput.from_error(request_id, error, request.prompt, request.prompt_token_ids)


def _as_prompts(prompts: Any) -> list[Any]:
    """Takes one prompt for a list of one; a list of integers is one prompt."""
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if not isinstance(prompts, Iterable):
        raise PromptTypeError(
            f"Prompt should be a string, list of tokens, or dictionary, or a list of them; got {type(prompts).__name__}"
        )
    items = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def _as_conversations(messages: Any) -> list[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatTemplateError(f"messages must be a list of dictionaries; got {type(messages).__name__}")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _one_for_each(what: str, given: Any, num_prompts: int) -> list[Any]:
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        return [given] * num_prompts
    if len(given) != num_prompts:
        raise ConfigError(f"The lengths of prompts ({num_prompts}) and {what} ({len(given)}) must be the same.")
    return list(given)


def _in_good_order(requests: list[GenerateRequest]) -> list[GenerateRequest]:
    """Puts long outputs first, so that the tail is short, and prompts with a common prefix next to each other."""

    def key(request: GenerateRequest) -> tuple[int, list[int]]:
        max_tokens = request.sampling_params.max_tokens
        return (-max_tokens if max_tokens else -(2**31), request.prompt_token_ids or [])

    return sorted(requests, key=key)


class _Progress:
    """The progress bar of one call: requests done, tokens per second in and out."""

    def __init__(self, num_requests: int, use_tqdm: bool | Callable[..., Any]) -> None:
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = make(total=num_requests, desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm)
        self._num_in = 0
        self._num_out = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, output: RequestOutput) -> None:
        self._num_in += len(output.prompt_token_ids or ())
        self._num_out += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed_s = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_in / elapsed_s:.0f} toks/s, output: {self._num_out / elapsed_s:.0f} toks/s",
            refresh=False,
        )
        self._bar.update()
