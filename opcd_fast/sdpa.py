"""Which of PyTorch's own attention kernels may run: all but cuDNN's.

From torch 2.11 cuDNN comes first on Hopper. It builds a plan for every new size, which costs up to half a second where
keys grow by one with each token; and with an explicit mask its backward can give NaN.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_CUDNN = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def sdpa_without_cudnn() -> AbstractContextManager[None]:
    """`scaled_dot_product_attention` picks one of `WITHOUT_CUDNN` while the block is open.

    The choice is the process's, not the thread's. A forward pass that is recomputed in backward has to open it again
    (`transformers_seam.recomputing_under`).
    """
    return sdpa_kernel(list(WITHOUT_CUDNN))
