"""`LLM`: runs a model on prompts in a script, and returns the outputs in the order of the prompts."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from .call import Call, OnError, as_list, one_for_each
from .config import EngineConfig
from .engine import EngineStats, LLMEngine
from .errors import (
    ChatTemplateError,
    ConfigError,
    PoolingParamsError,
    PromptTypeError,
    SamplingParamsError,
    UserError,
    quote,
    unknown_key_message,
)
from .inputs import Parsed, ParsedPrompt, PromptType, attempt, describe, parse_prompt
from .lora.request import LoRARequest, LoRARequests
from .outputs import RequestOutput
from .pooling.arguments import check_is_text, complete_params, find_prefix, take_cut
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
from .pooling.scoring import ScoringOptions, pair_up
from .request import GenerateRequest, PoolingRequest
from .sampling_params import SamplingParams
from .text.conversation import ContentFormat, Messages

Method = TypeVar("Method", bound=Callable[..., Any])


def _one_at_a_time(method: Method) -> Method:
    """Makes a method of `LLM` wait until the calls of other threads have ended."""

    @functools.wraps(method)
    def locked(self: LLM, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast("Method", locked)


class LLM:
    """A loaded model that generates text from prompts, or makes vectors of prompts.

    Use the object as a context manager, or call `close`, to free the memory of the model and the KV cache. Several
    threads may call the methods, e.g. through `asyncio.to_thread`: a call waits until the calls before it have ended.
    One call with many prompts is faster than many calls with one.

    Args:
        model: Folder of a model in Hugging Face's layout, or ``"bundled:NAME"``.
        **kwargs: Fields of `EngineConfig`. Other settings of vLLM's `LLM` are also accepted: a setting that has no
            effect here logs a warning, and a setting that this release cannot honour raises `ConfigError`.

    Raises:
        UserError: A setting, the model folder or the tokenizer cannot be used.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine.from_config(EngineConfig.from_kwargs(model=model, **kwargs))
        self._request_ids = itertools.count()
        self._lock = threading.RLock()

    @_one_at_a_time
    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        *,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[RequestOutput]:
        """Generates text from prompts.

        Args:
            prompts: One prompt or a list of prompts. A prompt is a text, a list of token ids, or a dictionary
                (`TextPrompt`, `TokensPrompt`, `EmbedsPrompt`).
            sampling_params: Parameters for all prompts, or a list with the parameters of each prompt; None for the
                parameters that the model recommends.
            use_tqdm: Whether to show a progress bar, or a function that makes the bar as `tqdm` does.
            lora_request: Names the LoRA adapter of all prompts, or is a list with the adapter of each prompt; None, for
                all or in the list, is the model alone. The engine must have `enable_lora`.
            priority: The priority of each prompt; prompts with lower numbers run first. None gives all prompts
                priority 0.
            on_error: How the call treats a prompt that cannot be run or that fails: ``"raise"`` ends the call with the
                error of the prompt; ``"return"`` gives the prompt an output whose `error` is set, and runs the others.
            **vllm_kwargs: Further arguments of vLLM's method. Only values that ask for nothing are accepted.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: A prompt or its parameters cannot be used, and `on_error` is ``"raise"``.
            EngineError: A prompt fails while it runs, and `on_error` is ``"raise"``.
        """
        _check_neutral("generate", vllm_kwargs)
        call = self._call(use_tqdm, on_error)
        parsed = [attempt(parse_prompt, prompt) for prompt in _as_prompts(prompts)]
        call.tokenize(parsed)
        params = self._params_for_each(sampling_params, len(parsed))
        return call.run(parsed, GenerateRequest, params, priority, lora_request)

    @_one_at_a_time
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template_content_format: ContentFormat = "auto",
        cache_salt: str | Sequence[str | None] | None = None,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[RequestOutput]:
        """Generates the next message of one or several conversations.

        Args:
            messages: One conversation, which is a list of dictionaries with `role` and `content`; or a list of
                conversations.
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            lora_request: As in `generate`. The conversation is rendered by the chat template of the model, whatever
                files are in the adapter's folder.
            chat_template: Jinja text, or path of a file with it, that replaces the tokenizer's template.
            add_generation_prompt: Whether the prompt ends with the opening of the assistant's turn.
            continue_final_message: Whether the last message is the beginning of the answer, which the model continues.
            tools: Descriptions of tools, for templates that use them.
            chat_template_kwargs: Further variables of the template. A variable replaces an argument of this method
                that has the same name.
            chat_template_content_format: Form in which the content of a message reaches the template: ``"string"`` is
                one text, ``"openai"`` a list of parts; ``"auto"`` converts only contents that the template does not
                read.
            cache_salt: Cache salt for all conversations, or a list with the salt of each; see `TextPrompt`.
            priority: As in `generate`.
            on_error: As in `generate`.
            **vllm_kwargs: As in `generate`.

        Returns:
            One output for each conversation, in the order of the conversations.

        Raises:
            UserError: A conversation or its parameters cannot be used, and `on_error` is ``"raise"``.
            EngineError: As in `generate`.
        """
        _check_neutral("chat", vllm_kwargs)
        tokenizer = self.llm_engine.tokenizer
        variables = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            raise ConfigError(f"chat_template_kwargs must map names to values; got {quote(variables)}")
        if tokenizer is None:
            raise ConfigError("chat needs a tokenizer; construct the LLM without skip_tokenizer_init")
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "tools": tools,
            "content_format": chat_template_content_format,
            **variables,
        }
        options["chat_template"] = tokenizer.read_template(options["chat_template"])

        def render(conversation: Messages, salt: str | None) -> ParsedPrompt:
            return ParsedPrompt(tokenizer.render_chat(conversation, **options), cache_salt=salt)

        conversations = _as_conversations(messages)
        salts = one_for_each("cache_salt", cache_salt, len(conversations))
        parsed = [attempt(render, *one) for one in zip(conversations, salts, strict=True)]
        call = self._call(use_tqdm, on_error)
        # The template has already written the special tokens that the model expects.
        call.tokenize(parsed, add_special_tokens=False)
        params = self._params_for_each(sampling_params, len(parsed))
        return call.run(parsed, GenerateRequest, params, priority, lora_request)

    @_one_at_a_time
    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Makes a vector of each prompt, or one of each of its tokens: embeddings, or the probabilities of classes.

        Args:
            prompts: As in `generate`.
            pooling_params: Parameters for all prompts, or a list with the parameters of each prompt; None for the
                settings of the engine.
            pooling_task: ``"embed"`` or ``"classify"`` for one vector of each prompt; ``"token_embed"`` or
                ``"token_classify"`` for one of each token. The engine must do it. It may be None if `task` is set in
                all pooling parameters.
            prompt_name: Name of one of the prompts in the model's folder, such as ``"query"``, that is put in front of
                all texts; None for the model's default prompt.
            prompt: The text of such a prompt itself.
            use_tqdm: As in `generate`.
            lora_request: As in `generate`.
            priority: As in `generate`.
            on_error: As in `generate`.
            **vllm_kwargs: As in `generate`; and `truncate_prompt_tokens`, by itself or in `tokenization_kwargs`, as in
                `PoolingParams`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: The engine has another task, or a prompt or its parameters cannot be used and `on_error` is
                ``"raise"``.
            EngineError: As in `generate`.
        """
        prefix = find_prefix(self.llm_engine.tokenizer, prompt_name, prompt)
        parsed = [attempt(parse_prompt, one) for one in _as_prompts(prompts)]
        return self._pool(
            parsed if prefix is None else [attempt(check_is_text, one) for one in parsed],
            pooling_params,
            pooling_task,
            prefix=prefix,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
            on_error=on_error,
            **vllm_kwargs,
        )

    def _pool(
        self,
        parsed: list[Parsed],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        task: str | None,
        *,
        prefix: str | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        priority: Sequence[int] | None = None,
        on_error: OnError = "raise",
        **vllm_kwargs: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Makes a vector of each prompt, see `encode`; `prefix` is put in front of the texts, None for the default."""
        cut = take_cut(vllm_kwargs)
        _check_neutral("encode", vllm_kwargs)
        call = self._call(use_tqdm, on_error)
        params = self._pooling_params(pooling_params, task, cut, len(parsed))
        call.tokenize(parsed, prefix=prefix)
        return call.run(parsed, functools.partial(PoolingRequest, prefix=prefix), params, priority, lora_request)

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **kwargs: Any,
    ) -> list[EmbeddingRequestOutput]:
        """Makes an embedding of each prompt.

        Args:
            prompts: As in `generate`.
            pooling_params: As in `encode`.
            **kwargs: Further arguments of `encode`, such as `prompt_name`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: As in `encode`.
            EngineError: As in `generate`.
        """
        _check_no_task("embed", kwargs)
        pooled = self.encode(prompts, pooling_params, pooling_task="embed", **kwargs)
        return [EmbeddingRequestOutput.from_base(one, embedding_of(one.outputs)) for one in pooled]

    def reward(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **kwargs: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Computes the rewards of each token of each prompt, with a model that rewards or classifies.

        Args:
            prompts: As in `generate`.
            pooling_params: As in `encode`. With `step_tag_id` only the tokens that end steps have rewards.
            **kwargs: Further arguments of `encode`.

        Returns:
            One output for each prompt, in the order of the prompts; its `data` is `[num_rows, num_classes]`.

        Raises:
            UserError: As in `encode`.
            EngineError: As in `generate`.
        """
        _check_no_task("reward", kwargs)
        return self.encode(prompts, pooling_params, pooling_task="token_classify", **kwargs)

    def classify(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **kwargs: Any,
    ) -> list[ClassificationRequestOutput]:
        """Computes the probabilities of the model's classes for each prompt.

        Args:
            prompts: As in `generate`.
            pooling_params: As in `encode`. With `use_activation=False` the outputs are logits.
            **kwargs: Further arguments of `encode`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            UserError: As in `encode`.
            EngineError: As in `generate`.
        """
        _check_no_task("classify", kwargs)
        pooled = self.encode(prompts, pooling_params, pooling_task="classify", **kwargs)
        return [ClassificationRequestOutput.from_base(one, classes_of(one.outputs)) for one in pooled]

    @_one_at_a_time
    def score(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        pooling_params: PoolingParams | None = None,
        chat_template: str | None = None,
        lora_request: LoRARequests = None,
        **kwargs: Any,
    ) -> list[ScoringRequestOutput]:
        """Computes a similarity score for pairs of texts.

        A classifier with one class (a cross-encoder or reranker) reads both texts of a pair as one prompt, and the
        probability is the score. An embedding model reads each text by itself, and the score is the cosine of the two
        embeddings, or the similarity that the model's folder names. With `PoolingParams(task="token_embed")` it is the
        sum, over the tokens of the first text, of the largest dot product with a token of the second (late
        interaction).

        Args:
            data_1: First sides of the pairs. One side is paired with every side of `data_2`. A side is a text, a
                dictionary with content parts (``{"content": [{"type": "text", "text": ...}]}``), or a list of token
                ids; for a cross-encoder these are without special tokens. Texts may be empty.
            data_2: Second sides of the pairs: as many as in `data_1`, unless `data_1` is one.
            pooling_params: Pooling parameters for all texts.
            chat_template: Jinja text, or path of a file with it, by which a classifier reads a pair: two messages of
                the roles `query` and `document`. None for the separators of the tokenizer, or for no separators if the
                classes are rows of an output head (`classifier_from_token`).
            lora_request: Names the LoRA adapter of all pairs, or is a list with the adapter of each pair.
            **kwargs: Further arguments of `encode`, except `pooling_task` and `priority`.

        Returns:
            One output for each pair, in the order of the pairs.

        Raises:
            UserError: As in `encode`; or the engine classifies into several classes.
            EngineError: As in `generate`.
        """
        _check_no_task("score", kwargs)
        pairs = pair_up(data_1, data_2)
        adapters = one_for_each("lora_request", lora_request, len(pairs))
        pairs = [replace(pair, adapter=adapter) for pair, adapter in zip(pairs, adapters, strict=True)]
        given = PoolingParams() if pooling_params is None else pooling_params
        params = complete_params(given, PoolingParams(truncate_prompt_tokens=take_cut(kwargs)))
        engine = self.llm_engine
        template = engine.tokenizer.read_template(chat_template) if engine.tokenizer else chat_template
        max_model_len = engine.handler.prompts.max_model_len
        scoring = engine.task.scoring(ScoringOptions(params, engine.tokenizer, template, max_model_len))
        prompts, each = scoring.prompts(pairs), scoring.adapters(pairs)
        return scoring.outputs(pairs, self._pool(prompts, params, scoring.pooling_task, lora_request=each, **kwargs))

    def get_tokenizer(self) -> Any:
        """Returns the Hugging Face tokenizer; None if the engine was made with `skip_tokenizer_init`."""
        return self.llm_engine.tokenizer and self.llm_engine.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns a copy of the sampling parameters that the model recommends, the default of `generate`."""
        return self.llm_engine.default_params.clone()

    def stats(self) -> EngineStats:
        """Returns the engine's statistics: numbers of running and waiting sequences, KV cache usage, counters."""
        return self.llm_engine.stats()

    @_one_at_a_time
    def reset_prefix_cache(self) -> bool:
        """Removes all cached prefixes from the KV cache. Always returns True, because vLLM's method returns a bool."""
        self.llm_engine.reset_prefix_cache()
        return True

    @_one_at_a_time
    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads a LoRA adapter into the memory of the host, before a prompt names it.

        Args:
            lora_request: Names the adapter.

        Returns:
            Whether the adapter was read; False if it was in memory.

        Raises:
            AdapterError: The adapter cannot be used.
            ConfigError: The engine has no `enable_lora` or no room for the adapter, or another adapter has its name or
                number.
        """
        return self.llm_engine.add_lora(lora_request)

    @_one_at_a_time
    def remove_lora(self, lora_int_id: int) -> bool:
        """Drops a LoRA adapter from the memory of the host; its name and number are free again.

        Args:
            lora_int_id: Number of the adapter.

        Returns:
            Whether the adapter was in memory.

        Raises:
            ConfigError: The engine has no `enable_lora`.
        """
        return self.llm_engine.remove_lora(lora_int_id)

    @_one_at_a_time
    def list_loras(self) -> set[int]:
        """Returns the numbers of the LoRA adapters in the memory of the host.

        Raises:
            ConfigError: The engine has no `enable_lora`.
        """
        return self.llm_engine.list_loras()

    @_one_at_a_time
    def pin_lora(self, lora_int_id: int) -> bool:
        """Keeps a LoRA adapter in the memory of the host until `remove_lora`, even if no prompt names it.

        Args:
            lora_int_id: Number of the adapter.

        Returns:
            True, because vLLM's method returns a bool.

        Raises:
            ConfigError: The adapter is not in memory, or the engine has no `enable_lora`.
        """
        return self.llm_engine.pin_lora(lora_int_id)

    @_one_at_a_time
    def save_sharded_state(self, folder: str | Path) -> None:
        """Writes each rank's part of the weights to separate files, which load faster than a checkpoint.

        Args:
            folder: Folder that the files are written to; it is made if absent. An engine with
                `load_format="sharded_state"` and the same numbers of ranks can load it as a model folder.

        Raises:
            ConfigError: The engine has not read a checkpoint, or the folder is the folder of the checkpoint.
        """
        self.llm_engine.save_sharded_state(folder)

    @_one_at_a_time
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
    ) -> list[SamplingParams | UserError]:
        """Returns the sampling parameters of each prompt, or the error that says why they cannot be used."""
        if sampling_params is None:
            sampling_params = self.llm_engine.default_params
        return [attempt(_check_sampling, params) for params in one_for_each("params", sampling_params, num_prompts)]

    def _pooling_params(
        self,
        given: PoolingParams | Sequence[PoolingParams] | None,
        task: str | None,
        cut: int | None,
        num_prompts: int,
    ) -> list[PoolingParams | UserError]:
        """Returns the pooling parameters of each prompt; raises if the engine does not do `task`."""
        asked = PoolingParams(task=task, truncate_prompt_tokens=cut)
        self.llm_engine.task.check_pooling(asked)
        each = one_for_each("params", PoolingParams() if given is None else given, num_prompts)
        read = [attempt(complete_params, params, asked) for params in each]
        if task is None and any(isinstance(params, PoolingParams) and params.task is None for params in read):
            names = " or ".join(map(repr, self.llm_engine.task.all_names()))
            raise PoolingParamsError(f"pooling_task is missing; it is {names}")
        return read


def _check_sampling(params: Any) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise SamplingParamsError(f"sampling_params must be SamplingParams; got {describe(params)}")
    return params


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tokenization_kwargs": (None, {}),
    "truncate_prompt_tokens": (None,),
    "mm_processor_kwargs": (None, {}),
}
"""Arguments of vLLM's methods that this release does not support -> the values that ask for nothing."""


def _check_neutral(method: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in NEUTRAL:
            raise ConfigError(unknown_key_message(f"LLM.{method}", name, NEUTRAL))
        if not isinstance(value, Mapping | None) or value not in NEUTRAL[name]:
            allowed = " or ".join(map(repr, NEUTRAL[name]))
            raise ConfigError(f"{name}={quote(value)} is not supported in this release; it can be {allowed}")


def _check_no_task(method: str, kwargs: Mapping[str, Any]) -> None:
    if "pooling_task" in kwargs:
        raise ConfigError(f"LLM.{method} knows its task; leave pooling_task out, or call LLM.encode")


def _as_prompts(prompts: Any) -> list[Any]:
    """Returns a list of prompts. A single prompt becomes a list of one; a list of integers is a single prompt."""
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    prompts = as_list("prompts", prompts)
    if not isinstance(prompts, Iterable):
        raise PromptTypeError(
            f"Prompt should be a string, list of tokens, or dictionary, or a list of them; got {type(prompts).__name__}"
        )
    items = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def _as_conversations(messages: Any) -> list[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ChatTemplateError(f"messages must be a list of dictionaries; got {type(messages).__name__}")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
