"""`LLM`: the engine for a script. Prompts in, outputs out, in the order of the prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .call import Call, OnError, attempt, one_for_each
from .config import EngineConfig
from .engine import EngineStats, LLMEngine
from .errors import (
    ChatTemplateError,
    ConfigError,
    PoolingParamsError,
    PromptTypeError,
    SamplingParamsError,
    unknown_key_message,
)
from .inputs import ParsedPrompt, PromptType, parse_prompt
from .outputs import RequestOutput
from .pooling.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
    classes_of,
    embedding_of,
)
from .pooling.params import PoolingParams
from .pooling.scoring import pair_up
from .request import GenerateRequest, PoolingRequest
from .sampling_params import SamplingParams

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
            prompts: One prompt or a list: texts, lists of token ids, or dictionaries (`TextPrompt`, `TokensPrompt`,
                `EmbedsPrompt`).
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
        call = self._call(use_tqdm, on_error)
        parsed = [attempt(parse_prompt, prompt) for prompt in _as_prompts(prompts)]
        call.tokenize(parsed)
        return call.run(parsed, GenerateRequest, self._params_for_each(sampling_params, len(parsed)), priority)

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
        cache_salt: str | Sequence[str | None] | None = None,
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
            cache_salt: As in `TextPrompt`, for all conversations, or one for each.
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

        def render(conversation: Messages, salt: str | None) -> ParsedPrompt:
            return ParsedPrompt(tokenizer.render_chat(conversation, **options), cache_salt=salt)

        conversations = _as_conversations(messages)
        salts = one_for_each("cache_salt", cache_salt, len(conversations))
        parsed = [attempt(render, *one) for one in zip(conversations, salts, strict=True)]
        call = self._call(use_tqdm, on_error)
        # The template has written the special tokens that the model expects.
        call.tokenize(parsed, add_special_tokens=False)
        return call.run(parsed, GenerateRequest, self._params_for_each(sampling_params, len(parsed)), priority)

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Makes a vector of each prompt.

        Args:
            prompts: As in `generate`.
            pooling_params: For all, or one for each; None for the engine's own way.
            pooling_task: ``"embed"`` or ``"classify"``: what the engine was made for. The parameters may say it.
            use_tqdm: As in `generate`.
            priority: As in `generate`.
            on_error: As in `generate`.
            **vllm_kwargs: As in `generate`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: The engine does something else, or a prompt or its parameters cannot be used and `on_error` is
                ``"raise"``.
        """
        _check_neutral("encode", vllm_kwargs)
        call = self._call(use_tqdm, on_error)
        parsed = [attempt(parse_prompt, prompt) for prompt in _as_prompts(prompts)]
        params = self._pooling_params(pooling_params, pooling_task, len(parsed))
        call.tokenize(parsed)
        return call.run(parsed, PoolingRequest, params, priority)

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **kwargs: Any,
    ) -> list[EmbeddingRequestOutput]:
        """Embeds prompts.

        Args:
            prompts: As in `generate`.
            pooling_params: As in `encode`.
            **kwargs: Further arguments of `encode`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: As `encode`.
        """
        pooled = self.encode(prompts, pooling_params, pooling_task="embed", **kwargs)
        return [EmbeddingRequestOutput.from_base(one, embedding_of(one.outputs)) for one in pooled]

    def classify(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **kwargs: Any,
    ) -> list[ClassificationRequestOutput]:
        """Classifies prompts.

        Args:
            prompts: As in `generate`.
            pooling_params: As in `encode`; with `use_activation=False` the outputs are logits.
            **kwargs: Further arguments of `encode`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: As `encode`.
        """
        pooled = self.encode(prompts, pooling_params, pooling_task="classify", **kwargs)
        return [ClassificationRequestOutput.from_base(one, classes_of(one.outputs)) for one in pooled]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        pooling_params: PoolingParams | None = None,
        **kwargs: Any,
    ) -> list[ScoringRequestOutput]:
        """Says how well texts go together: a classifier of one class reads both at once, embeddings are compared.

        Args:
            data_1: One text, which goes with each of the others, or as many as there are others.
            data_2: The others.
            pooling_params: For all.
            **kwargs: Further arguments of `encode`, but for `pooling_task`.

        Returns:
            One output for each pair, in order.

        Raises:
            UserError: As `encode`, or the engine classifies into several classes.
        """
        pairs = pair_up(data_1, data_2)
        task = self.llm_engine.task
        scoring = task.scoring(self.llm_engine.tokenizer)
        pooled = self.encode(scoring.prompts(pairs), pooling_params, pooling_task=task.name, **kwargs)
        return scoring.outputs(pooled)

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

    def _call(self, use_tqdm: bool | Callable[..., Any], on_error: OnError) -> Call:
        return Call(self.llm_engine, self._request_ids, use_tqdm, on_error)

    def _params_for_each(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.llm_engine.default_params
        each = one_for_each("params", sampling_params, num_prompts)
        for params in each:
            if not isinstance(params, SamplingParams):
                raise SamplingParamsError(f"sampling_params must be SamplingParams; got {type(params).__name__}")
        return each

    def _pooling_params(
        self, given: PoolingParams | Sequence[PoolingParams] | None, task: str | None, num_prompts: int
    ) -> list[PoolingParams]:
        """Returns one for each prompt, and checks that the engine does what is asked, before any prompt runs."""
        each = one_for_each("params", given or PoolingParams(), num_prompts)
        for params in each:
            if not isinstance(params, PoolingParams):
                raise PoolingParamsError(f"pooling_params must be PoolingParams; got {type(params).__name__}")
        if task is None and any(params.task is None for params in each):
            raise PoolingParamsError("pooling_task is missing; it is 'embed' or 'classify'")
        self.llm_engine.task.check_pooling(PoolingParams(task=task))
        return each


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "lora_request": (None,),
    "tokenization_kwargs": (None, {}),
    "truncate_prompt_tokens": (None,),
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
