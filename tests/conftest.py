"""Without a GPU, Triton kernels run through Triton's interpreter; the variable must be set before the import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the tests are small; more threads wait for each other
