"""`CodedExperts`: experts whose matrices are stored in 4 or 8 bits, and multiply plain activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels import quantize_fp8
from ...kernels.experts import KINDS, SPAN, CodedMatrices, can_multiply_codes
from ..device import Device
from ..errors import ConfigError
from ..layers import Experts, ExpertsLayer, WeightSlot
from ..parallel.shard import Shard
from ..weights.codes import Codes, QuantForm
from .rounding import round_to_groups

__all__ = ["CodedExperts"]

KIND_OF: Mapping[tuple[str, int], str] = {
    ("int", 4): "int4",
    ("int", 8): "int8",
    ("fp8", 8): "e4m3",
    ("mxfp4", 4): "e2m1",
}
"""Kind and bits of a `QuantForm` -> kind of code of `kernels.experts`."""

EXPONENT_OF_1 = 127


class CodedExperts(Experts):
    """Experts whose matrices are codes with scales by row and group of columns, as a checkpoint has them.

    Args:
        layer: The description of the experts.
        inner_form: How the projections to the width inside an expert are quantised.
        down_form: How the projection back is quantised.
        deterministic: Whether a token's result must not depend, to the bit, on the rest of the batch.
    """

    def __init__(
        self, layer: ExpertsLayer, inner_form: QuantForm, down_form: QuantForm, *, deterministic: bool
    ) -> None:
        self._forms = {"w13": inner_form, "w2": down_form}
        super().__init__(layer, deterministic=deterministic)

    @staticmethod
    def declines(layer: ExpertsLayer, inner_form: QuantForm, down_form: QuantForm, device: Device) -> str | None:
        """Returns why experts cannot be made, as `QuantizationScheme.declines` does.

        Raises:
            ConfigError: A rank's part of an expert does not end with a group of columns.
        """
        if not can_multiply_codes("cpu" if device.is_cpu else "cuda"):
            return ": the compiled kernels are missing, and without them experts in codes would be slow on a CPU"
        for form, columns in ((inner_form, Shard(layer.hidden_size)), (down_form, layer.inner)):
            size = form.group_size
            has_groups = 0 < size < columns.size
            if (form.kind, form.bits) not in KIND_OF:
                return f": there is no kernel for experts in {form.format} with {form.bits} bits"
            if form.act_order:
                return ": with desc_act the columns of each expert have an order of their own"
            if (has_groups and size % SPAN) or columns.length * form.bits % 8:
                return f": there is no kernel for experts with groups of {size} of {columns.length} columns"
            if has_groups and columns.count > 1 and columns.room % size:
                raise ConfigError(
                    f"{layer.name}: with tensor_parallel_size={columns.count} a rank has {columns.room} of the "
                    f"{columns.size} columns of a down projection, which is quantised in groups of {size}; set "
                    "enable_expert_parallel=True, so that a rank has whole experts, or use fewer ranks"
                )
        return None

    def _add_matrices(self, name: str, num_rows: int, num_columns: int) -> None:
        form, kind = self._forms[name], KINDS[self._kind(name)]
        num_groups = -(-num_columns // self._group(name, num_columns))
        scale_dtype = torch.uint8 if form.kind == "mxfp4" else torch.float32
        shapes = {"codes": (num_columns * kind.bits // 8, torch.uint8), "scales": (num_groups, scale_dtype)}
        if form.has_zeros:
            shapes["zeros"] = (num_groups, torch.uint8)
        for part, (width, dtype) in shapes.items():
            self.register_parameter(f"{name}_{part}", self._parameter(num_rows, width, dtype=dtype))

    def _kind(self, name: str) -> str:
        form = self._forms[name]
        return KIND_OF[form.kind, form.bits]

    def _group(self, name: str, num_columns: int) -> int:
        """Returns the columns of a group, for rows of some columns."""
        size = self._forms[name].group_size
        return size if 0 < size < num_columns else num_columns

    def _tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns codes, scales and zeros of all experts."""
        zeros = self.get_parameter(f"{name}_zeros") if self._forms[name].has_zeros else None
        return self.get_parameter(f"{name}_codes"), self.get_parameter(f"{name}_scales"), zeros

    def _matrices(self, name: str) -> CodedMatrices:
        codes, scales, zeros = self._tensors(name)
        num_columns = self.layer.hidden_size if name == "w13" else self.layer.inner.length
        return CodedMatrices(self._kind(name), codes, scales, zeros, self._group(name, num_columns))

    def _matrix_slot(self, name: str, index: int, rows: slice) -> WeightSlot:
        targets = tuple(tensor[index, rows] for tensor in self._tensors(name) if tensor is not None)

        def encode(weight: Codes | Tensor) -> tuple[Tensor, ...]:
            weight = weight if isinstance(weight, Codes) else self._round(name, weight)
            return _encode(weight, self._kind(name), has_zeros=self._forms[name].has_zeros)

        return WeightSlot(targets, encode, takes_codes=True)

    def _round(self, name: str, weight: Tensor) -> Codes:
        """Rounds a plain matrix, as online quantization and random weights need."""
        form = self._forms[name]
        if form.kind == "fp8":
            return Codes(*quantize_fp8(weight.to(self.layer.device, self.layer.dtype)))
        if form.kind == "mxfp4":  # Only random weights come here, and zeros serve as well.
            num_groups = weight.shape[1] // form.group_size
            return Codes(torch.zeros(weight.shape, dtype=torch.uint8), torch.ones(len(weight), num_groups))
        return round_to_groups(weight.to(self.layer.device), form.bits, self._group(name, weight.shape[1]))


def _encode(codes: Codes, kind: str, *, has_zeros: bool) -> tuple[Tensor, ...]:
    """Returns codes, scales and perhaps zeros of a matrix as `CodedMatrices` has them."""
    values, scales, zeros = codes.values, codes.scales, codes.zeros
    middle = KINDS[kind].zero if zeros is None else 0
    if kind == "e4m3":
        values = values.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        values = (values.to(torch.int16) + middle).to(torch.uint8)
    if kind == "e2m1":
        scales = (scales.frexp().exponent - 1 + EXPONENT_OF_1).to(torch.uint8)
    if KINDS[kind].bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    if not has_zeros:
        return values, scales
    return values, scales, torch.full_like(scales, middle) if zeros is None else zeros
