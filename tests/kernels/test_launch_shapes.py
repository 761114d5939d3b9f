"""The table of launch shapes: what is read, what is refused, and that kernels start with what it says."""

import json

import pytest
import torch

from opcd_fast.kernels.reference import Logits
from opcd_fast.kernels.triton import launch_shapes
from opcd_fast.kernels.triton.launch_shapes import (
    KERNELS,
    PACKAGED,
    current_table,
    forced_shape,
    launch_shape,
    read_table,
)


def table(tmp_path, **changes):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({**json.loads(PACKAGED.read_text()), **changes}))
    return path


def test_the_variable_names_another_table_whose_wider_rows_take_the_last(tmp_path, monkeypatch):
    assert set(current_table().shapes) == set(KERNELS)
    source = {"device": "a device", "date": "2026-01-01", "commit": "abc"}
    path = table(tmp_path, source=source, logprob_rows=[[100, 128, 1], [200, 512, 2]])
    monkeypatch.setenv(launch_shapes.VARIABLE, str(path))
    assert current_table().source == source
    found = [launch_shape("logprob_rows", columns) for columns in (1, 100, 101, 200, 10**6)]
    assert found == [(128, 1), (128, 1), (512, 2), (512, 2), (512, 2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, ["schema 1"]),
        ({"row": []}, ["schema 1", "divergence_rows"]),
        ({"source": {"device": "a"}}, ["source", "commit"]),
        ({"logprob_rows": []}, ["logprob_rows", "[]"]),
        ({"logprob_rows": [[100, 128]]}, ["logprob_rows", "[100, 128]"]),
        ({"logprob_rows": [[100, 128, True]]}, ["logprob_rows", "True"]),
        ({"logprob_rows": [[100, 128, 1], [100, 256, 1]]}, ["logprob_rows", "rise"]),
        ({"logprob_rows": [[100, 192, 1]]}, ["logprob_rows", "192", "powers of two"]),
        ({"logprob_rows": [[100, 128, 2]]}, ["logprob_rows", "128 a warp"]),
        ({"logprob_rows": [[100, 8192, 64]]}, ["logprob_rows", "32 warps"]),
    ],
)
def test_a_bad_table_is_one_error_that_names_the_entry(tmp_path, monkeypatch, changes, words):
    path = table(tmp_path, **changes)
    monkeypatch.setenv(launch_shapes.VARIABLE, str(path))
    with pytest.raises(ValueError) as error:
        launch_shape("logprob_rows", 10)
    assert all(word in str(error.value) for word in (launch_shapes.VARIABLE, str(path), *words)), error.value


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "text").write_text("[[4096, 512, 2]")
    for name in ("text", "missing"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_table(tmp_path / name)
    (tmp_path / "list").write_text("[]")
    with pytest.raises(ValueError, match="not a table"):
        read_table(tmp_path / "list")


def test_kernels_start_with_a_forced_shape():
    pytest.importorskip("triton")
    from opcd_fast.kernels.triton import divergences as kernel

    g = torch.Generator().manual_seed(0)
    z_s, z_t = (Logits(torch.randn(3, 700, generator=g)) for _ in range(2))
    started = []

    class Watched:
        def __getitem__(self, grid):
            def start(*arguments, BLOCK, num_warps, **options):
                started.append((BLOCK, num_warps))
                return original[grid](*arguments, BLOCK=BLOCK, num_warps=num_warps, **options)

            return start

    original, kernel._terms_kernel = kernel._terms_kernel, Watched()
    try:
        found = []
        for shape in ((512, 2), (128, 1), (256, 1)):
            with forced_shape("divergence_rows", *shape):
                statistics = torch.zeros(6, 3)
                kernel.divergence_rows(z_s, z_t, torch.ones(3), statistics, None)
            found.append(statistics)
    finally:
        kernel._terms_kernel = original
    assert started == [(512, 2), (128, 1), (256, 1)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    assert launch_shape("divergence_rows", 700) == current_table().shapes["divergence_rows"][0][1:]


def test_a_shape_that_no_kernel_could_use_is_not_forced():
    with pytest.raises(ValueError, match="kernel is 'rows'"), forced_shape("rows", 512, 2):
        pass
    with pytest.raises(ValueError, match="powers of two"), forced_shape("divergence_rows", 500, 2):
        pass
    assert launch_shape("divergence_rows", 10) == current_table().shapes["divergence_rows"][0][1:]
