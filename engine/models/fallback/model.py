"""`TransformersModel`: a module of transformers in the place of a `Decoder`, with our paged attention inside it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...batch import ForwardBatch, KVCache
from ...errors import ConfigError, UnsupportedModelError
from ...parallel.context import ParallelContext
from ..decoder import Decoder
from ..linear_factory import LinearFactory
from ..options import DEFAULT_OPTIONS, ModelOptions
from ..pp_stages import cache_groups, cache_pairs
from ..spec import DecoderSpec
from .attention import ATTRIBUTE, PAGED, PagedLayer, Step
from .build import META, build_module, build_trial_module, materialise
from .layer_form import LayerForm, Survey
from .linears import replace_linears, replace_tied, tensor_plan
from .self_check import check_paging
from .trial import survey_module
from .weights import declare_slots

__all__ = ["TransformersModel", "drop_head"]


class TransformersModel(Decoder):
    """A causal language model that transformers computes, except for attention, sampling and the output of tokens.

    Args:
        spec: Description of the model, as far as the engine needs it.
        module_class: Class of the module.
        hf_config: The transformers config.
        survey: What the trial has found out about the module.
        dtype: Number type of weights and hidden states.
        device: Device of the weights. Their memory is not initialised: `fill_slots` fills it.
        options: The user's options for the model.
        parallel: The place of this rank among all ranks.

    Raises:
        ConfigError: An option needs a model of our own.
        UnsupportedModelError: The module cannot be made.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        module_class: Any,
        hf_config: Any,
        survey: Survey,
        dtype: torch.dtype,
        device: torch.device,
        options: ModelOptions,
        parallel: ParallelContext,
    ) -> None:
        nn.Module.__init__(self)
        _check(module_class.__name__, options, parallel)
        self.spec, self.parallel = spec, parallel
        self.columns = parallel.shard(spec.vocab_size)
        self.dtype, self._device = dtype, device
        module: Any = build_module(module_class, hf_config, dtype, PAGED)
        if options.head is None:
            drop_head(module)
        names = survey.linears & {name for name, part in module.named_modules() if type(part) is nn.Linear}
        plan = tensor_plan(module, names, parallel.tp_size)
        tied = frozenset(name for name in names if _is_shared(module, module.get_submodule(name).weight))
        factory = LinearFactory(options, dtype, device)
        self.adapters = factory.adapters
        if self.adapters is not None:
            self.adapters.heads |= _beside_body(module)
        replace_linears(module, names - tied, plan, factory, parallel)
        materialise(module, dtype, device)
        replace_tied(module, tied, factory)
        factory.warn_of_declined()
        declare_slots(module)
        for name, part in module.named_children():
            self.add_module(name, part)
        # In a tuple these are no submodules, so that each weight has one name: the one that it has in the module.
        self._transformers = (module, _head_alone(module, survey.output_type))
        self._step = Step()
        self._attach(survey if parallel.tp_size == 1 else _survey_of_rank(survey, module_class, hf_config, parallel))

    def _attach(self, survey: Survey) -> None:
        """Gives each attention module the object that attends for it."""
        groups = {layer: index for index, group in enumerate(cache_groups(self.spec)) for layer in group.layers}
        pairs = cache_pairs(self.spec, range(self.spec.num_layers))
        for index, form in enumerate(survey.layers):
            layer = PagedLayer(form, pairs[index], groups[index], self._step)
            setattr(self.get_submodule(form.name), ATTRIBUTE, layer)

    def pack(self) -> None:
        """As `Decoder.pack`; then checks that the paged attention leaves the results of the module as they were.

        Raises:
            UnsupportedModelError: The results differ.
        """
        super().pack()
        module, _ = self._transformers
        check_paging(self, module, self.dtype, self._device, PAGED)

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """As `Decoder.forward`: returns the last hidden states, `[num_tokens, hidden_size]`."""
        body = self._transformers[0].base_model
        inputs = {"input_ids": batch.token_ids.unsqueeze(0)}
        if batch.given is not None:
            embeddings = body.get_input_embeddings()(batch.token_ids)
            inputs = {"inputs_embeds": batch.given.replace_in(embeddings).unsqueeze(0)}
        self._step.batch, self._step.kv_cache = batch, kv_cache
        try:
            outputs = body(**inputs, position_ids=batch.positions.unsqueeze(0), use_cache=False)
        finally:
            self._step.batch = self._step.kv_cache = None
        hidden: Tensor = outputs[0].squeeze(0)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.compute_logits`: the module's own head, with all that it does to logits."""
        _, head = self._transformers
        logits: Tensor = head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0).float()

    def compute_own_logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.compute_own_logits`; every rank has all logits, and returns its columns of them."""
        own = self.columns
        logits = self.compute_logits(hidden)[:, own.start : own.start + own.length]
        return F.pad(logits, (0, own.room - own.length), value=-torch.inf)

    def compute_class_logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.compute_class_logits`."""
        logits: Tensor = self.score(hidden)
        return logits.float()


