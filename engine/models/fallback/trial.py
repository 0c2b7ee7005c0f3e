"""`survey_module`: runs a transformers module once on the meta device, to learn how it attends before it is loaded.

Tensors of the meta device have shapes but no numbers, so a model of any size runs in a moment. The trial shows which
modules attend, with which heads, scales and masks, and it finds the models that cannot run on a paged cache: those of
which some layers keep a state of another kind, attend twice, change their masks, or ask for more than we implement.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from .attention import ATTRIBUTE
from .layer_form import LayerForm, Survey

__all__ = ["survey_module"]

NUM_TOKENS = 8
"""Number of tokens of the trial."""

NEUTRAL = frozenset(
    {
        "cache_position",
        "deterministic",
        "dropout",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "training",
        "use_cache",
    }
)
"""Options of an attention call that do not change its result; a window shows in the mask, which all functions read."""

KNOWN = frozenset({"is_causal", "s_aux", "scaling", "softcap"})
"""Options of an attention call that we heed."""


def survey_module(module: Any, num_layers: int) -> Survey:
    """Runs a trial of a module on the meta device.

    Args:
        module: A module of transformers, wholly on the meta device, with the attention function of trials.
        num_layers: Number of layers that its config names, each of which must attend once.

    Raises:
        UnsupportedModelError: The module cannot run on a paged cache; the message says why.
    """
    name, base = type(module).__name__, module.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError(
            f"{type(base).__name__} of transformers takes no position_ids, so it cannot run here: a step computes "
            "tokens of several sequences"
        )
    forms: list[LayerForm] = []
    for path, part in module.named_modules():
        object.__setattr__(part, ATTRIBUTE, _Probe(forms, path, part))
        if type(part) is nn.Linear:
            part.__class__ = _WatchedLinear
    body, logits = _run(module, base)
    linears = {
        path
        for path, part in module.named_modules()
        if isinstance(part, _WatchedLinear) and part.is_called and not part.is_touched
    }
    if len(forms) != num_layers:
        raise UnsupportedModelError(
            f"{name}: {len(forms)} of its {num_layers} layers go through the attention interface of transformers; "
            "layers that keep a state of another kind, or attend by themselves, cannot run here"
        )
    vocab_size = base.get_input_embeddings().weight.shape[0] if logits is None else logits.shape[-1]
    return Survey(tuple(forms), frozenset(linears), body[0].shape[-1], vocab_size, type(body))


@torch.inference_mode()
def _run(module: Any, base: nn.Module) -> tuple[Any, Tensor | None]:
    """Returns the outputs of the body and the logits of a forward pass; None for the logits of a model without any."""
    body: list[Any] = []
    base.register_forward_hook(lambda _, inputs, outputs: body.append(outputs))
    tokens = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")
    # With a mask of padding, transformers does not look into the positions for several sequences in one.
    inputs = {"input_ids": tokens, "position_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    generates = module.get_output_embeddings() is not None
    try:
        outputs = (module if generates else base)(**inputs, use_cache=False)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(module).__name__}: {error}") from error
    except Exception as error:  # A forward pass raises anything.
        raise UnsupportedModelError(
            f"{type(module).__name__} of transformers cannot run here: its forward pass asks for more than the shapes "
            "of tensors, as do layers with a state of another kind than keys and values, or experts chosen in a loop "
            f"({error!r:.200})"
        ) from error
    if not body:
        raise UnsupportedModelError(
            f"{type(module).__name__} of transformers cannot run here: it does not call its body, "
            f"{type(base).__name__}, as a module"
        )
    return body[0], outputs.logits if generates else None


class _WatchedLinear(nn.Linear):
    """Notes whether the layer is called, and whether its matrix is used in another way.

    Attributes:
        is_called: Whether the layer was called as a module.
        is_touched: Whether the model has read the matrix itself, so that no other layer can take the place of this one.
    """

    is_called = is_touched = False

    def forward(self, input: Tensor) -> Tensor:
        self.is_called = True
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        return F.linear(input, weight, bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.is_touched = True
        return super().__getattr__(name)


class _Probe:
    """Records the attention calls of one module, and returns tensors without numbers.

    Args:
        forms: The calls of all modules; this one appends to them.
        path: Path of the module in the model.
        module: The module.
    """

    def __init__(self, forms: list[LayerForm], path: str, module: nn.Module) -> None:
        self._forms = forms
        self._path = path
        self._module = module

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """As `AttentionCallee`."""
        self._check(query, key, value, options)
        scale = options.get("scaling")
        form = LayerForm(
            self._path,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=key.shape[3],
            value_dim=value.shape[3],
            scale=key.shape[3] ** -0.5 if scale is None else float(scale),
            softcap=float(options.get("softcap") or 0.0),
            window=self._window(attention_mask, options),
        )
        self._forms.append(form)
        return torch.empty((1, NUM_TOKENS, query.shape[1], value.shape[3]), dtype=query.dtype, device="meta")

    def _check(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        unknown = sorted(name for name in options.keys() - NEUTRAL - KNOWN if options[name] is not None)
        if unknown:
            raise UnsupportedModelError(f"{self._path} asks its attention for {', '.join(unknown)}, which is not there")
        if any(form.name == self._path for form in self._forms):
            raise UnsupportedModelError(f"{self._path} attends twice in a forward pass, so it would need two caches")
        if len({key.shape[1:3], value.shape[1:3], (key.shape[1], NUM_TOKENS)}) > 1 or query.shape[2] != NUM_TOKENS:
            raise UnsupportedModelError(
                f"{self._path} attends from {list(query.shape)} to keys {list(key.shape)} and values "
                f"{list(value.shape)}; one query, key and value for each token are needed"
            )

    def _window(self, mask: Tensor | None, options: dict[str, Any]) -> int:
        """Returns the window of the layer's mask; raises if the model has changed the mask, or made it itself."""
        window = getattr(mask, "window", None)
        if isinstance(window, int):
            return window
        if window is not None:
            raise UnsupportedModelError(f"the mask of {self._path} {window}")
        causal = options.get("is_causal")
        causal = getattr(self._module, "is_causal", False) if causal is None else causal
        if mask is not None or not causal:
            kind = "changes the masks that it is given" if mask is not None else "attends to later tokens"
            raise UnsupportedModelError(f"{self._path} {kind}, which the paged attention cannot express")
        return 0
