"""`ModelOptions`: the user's choices about a model that its config.json does not contain."""

from __future__ import annotations

from dataclasses import dataclass

from ..lora.slots import SlotSizes
from ..quantization.registry import find_scheme
from ..quantization.scheme import QuantizationScheme
from ..quantization.stored import StoredForms, StoredScheme
from ..weights.head_rows import HeadRows

__all__ = ["DEFAULT_OPTIONS", "ModelOptions"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options with which a model is built and loaded.

    Attributes:
        quantization: Name of the quantization scheme of the linear layers; None for matrices in the dtype of the model.
            A quantised checkpoint has its own.
        deterministic: Whether each row of a batch gets the same bits whatever the other rows are.
        load_format: `"auto"` for a checkpoint, `"sharded_state"` for files that `save_sharded_state` wrote, `"dummy"`
            for random weights.
        head: The module after the last layer: `"lm_head"` makes the logits of tokens, `"score"` the logits of classes;
            None for a model that returns hidden states only.
        unused_weights: Our names of weights that the model does not have; the loader skips them in a checkpoint.
        expert_parallel: Whether each rank of a pp stage has whole experts; otherwise it has a slice of each.
        max_model_len: The setting of the same name; None for all positions of the model. It chooses between the two
            lists of rotary frequencies that some models have.
        adapter_slots: Number and size of the adapter slots; None for a model without adapters.
        stored: How the matrices of a quantised checkpoint are stored; None for an unquantised checkpoint.
        head_rows: Rows of the checkpoint's output head that fill the head of a classifier; None for a checkpoint with
            such a head.

    Raises:
        ConfigError: The quantization scheme cannot be combined with another option.
    """

    quantization: str | None = None
    deterministic: bool = False
    load_format: str = "auto"
    head: str | None = "lm_head"
    unused_weights: frozenset[str] = frozenset()
    expert_parallel: bool = False
    max_model_len: int | None = None
    adapter_slots: SlotSizes | None = None
    stored: StoredForms | None = None
    head_rows: HeadRows | None = None

    def __post_init__(self) -> None:
        self.make_scheme()

    def make_scheme(self) -> QuantizationScheme:
        """Returns a new object of the quantization scheme."""
        if self.stored is not None:
            return StoredScheme(self.stored, deterministic=self.deterministic)
        return find_scheme(self.quantization)(deterministic=self.deterministic)


DEFAULT_OPTIONS = ModelOptions()
"""The options of a generating model in full precision, not deterministic, loaded from a checkpoint."""