class _GivenHidden(nn.Module):
    """Stands for the body of a module of which only the head is to run: returns the hidden states that it is given.

    Args:
        output_type: Class of the outputs.
    """

    def __init__(self, output_type: type[Any]) -> None:
        super().__init__()
        self._output_type = output_type

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return self._output_type(last_hidden_state=inputs_embeds)


def _head_alone(module: Any, output_type: type[Any]) -> nn.Module:
    """Returns a module with the same head, whose forward pass takes hidden states as `inputs_embeds`."""
    head: nn.Module = copy.copy(module)
    head._modules = {**module._modules, module.base_model_prefix: _GivenHidden(output_type)}
    return head


def _beside_body(module: Any) -> set[str]:
    """Returns the paths of the parts of a module that come after its body."""
    body = module.base_model
    inside = set(body.modules()) if body is not module else set(module.modules())
    return {name for name, part in module.named_modules() if part is not module and part not in inside}


def drop_head(module: Any) -> None:
    """Replaces the parts of a module that come after its body."""
    body = module.base_model
    for name, part in module.named_children():
        if part is not body and body is not module:
            setattr(module, name, nn.Identity())


def _survey_of_rank(survey: Survey, module_class: Any, hf_config: Any, parallel: ParallelContext) -> Survey:
    """Runs a trial of a rank's part of a module, which shows whether its attention takes some of the heads alone.

    Raises:
        ConfigError: It does not.
    """
    tp_size = parallel.tp_size
    alone = ParallelContext.of_rank(parallel.rank, tp_size, parallel.pp_size)
    module: Any = build_trial_module(module_class, hf_config)
    tied = frozenset(name for name in survey.linears if _is_shared(module, module.get_submodule(name).weight))
    plan = tensor_plan(module, survey.linears, tp_size)
    for layer in survey.layers:
        if layer.num_heads % tp_size or layer.num_kv_heads % tp_size:
            raise _undivided(layer, tp_size, "cannot divide")
    replace_linears(module, survey.linears - tied, plan, LinearFactory(DEFAULT_OPTIONS, torch.float32, META), alone)
    try:
        own = survey_module(module, len(survey.layers))
    except UnsupportedModelError as error:
        raise ConfigError(f"tensor_parallel_size={tp_size}: {error}; use 1") from error
    for layer, part in zip(survey.layers, own.layers, strict=True):
        if (part.num_heads * tp_size, part.num_kv_heads * tp_size) != (layer.num_heads, layer.num_kv_heads):
            raise _undivided(layer, tp_size, "does not divide")
    return own


def _undivided(layer: LayerForm, tp_size: int, does: str) -> ConfigError:
    return ConfigError(
        f"tensor_parallel_size={tp_size}: {layer.name}, of a module of transformers, {does} its {layer.num_heads} "
        f"query heads and {layer.num_kv_heads} key and value heads evenly among the ranks; use 1"
    )


def _is_shared(module: nn.Module, weight: Tensor) -> bool:
    """Returns whether several parts of a module have this weight."""
    return sum(other is weight for _, other in module.named_parameters(remove_duplicate=False)) > 1


def _check(name: str, options: ModelOptions, parallel: ParallelContext) -> None:
    """Raises `ConfigError` if an option needs a model of our own."""
    if options.deterministic:
        raise ConfigError(
            f"deterministic=True: {name} runs as a module of transformers, whose results may depend on the batch; "
            "drop it, or use a model of a family that Millrace has"
        )
    if parallel.pp_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size={parallel.pp_size}: {name} runs as a module of transformers, whose layers stay "
            "together; use 1, and tensor_parallel_size for more ranks"
        )
