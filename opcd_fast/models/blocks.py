"""Linear layers that only infer, on a CPU, with their weights in the blocks that oneDNN multiplies."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BlockedLinear(nn.Module):
    """nn.Linear with the weights that were last given to `load`. Decoding multiplies few rows, for which weights that
    lie row by row take up to three times as long."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether oneDNN has kernels for this type on this CPU."""
        kernels = torch.ops.mkldnn
        if not hasattr(kernels, "_reorder_linear_weight"):
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(kernels._is_mkldnn_bf16_supported()))

    def load(self, weight: Tensor) -> None:
        weight = weight.detach().contiguous()
        has_data = type(weight) is Tensor  # memory is planned with tensors that have none
        # (out, in) as before, for those who ask for its device; `to_dense` gives the numbers.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if has_data else weight.clone()

    def forward(self, hidden: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        return product
