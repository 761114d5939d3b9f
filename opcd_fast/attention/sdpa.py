"""Which of PyTorch's own attention kernels may run: all but cuDNN's.

From torch 2.11 cuDNN comes first on Hopper. It builds a plan for every new size, which costs up to half a second where
keys grow by one with each token; and with an explicit mask its backward can give NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def sdpa_without_cudnn() -> Iterator[None]:
    """`scaled_dot_product_attention` runs flash, memory-efficient or plain attention while the block is open.

    What else the caller has switched off stays off; where nothing is left, plain attention runs. The choice is the
    process's, not the thread's. A forward pass that is recomputed in backward has to open it again
    (`models.seam.recomputing_under`).
    """
    cuda = torch.backends.cuda
    cudnn, math = cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()
    try:
        cuda.enable_cudnn_sdp(False)
        if not (math or cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()):
            cuda.enable_math_sdp(True)
        yield
    finally:
        cuda.enable_cudnn_sdp(cudnn)
        cuda.enable_math_sdp(math)
