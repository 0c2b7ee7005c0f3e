"""The format MXFP4 (`quant_method: mxfp4`) of gpt-oss, whose experts have numbers of 4 bits in blocks of 32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...weights.codes import QuantForm
from ...weights.mxfp4 import MXFP4_FORM
from ...weights.tensor_view import StoredTensor
from ..checkpoint_format import CheckpointFormat

__all__ = ["FORMAT"]


class Mxfp4Format(CheckpointFormat):
    """Leaves the tensors to `iter_tensors`, which joins blocks and scales."""

    leaves = ()

    @property
    def planned_form(self) -> QuantForm:
        """The form of the experts."""
        return MXFP4_FORM

    def plans(self, name: str) -> bool:
        """Returns whether a layer is an expert: all others are plain."""
        return ".experts." in name

    def join_module(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterable[tuple[str, StoredTensor]]:
        """Is never called, because the format has no `leaves`."""
        return tensors.items()


FORMAT = Mxfp4Format
