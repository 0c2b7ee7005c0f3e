"""`build_llm_processor`: builds the processor of a config with the builder registered for the class of the config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ...engine import resolve_model
from ...engine.errors import ConfigError, unknown_key_message
from ..stages.user_function import RowFunction
from .config import EngineProcessorConfig, ProcessorConfig
from .engine_stages import engine_stages
from .processor import Processor
from .request_backend import http_backend, serve_backend
from .request_config import HttpRequestProcessorConfig, ServeDeploymentProcessorConfig
from .stage_spec import CustomStage

Builder = Callable[..., Processor]
"""A function of a config, the keyword arguments of `Processor` for the user's functions, and the `builder_kwargs`."""


def build_engine_processor(
    config: EngineProcessorConfig,
    functions: Mapping[str, Any],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """Builds a processor that runs a model on the engine of this package.

    Args:
        config: Settings of the processor.
        functions: Keyword arguments of `Processor`: `preprocess`, `postprocess` and their map kwargs.
        chat_template_kwargs: Variables of the chat template, which replace those in the settings of the stage.
    """
    resolve_model(config.model_source, config.engine_config.hub)
    if chat_template_kwargs is not None:
        stage = config.chat_template_stage.replace(chat_template_kwargs=dict(chat_template_kwargs))
        config = config.replace(chat_template_stage=stage)
    return Processor(config, engine_stages(config), **functions)


def build_http_processor(config: HttpRequestProcessorConfig, functions: Mapping[str, Any]) -> Processor:
    """Builds a processor that posts rows to an HTTP endpoint; `functions` is as in `build_engine_processor`."""
    return Processor(config, [http_backend(config)], **functions)


def build_serve_processor(config: ServeDeploymentProcessorConfig, functions: Mapping[str, Any]) -> Processor:
    """Builds a processor that calls a Ray Serve deployment; `functions` is as in `build_engine_processor`."""
    return Processor(config, [serve_backend(config)], **functions)


class ProcessorBuilder:
    """A registry of builders: for each class of configs, the function that builds the processor of a config.

    The builders of this package are always known; `register` adds one for another config class.
    """

    _OURS: ClassVar[Mapping[type[ProcessorConfig], Builder]] = {
        EngineProcessorConfig: build_engine_processor,
        HttpRequestProcessorConfig: build_http_processor,
        ServeDeploymentProcessorConfig: build_serve_processor,
    }
    _registered: ClassVar[dict[type[ProcessorConfig], Builder]] = {}

    @classmethod
    def register(cls, config_type: type[ProcessorConfig], builder: Builder) -> None:
        """Registers the builder of a config class and of the classes derived from it.

        Args:
            config_type: The config class.
            builder: Function that returns the processor. It is called with a config, with keyword arguments to pass on
                to `Processor` (`preprocess`, `postprocess` and their map kwargs), and with the `builder_kwargs`.

        Raises:
            ConfigError: The class already has a builder, or is not derived from `ProcessorConfig`.
        """
        if not (isinstance(config_type, type) and issubclass(config_type, ProcessorConfig)):
            raise ConfigError(f"config_type must be a class derived from ProcessorConfig; got {config_type!r:.80}")
        if config_type in cls._builders():
            raise ConfigError(f"{config_type.__name__} has a builder; derive a class from it, or call clear_registry()")
        cls._registered[config_type] = builder

    @classmethod
    def clear_registry(cls) -> None:
        """Removes every builder that `register` has added; the builders of this package stay."""
        cls._registered.clear()

    @classmethod
    def validate_builder_kwargs(cls, builder_kwargs: Mapping[str, Any] | None) -> None:
        """Checks that `builder_kwargs` hold no name of a parameter of `build_llm_processor`.

        Args:
            builder_kwargs: The argument `builder_kwargs` of `build_llm_processor`.

        Raises:
            ConfigError: A key is the name of a parameter.
        """
        own = set(inspect.signature(build_llm_processor).parameters) - {"builder_kwargs"}
        for name in builder_kwargs or {}:
            if name in own:
                raise ConfigError(f"builder_kwargs hold {name!r}, which is a parameter of its own: pass it as such")

    @classmethod
    def build(
        cls, config: ProcessorConfig, builder_kwargs: Mapping[str, Any] | None = None, **functions: Any
    ) -> Processor:
        """Builds the processor of a config.

        Args:
            config: Settings of the processor.
            builder_kwargs: Further keyword arguments of the builder.
            **functions: Keyword arguments of `Processor`: `preprocess`, `postprocess` and their map kwargs.

        Raises:
            ConfigError: The config has no builder, or the builder does not take one of the arguments.
        """
        builder = cls._find(config)
        cls.validate_builder_kwargs(builder_kwargs)
        taken = inspect.signature(builder).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
            for name in set(builder_kwargs or {}) - set(taken):
                raise ConfigError(unknown_key_message("builder_kwargs", name, list(taken)[2:]))
        return builder(config, functions, **(builder_kwargs or {}))

    @classmethod
    def _builders(cls) -> dict[type[ProcessorConfig], Builder]:
        return {**cls._OURS, **cls._registered}

    @classmethod
    def _find(cls, config: ProcessorConfig) -> Builder:
        builders = cls._builders()
        for kind in type(config).__mro__:
            if kind in builders:
                return builders[kind]
        known = ", ".join(sorted(kind.__name__ for kind in builders))
        raise ConfigError(
            f"config must be one of {known}, or of a class given to ProcessorBuilder.register; "
            f"got {type(config).__name__}"
        )


def build_llm_processor(
    config: ProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
    stages: Sequence[CustomStage] = (),
) -> Processor:
    """Builds a processor, which maps a dataset of rows to a dataset of answered rows.

    Args:
        config: Settings of the processor. Their class decides which backend answers the rows.
        preprocess: Function of a row that returns columns to merge into the row: for an engine `messages` or `prompt`,
            and `sampling_params` as a dict. None if the dataset has these columns.
        postprocess: Function of a row with the columns of the stages that returns the row of the result. None keeps all
            columns.
        preprocess_map_kwargs: Resources of the operator in which `preprocess` runs, and `fn_args` and `fn_kwargs` for
            `preprocess`.
        postprocess_map_kwargs: Resources and arguments of the same kind for `postprocess`.
        builder_kwargs: Further arguments of the builder. The builder of an engine takes `chat_template_kwargs`,
            variables of the chat template.
        stages: Stages of the user, each with its place among the stages of the processor.

    Returns:
        A processor; nothing has started yet.

    Raises:
        ConfigError: An argument cannot be used.
    """
    functions = {
        "preprocess": preprocess,
        "postprocess": postprocess,
        "preprocess_map_kwargs": preprocess_map_kwargs,
        "postprocess_map_kwargs": postprocess_map_kwargs,
    }
    processor = ProcessorBuilder.build(config, builder_kwargs, **functions)
    for stage in stages:
        processor.add_stage(stage)
    return processor


build_processor = build_llm_processor
