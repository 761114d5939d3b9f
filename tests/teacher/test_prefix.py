"""SharedPrefix: what it holds."""

from __future__ import annotations

import pytest
import torch
from tiny_models import plain_hidden, random_ids, tiny_model

from opcd_fast.teacher.prefix import SharedPrefix


@pytest.mark.parametrize(("name", "kept"), [("llama", 20), ("mistral-window-below-context", 7)])
def test_shapes_and_bytes(name, kept):
    model = tiny_model(name)
    (context,) = random_ids(20)
    prefix = SharedPrefix.build(model, context)
    assert len(prefix) == 20 and len(prefix.keys) == len(prefix.values) == 3
    for x in (*prefix.keys, *prefix.values):
        assert x.shape == (1, 2, kept, 8)
        assert x.untyped_storage().nbytes() == x.numel() * 4  # not a view of something longer
        assert not x.requires_grad
    assert prefix.nbytes == 2 * 3 * 2 * kept * 8 * 4
    with torch.no_grad():
        torch.testing.assert_close(prefix.last_hidden_state, plain_hidden(model, context)[-1])


def test_empty_context():
    prefix = SharedPrefix.build(tiny_model(), torch.zeros(0, dtype=torch.int64))
    assert len(prefix) == 0 and prefix.nbytes == 0 and prefix.last_hidden_state is None
