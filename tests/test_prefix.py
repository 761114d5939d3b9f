"""SharedPrefix: what it holds, and its file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import plain_hidden, random_ids, tiny_model

from opcd_fast.prefix import SharedPrefix


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


@pytest.mark.parametrize("length", [0, 1, 20])
def test_round_trip(tmp_path, length):
    model = tiny_model("mistral-window-below-context")
    (context,) = random_ids(length)
    prefix = SharedPrefix.build(model, context)
    path = tmp_path / "context.safetensors"
    prefix.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["context.safetensors"]
    loaded = SharedPrefix.load(path, model=model)
    assert torch.equal(loaded.token_ids, context) and loaded.metadata == prefix.metadata
    assert loaded.nbytes == prefix.nbytes
    for a, b in zip((*prefix.keys, *prefix.values), (*loaded.keys, *loaded.values), strict=True):
        assert torch.equal(a, b)
    if length:
        assert torch.equal(loaded.last_hidden_state, prefix.last_hidden_state)


def test_foreign_files_are_refused(tmp_path):
    foreign = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(ValueError, match="not a prefix"):
        SharedPrefix.load(foreign)
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable prefix"):
        SharedPrefix.load(noise)
    with pytest.raises(FileNotFoundError, match="path"):
        SharedPrefix.load(tmp_path / "missing")


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "context.safetensors"
    SharedPrefix.build(tiny_model(), random_ids(20)[0]).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable prefix"):
        SharedPrefix.load(path)


def test_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "context.safetensors"
    SharedPrefix.build(tiny_model("llama"), random_ids(20)[0]).save(path)
    with pytest.raises(ValueError, match=r"another model.*shape"):
        SharedPrefix.load(path, model=tiny_model("llama-mha"))
    with pytest.raises(ValueError, match=r"another model.*dtype"):
        SharedPrefix.load(path, model=tiny_model("llama").bfloat16())


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    prefix = SharedPrefix.build(tiny_model(), random_ids(5)[0])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prefix.save(tmp_path / "context.safetensors")
    assert list(tmp_path.iterdir()) == []
