"""How a model is to be built and run, as far as its config.json does not say."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["DEFAULT_OPTIONS", "ModelOptions"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the user chooses about a model.

    Attributes:
        quantization: `"fp8"`, or `"int8"` on a CPU, stores and multiplies the decoder layers' matrices in 8 bits; None
            keeps the dtype.
        deterministic: Every row of a batch is computed the same to the bit, whatever rows are beside it.
        load_format: `"auto"` for a checkpoint, `"sharded_state"` for what `save_sharded_state` wrote, `"dummy"` for
            random weights.
        task: `"generate"` gives it the head that makes logits of hidden states, `"classify"` the one that makes
            classes of them, `"embed"` none.

    Raises:
        ConfigError: The options exclude each other.
    """

    quantization: str | None = None
    deterministic: bool = False
    load_format: str = "auto"
    task: str = "generate"

    def __post_init__(self) -> None:
        if self.quantization == "fp8" and self.deterministic:
            raise ConfigError(
                "quantization='fp8' and deterministic=True exclude each other: the 8-bit matrix product of a GPU may "
                "depend on the batch; drop one of the two, or use quantization='int8' on a CPU"
            )


DEFAULT_OPTIONS = ModelOptions()
"""Full precision, fastest, from a checkpoint."""
