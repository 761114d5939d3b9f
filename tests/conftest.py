"""Without a GPU, Triton kernels run through Triton's interpreter; the variable must be set before the import."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start: many at once wait for each other

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


def pytest_configure() -> None:
    """Hundreds of tests would fail with a TypeError of the interpreter's own."""
    from importlib.metadata import PackageNotFoundError, version

    import pytest

    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return
    if os.environ.get("TRITON_INTERPRET") == "1" and triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError("Triton 3.6's interpreter does not work with NumPy 2.4 or newer: install 'numpy<2.4'")
