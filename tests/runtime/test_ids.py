"""Token ids come in any container; what are none is refused by name."""

import numpy as np
import pytest
import torch

from opcd_fast import InputError
from opcd_fast.runtime import token_ids


@pytest.mark.parametrize(
    "given", [[3, 4], (3, 4), iter([3, 4]), np.array([3, 4]), list(np.array([3, 4])), torch.tensor([3, 4]),
              list(torch.tensor([3, 4])), {3: "a", 4: "b"}.keys()],
)  # fmt: skip
def test_any_container(given):
    found = token_ids("ids", given, 5)
    assert found == [3, 4] and all(type(i) is int for i in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "text.*input_ids"), ({"input_ids": [3]}, "dict.*input_ids"), (None, "got None"), (3, "got 3"),
        ([3.0], r"got \[3.0\]"), (torch.ones(2), "integers"), (torch.ones(1, 2, dtype=torch.int64), "1-D"),
        ([True], "got"), (np.array([True]), "got"), (torch.tensor([True]), "got"), ([None], "got"),
        ([3, -1], "-1"), ([3, 5], r"5.*\[0, 5\)"),
    ],
)  # fmt: skip
def test_what_are_no_ids(given, message):
    with pytest.raises(InputError, match=f"^ids .*{message}"):
        token_ids("ids", given, 5)
