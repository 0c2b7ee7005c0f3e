"""The 8-bit linear layer on NVIDIA GPUs of compute capability 8.9 and later: `torch._scaled_mm` with a scale per row.

It requires, in torch 2.11 to 2.13, that both sizes are multiples of 16, that the second matrix is column-major, as the
transpose of a weight is, and that scales are float32 `[num_rows, 1]` and `[1, out_features]`. The only dtype of result
and bias that all of its backends support is bfloat16 (cuBLASLt on sm_90 with CUDA 12.9 or later, else CUTLASS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import scaled_linear


@scaled_linear.register("cuda")
def scaled_linear_cuda(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Runs `scaled_linear` in one kernel, which also adds the bias.

    The kernel rounds the result to bfloat16, whatever `dtype` is; the rounded result is then converted to `dtype`.

    Raises:
        ValueError: A size of the weight is not a multiple of 16.
    """
    out_features, in_features = weight.shape
    if out_features % 16 or in_features % 16:
        raise ValueError(
            f"scaled_linear: weight is {list(weight.shape)}; the GPU's 8-bit product takes multiples of 16: "
            "keep this layer in 16 bits"
        )
    if not len(x):
        return torch.empty(0, out_features, dtype=dtype, device=x.device)
    # Fast accumulation keeps the running sum in the matrix unit with about 14 bits, where the inputs have 4.
    out = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)
