import pytest

from opcd_fast.kernels.csrc import native


@pytest.fixture(params=["torch", "triton", "native"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "native" and not native.available():
        pytest.skip(native.status())
    return request.param
