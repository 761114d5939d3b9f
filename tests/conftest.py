"""Without a GPU, Triton kernels run through Triton's interpreter; the variable must be set before the import."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start: many at once wait for each other

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
