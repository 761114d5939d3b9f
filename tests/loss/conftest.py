import pytest

from opcd_fast.kernels.csrc import native
from opcd_fast.loss.chunks import row_operations


@pytest.fixture(params=["torch", "triton", "native"])
def backend(request, monkeypatch):
    """Each backend; of Triton's two kernels of the reverse KL that for many rows."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(row_operations, "FEW_ROWS", 0)
    if request.param == "native" and not native.available():
        pytest.skip(native.status())
    return request.param
