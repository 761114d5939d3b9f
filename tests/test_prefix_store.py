"""Prefixes on disk: the second run reads no context; whatever does not match is refused, and never a wrong prefix."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_chunked_prefill import assert_same_prefix, tokens_run
from tiny_models import pack, plain_after_context, random_ids, tiny_model, with_lora

from opcd_fast import fingerprint
from opcd_fast.prefix import SharedPrefix
from opcd_fast.prefix_store import PrefixStore, identity_of
from opcd_fast.teacher import ContextTeacher


def teacher_of(model, contexts, folder, **options):
    return ContextTeacher(model, contexts, path="merge", store=folder, **options)


def files(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "opcd_fast")
    return caplog


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed-window"])
def test_the_second_run_reads_no_context(name, tmp_path, said):
    folder, contexts = tmp_path / "prefixes" / "here", random_ids(20, 9, 0)
    first = teacher_of(tiny_model(name), contexts, folder).prefixes
    assert len(files(folder)) == 3 == len(list(folder.iterdir()))
    model = tiny_model(name)
    counts = tokens_run(model)
    second = teacher_of(model, contexts, folder)
    for a, b in zip(first, second.prefixes, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and a.metadata == b.metadata
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            assert torch.equal(x, y) and y.untyped_storage().nbytes() == y.numel() * 4
    sequences = random_ids(5, 3, 2, seed=2)
    ids, bounds = pack(sequences)
    got = second.hidden_states_packed(ids, bounds, context_index=[0, 1, 2])
    assert counts == [10]  # the sequences alone
    plain = tiny_model(name)
    want = torch.cat([plain_after_context(plain, c, s) for c, s in zip(contexts, sequences, strict=True)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert "from the store: 3" in second.explain() and str(folder) in second.explain()
    assert not said.records


def test_shared_by_a_model_with_and_without_peft(tmp_path):
    (context,) = random_ids(20)
    teacher_of(tiny_model(), context, tmp_path).prefixes  # noqa: B018
    model = with_lora(tiny_model()).eval()
    counts = tokens_run(model)
    teacher_of(model, context, tmp_path).prefixes  # noqa: B018
    assert not counts and len(files(tmp_path)) == 1
    assert_same_prefix(
        teacher_of(model, context, tmp_path, adapter="active").prefixes[0], SharedPrefix.build(model, context)
    )
    assert len(files(tmp_path)) == 2


OTHERS = {
    "weights": lambda: tiny_model(seed=1),
    "dtype": lambda: tiny_model().bfloat16(),
    "architecture": lambda: tiny_model("qwen2"),
    "window": lambda: tiny_model("mistral-window-below-context"),
    "rope": lambda: tiny_model(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "configuration": lambda: tiny_model(rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_teacher_finds_nothing(other, tmp_path, said):
    (context,) = random_ids(20)
    teacher_of(tiny_model(), context, tmp_path).prefixes  # noqa: B018
    model = OTHERS[other]()
    counts = tokens_run(model)
    got = teacher_of(model, context, tmp_path).prefixes[0]
    assert sum(counts) == 20 and len(files(tmp_path)) == 2 and not said.records
    assert torch.equal(got.keys[0], SharedPrefix.build(model, context).keys[0])


def test_autocast_and_token_ids_are_part_of_the_key(tmp_path):
    model, (context,) = tiny_model(), random_ids(20)
    teacher_of(model, context, tmp_path).prefixes  # noqa: B018
    teacher_of(model, context[:-1], tmp_path).prefixes  # noqa: B018
    assert len(files(tmp_path)) == 2
    counts = tokens_run(model)
    with torch.autocast("cpu", torch.bfloat16):
        teacher_of(model, context, tmp_path).prefixes  # noqa: B018
        assert sum(counts) == 20 and len(files(tmp_path)) == 3


# --- files that cannot be trusted ---------------------------------------------------------------------------


def flip(path):
    """One bit of the last tensor."""
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata=header)


def foreign(path):
    """Another context's file under this name."""
    model, (context,) = tiny_model(), random_ids(20, seed=7)
    other = path.parent / "other"
    teacher_of(model, context, other).prefixes  # noqa: B018
    os.replace(files(other)[0], path)


