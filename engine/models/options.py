"""How a model is to be built and run, as far as its config.json does not say."""

from __future__ import annotations

from dataclasses import dataclass

from ..quantization.registry import find_scheme
from ..quantization.scheme import QuantizationScheme

__all__ = ["DEFAULT_OPTIONS", "ModelOptions"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the user chooses about a model.

    Attributes:
        quantization: Name of the scheme by which the layers' matrices are stored and multiplied; None keeps the dtype.
        deterministic: Every row of a batch is computed the same to the bit, whatever rows are beside it.
        load_format: `"auto"` for a checkpoint, `"sharded_state"` for what `save_sharded_state` wrote, `"dummy"` for
            random weights.
        head: The module after the last layer: `"lm_head"` makes the logits of tokens, `"score"` the logits of classes;
            None for a model that returns hidden states only.
        unused_weights: Names of weights that the checkpoint may hold and the model has no place for.

    Raises:
        ConfigError: The scheme excludes another option.
    """

    quantization: str | None = None
    deterministic: bool = False
    load_format: str = "auto"
    head: str | None = "lm_head"
    unused_weights: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.make_scheme()

    def make_scheme(self) -> QuantizationScheme:
        """Makes the quantization scheme."""
        return find_scheme(self.quantization)(deterministic=self.deterministic)


DEFAULT_OPTIONS = ModelOptions()
"""Full precision, fastest, from a checkpoint."""
