"""The CPU library: that it is there where it can be, that its absence is told, and its bf16 product."""

import shutil
import subprocess
import sys

import pytest
import torch

from opcd_fast.evaluation import describe
from opcd_fast.kernels.csrc import native

needs_library = pytest.mark.skipif(not native.available(), reason=f"the CPU library is {native.status()}")
LEVELS = native.supported_levels() if native.available() else ()


@pytest.fixture
def no_cache():
    for cached in (native._open, native._with_threads):
        cached.cache_clear()
    yield
    for cached in (native._open, native._with_threads):
        cached.cache_clear()


def test_the_library_is_there_where_it_can_be_built():
    if not (shutil.which("cmake") and any(map(shutil.which, ("c++", "g++", "clang++")))):
        pytest.skip("no CMake or no C++ compiler")
    assert native.available(), native.status()
    assert native.status() == f"built, ABI {native.ABI}, {LEVELS[-1]}"
    assert native.status() in describe()


def test_a_missing_library_is_told(monkeypatch, no_cache):
    monkeypatch.setattr(native, "library_path", lambda: None)
    assert not native.available() and not native.has_bf16_dot()
    assert native.status().startswith("not built: ") and "install" in native.status()
    with pytest.raises(RuntimeError, match="the CPU library is not built"):
        native.level()


@needs_library
def test_a_library_of_another_version_is_told_and_not_called(monkeypatch, no_cache):
    built = native.ABI
    monkeypatch.setattr(native, "ABI", 99)
    assert not native.available()
    assert native.status() == f"unusable: its ABI is {built}, this version needs 99; reinstall opcd-fast"


def test_a_broken_library_is_told(monkeypatch, tmp_path, no_cache):
    broken = tmp_path / "libopcd_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "library_path", lambda: broken)
    assert not native.available()
    assert native.status().startswith("unusable: ")


@needs_library
def test_the_level_is_the_best_or_the_one_asked_for(monkeypatch):
    monkeypatch.delenv("OPCD_NATIVE_LEVEL", raising=False)
    assert native.level() == LEVELS[-1]
    monkeypatch.setenv("OPCD_NATIVE_LEVEL", "portable")
    assert native.level() == "portable"
    for wrong in ("sse9", next(iter(set(native.LEVELS) - set(LEVELS)), "none")):
        monkeypatch.setenv("OPCD_NATIVE_LEVEL", wrong)
        with pytest.raises(ValueError, match=f"OPCD_NATIVE_LEVEL is '{wrong}'; .* have portable"):
            native.level()


@needs_library
@pytest.mark.skipif(sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="torch without libgomp")
def test_the_threads_are_those_of_torch():
    assert native._openmp_of_torch()
    code = "import sys, opcd_fast.kernels.csrc.native as n; n.status(); assert 'torch' not in sys.modules"
    code += "; look = n._openmp_of_torch; found = []; n._openmp_of_torch = lambda: found.append(look()) or found[-1]"
    code += "; n.available(); assert found[0]"
    code += "; print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp.so' in line or 'omp-' in line})"
    runtimes = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert len(runtimes.stdout.split()) == 1, runtimes


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("OPCD_NATIVE_LEVEL", request.param)
    return request.param


def operands(rows, columns, width):
    g = torch.Generator().manual_seed(width)
    return torch.randn(rows, width, generator=g).bfloat16(), torch.randn(columns, width, generator=g).bfloat16()


@needs_library
@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(1, 1, 1), (1, 1, 2), (3, 31, 33), (12, 32, 64), (13, 33, 63), (25, 100, 577), (5, 1, 31), (1, 65, 1)],
)
def test_product(level, rows, columns, width):
    h, weight = operands(rows, columns, width)
    out = torch.full((rows, columns), torch.nan)
    native.project_bf16(h, weight, out)
    exact = h.double() @ weight.double().T
    assert float((out - exact).norm()) <= 1e-6 * float(exact.norm()) + 1e-30


@needs_library
def test_product_of_strided_operands_keeps_its_neighbours(level):
    h, weight = operands(14, 37, 90)
    out = torch.full((14, 64), 9.0)
    native.project_bf16(h[:, 7:70], weight[:, 3:66], out[:, :37])
    exact = h[:, 7:70].double() @ weight[:, 3:66].double().T
    torch.testing.assert_close(out[:, :37].double(), exact, rtol=1e-5, atol=1e-5)
    assert (out[:, 37:] == 9).all()


@needs_library
def test_an_element_of_the_product_depends_on_its_row_and_column_alone(level):
    """The student's and the teacher's products must round alike whatever chunk a token falls into."""
    h, weight = operands(27, 131, 75)
    whole, part = torch.empty(27, 131), torch.empty(4, 9)
    native.project_bf16(h, weight, whole)
    native.project_bf16(h[11:15], weight[40:49], part)
    assert torch.equal(whole[11:15, 40:49], part)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = torch.empty(27, 131)
        native.project_bf16(h, weight, threaded)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, threaded)


@needs_library
def test_empty_products():
    native.project_bf16(torch.empty(0, 4).bfloat16(), torch.zeros(3, 4).bfloat16(), torch.empty(0, 3))
    native.project_bf16(torch.empty(2, 4).bfloat16(), torch.zeros(0, 4).bfloat16(), torch.empty(2, 0))
    out = torch.full((2, 3), 9.0)
    native.project_bf16(torch.empty(2, 0).bfloat16(), torch.empty(3, 0).bfloat16(), out)
    assert not out.any()


@needs_library
def test_operands_of_the_wrong_kind_are_refused():
    h, weight = operands(4, 5, 6)
    out = torch.empty(4, 5)
    for arguments, name in (
        ((h.float(), weight, out), "h"),
        ((h, weight[:, :5], out), "weight"),
        ((h, weight, out.T.contiguous().T), "out"),
        ((h, weight, out.double()), "out"),
    ):
        with pytest.raises(ValueError, match=f"^{name} is "):
            native.project_bf16(*arguments)


@needs_library
def test_bf16_dot_is_said_to_be_there_only_when_it_is_right(monkeypatch):
    """On a CPU without the instruction the level must not be offered; with it, a failed check falls back."""
    monkeypatch.delenv("OPCD_NATIVE_LEVEL", raising=False)
    assert native.has_bf16_dot() == (native.BF16_DOT_LEVEL in LEVELS)
    if not native.has_bf16_dot():
        return
    monkeypatch.setattr(native, "_bf16_dot_is_right", lambda: False)
    assert not native.has_bf16_dot()
    h, weight = operands(3, 5, 8)
    out, wanted = torch.empty(3, 5), torch.empty(3, 5)
    native.project_bf16(h, weight, out)
    native._project(h, weight, wanted, "avx512")
    assert torch.equal(out, wanted)


@needs_library
def test_threads_of_our_own_where_torch_brings_no_openmp():
    library = native._library()
    h, weight = operands(27, 131, 75)
    found = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for runtime in (native._openmp_of_torch(), None):
            library.opcd_native_use_openmp(runtime)
            found.append(torch.empty(27, 131))
            native.project_bf16(h, weight, found[-1])
    finally:
        torch.set_num_threads(before)
        library.opcd_native_use_openmp(native._openmp_of_torch())
    assert torch.equal(*found)