SPOILED = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"not safetensors at all" * 9),
    "header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "one bit": flip,
    "last state": lambda path: rewrite(path, lambda h, t: t["last_hidden_state"].add_(1)),
    "no last state": lambda path: rewrite(path, lambda h, t: t.pop("last_hidden_state")),
    "fewer layers": lambda path: rewrite(path, lambda h, t: h.update(layers="2")),
    "odd layers": lambda path: rewrite(path, lambda h, t: h.update(layers="three")),
    "no layers": lambda path: rewrite(path, lambda h, t: h.pop("layers")),
    "no checksum": lambda path: rewrite(path, lambda h, t: h.pop("checksum")),
    "other key": lambda path: rewrite(path, lambda h, t: h.update(store_key="0" * 64)),
    "other ids": lambda path: rewrite(path, lambda h, t: t["token_ids"].add_(1)),
    "other format": lambda path: rewrite(path, lambda h, t: h.update(format_version="0")),
    "other shape": lambda path: rewrite(path, lambda h, t: h.update(shape="[1]")),
    "foreign": foreign,
    "plain prefix": lambda path: SharedPrefix.build(tiny_model(), random_ids(20)[0]).save(path),
    "folder of that name": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_spoiled_files_are_refused_and_rebuilt(spoil, tmp_path, said):
    model, (context,) = tiny_model(), random_ids(20)
    want = teacher_of(model, context, tmp_path).prefixes[0]
    (path,) = files(tmp_path)
    SPOILED[spoil](path)
    counts = tokens_run(model)
    assert_same_prefix(teacher_of(model, context, tmp_path).prefixes[0], want)
    assert sum(counts) == 20 and len(said.records) == 1 and path.name in said.text
    if spoil != "folder of that name":  # which cannot be replaced by a file
        assert "refused and will be rebuilt" in said.text
        teacher_of(model, context, tmp_path).prefixes  # noqa: B018
        assert sum(counts) == 20 and len(said.records) == 1  # the file is whole again


def test_a_file_that_changes_after_its_check_does_not_change_the_prefix(tmp_path):
    model, (context,) = tiny_model(), random_ids(20)
    want = teacher_of(model, context, tmp_path).prefixes[0]
    loaded = teacher_of(model, context, tmp_path).prefixes[0]
    (path,) = files(tmp_path)
    with open(path, "r+b") as file:  # in place: a mapping would see it
        file.seek(-2000, os.SEEK_END)
        file.write(b"\0" * 2000)
    assert_same_prefix(loaded, want)


def test_a_folder_that_cannot_be_made_is_told(tmp_path, said):
    teacher = teacher_of(tiny_model(), [3, 4], tmp_path / "late")
    (tmp_path / "late").write_text("")
    assert len(teacher.prefixes[0]) == 2 and "was not written" in said.text


def test_a_full_disk_is_told_and_nothing_else(tmp_path, said, monkeypatch):
    model, (context,) = tiny_model(), random_ids(20)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    prefix = teacher_of(model, context, tmp_path).prefixes[0]
    assert_same_prefix(prefix, SharedPrefix.build(model, context))
    assert list(tmp_path.iterdir()) == []
    assert len(said.records) == 1 and "disk full" in said.text


