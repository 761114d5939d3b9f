"""Float32 is float32 here. Tests that compile for seconds run last: a machine may be taken away before the end."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
COMPILED = ("flex", "compile", "row_flex", "3.0")  # in a test's name: flex attention, torch.compile, a softcap


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in Path(item.path).parents]
    others = [item for item in items if HERE not in Path(item.path).parents]
    here.sort(key=lambda item: any(word in item.name for word in COMPILED))  # stable
    items[:] = [*others, *here]


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
