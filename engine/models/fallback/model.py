"""`TransformersModel`: a module of transformers in the place of a `Decoder`, with our paged attention inside it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import ForwardBatch, KVCache
from ...errors import ConfigError
from ...layers import LinearBase
from ...parallel.context import ParallelContext
from ..decoder import Decoder
from ..linear_factory import LinearFactory
from ..options import ModelOptions
from ..pp_stages import cache_groups, cache_pairs
from ..spec import DecoderSpec
from .attention import ATTRIBUTE, PAGED, PagedLayer, Step
from .build import build_module, materialise
from .layer_form import Survey
from .self_check import check_paging
from .weights import declare_slots

__all__ = ["TransformersModel"]


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
            _drop_head(module)
        linears = {name: module.get_submodule(name) for name in survey.linears if _has(module, name)}
        tied = {name: linear for name, linear in linears.items() if _is_shared(module, linear.weight)}
        factory = LinearFactory(options, dtype, device)
        for name in linears.keys() - tied.keys():
            linear = linears[name]
            rows, bias = linear.out_features, linear.bias is not None
            _replace(module, name, factory.make_linear(name, linear.in_features, rows, bias=bias))
        materialise(module, dtype, device)
        for name, linear in tied.items():
            if linear.bias is None:
                made = factory.make_tied(name, linear.in_features, linear.out_features, linear.weight)
                _replace(module, name, made)
        factory.warn_of_declined()
        declare_slots(module)
        for name, part in module.named_children():
            self.add_module(name, part)
        # In a tuple these are no submodules, so that each weight has one name: the one that it has in the module.
        self._transformers = (module, _head_alone(module, survey.output_type))
        self._step = Step()
        self._attach(survey)

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

    def compute_own_logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.compute_own_logits`: the module's own head, with all that it does to logits."""
        _, head = self._transformers
        logits: Tensor = head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0).float()

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


def _drop_head(module: Any) -> None:
    """Replaces the parts of a module that come after its body."""
    body = module.base_model
    for name, part in module.named_children():
        if part is not body and body is not module:
            setattr(module, name, nn.Identity())


def _has(module: nn.Module, name: str) -> bool:
    """Returns whether a linear layer of the trial is still there; a head may have been dropped."""
    try:
        return type(module.get_submodule(name)) is nn.Linear
    except AttributeError:
        return False


def _is_shared(module: nn.Module, weight: Tensor) -> bool:
    """Returns whether several parts of a module have this weight."""
    return sum(other is weight for _, other in module.named_parameters(remove_duplicate=False)) > 1


def _replace(module: nn.Module, name: str, linear: LinearBase) -> None:
    """Puts a linear layer of ours in the place of one of the module; it takes inputs of any number of dimensions."""
    forward = linear.forward
    object.__setattr__(linear, "forward", lambda x: forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]))
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, linear)


def _check(name: str, options: ModelOptions, parallel: ParallelContext) -> None:
    """Raises `ConfigError` if an option needs a model of our own."""
    if options.deterministic:
        raise ConfigError(
            f"deterministic=True: {name} runs as a module of transformers, whose results may depend on the batch; "
            "drop it, or use a model of a family that Millrace has"
        )
    if parallel.num_ranks > 1:
        raise ConfigError(
            f"{name} runs as a module of transformers, which is not divided among ranks; use "
            "tensor_parallel_size=1 and pipeline_parallel_size=1"
        )