def partly_and_die(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_no_file_that_is_read(tmp_path):
    """A writer that dies in the middle; its remains are not a prefix, and are swept a day later."""
    model, (context,) = tiny_model(), random_ids(20)
    identity = identity_of(model, fingerprint.of_teacher(model, "disabled"))
    path = PrefixStore(tmp_path).path_of(identity, context)
    prefix = SharedPrefix.build(model, context)
    child = os.fork()
    if child == 0:
        safetensors.torch.save_file = partly_and_die
        prefix.save(path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.name.endswith(".partial") and not path.exists()
    teacher_of(model, context, tmp_path).prefixes  # noqa: B018
    assert path.exists() and partial.exists()  # it might still be somebody's
    day_old = time.time() - 25 * 3600
    os.utime(partial, (day_old, day_old))
    PrefixStore(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_store_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="store: .*file' is not a folder"):
        ContextTeacher(tiny_model(), [1], store=tmp_path / "file")
    ContextTeacher(tiny_model(), [1], store=tmp_path / "new")
    assert not (tmp_path / "new").exists()  # until there is something to keep


# --- teachers that move -------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True])
def test_a_moving_teacher_stops_writing(hidden, tmp_path, said):
    """hidden: through .data, which torch does not count; seen as soon as a prefix is missing."""
    model, contexts = tiny_model(), random_ids(20, 9)
    ids, bounds = pack(random_ids(5))
    teacher = teacher_of(model, contexts, tmp_path)
    teacher.hidden_states_packed(ids, bounds, context_index=[0])
    assert len(files(tmp_path)) == 1
    weight = model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        (weight.data if hidden else weight).mul_(1.5)
    for index in (1, 0):
        got = teacher.hidden_states_packed(ids, bounds, context_index=[index])
        torch.testing.assert_close(got, plain_after_context(model, contexts[index], ids), atol=1e-4, rtol=0)
    assert len(files(tmp_path)) == 1
    assert len(said.records) == 1 and "the teacher's weights change" in said.text
    assert "not used: the teacher's weights change" in teacher.explain()
    # The file of the first weights is still theirs.
    fresh = tiny_model()
    counts = tokens_run(fresh)
    assert_same_prefix(
        teacher_of(fresh, contexts[0], tmp_path).prefixes[0], SharedPrefix.build(tiny_model(), contexts[0])
    )
    assert not counts


def test_invalidate_leaves_the_store(tmp_path, said):
    model, (context,) = tiny_model(), random_ids(20)
    teacher = teacher_of(model, context, tmp_path)
    teacher.prefixes  # noqa: B018
    counts = tokens_run(model)
    teacher.invalidate()
    teacher.prefixes  # noqa: B018
    assert sum(counts) == 20 and len(said.records) == 1


@pytest.mark.parametrize("adapter", ["active", "disabled"])
def test_weights_in_training_are_not_stored(adapter, tmp_path, said):
    model, (context,) = with_lora(tiny_model()).train(), random_ids(20)
    teacher_of(model, context, tmp_path, adapter=adapter).prefixes  # noqa: B018
    assert len(files(tmp_path)) == (adapter == "disabled")  # the base does not train
    assert len(said.records) == (adapter == "active")


def test_change_of_dtype_is_no_move(tmp_path, said):
    model, (context,) = tiny_model(), random_ids(20)
    teacher = teacher_of(model, context, tmp_path)
    teacher.prefixes  # noqa: B018
    model.bfloat16()
    assert teacher.prefixes[0].keys[0].dtype == torch.bfloat16
    assert len(files(tmp_path)) == 2 and not said.records


def test_weights_that_are_not_plain_bytes_are_not_stored(tmp_path, said):
    class Packed(torch.nn.Parameter):
        pass

    model, (context,) = tiny_model(), random_ids(20)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = Packed(layer.weight.data)
    teacher = teacher_of(model, context, tmp_path)
    teacher.prefixes  # noqa: B018
    teacher.invalidate()
    teacher.prefixes  # noqa: B018
    assert not files(tmp_path) and len(said.records) == 1
    assert "layers.0.self_attn.q_proj.weight is a Packed" in said.text


def test_rope_that_moves_is_not_stored(tmp_path, said):
    """Its frequencies are a buffer, which would look like weights that change."""
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "default", "sliding_attention": {"rope_type": "longrope"}}
    model.config.original_max_position_embeddings = 64
    teacher_of(model, random_ids(20)[0], tmp_path).prefixes  # noqa: B018
    about_store = [record.getMessage() for record in said.records if "store" in record.getMessage()]
    assert not files(tmp_path) and len(about_store) == 1 and "RoPE" in about_store[0]


def test_concat_leaves_the_store_alone(tmp_path):
    teacher = ContextTeacher(tiny_model(), random_ids(20)[0], path="concat", store=tmp_path)
    teacher.prefixes  # noqa: B018
    assert not files(tmp_path) and "not used: path 'concat' keeps no keys" in teacher.explain()
