"""Files are whole or not there, as the umask wants them, and nothing is left of what failed; full disks included."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from opcd_fast.errors import InputError
from opcd_fast.runtime import clear_unfinished, read_object, remove_folder, write_file, write_folder, write_text


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_umasks_permissions(tmp_path, umask):
    before = os.umask(umask)

    def fill(folder):
        (folder / "a").write_text("x")
        (folder / "a").chmod(0o600)  # as safetensors does

    try:
        (tmp_path / "old.json").write_text("x")
        (tmp_path / "old.json").chmod(0o600)
        for _ in range(2):
            write_text(tmp_path / "old.json", "{}")
            write_text(tmp_path / "deep" / "new.json", "{}")
            write_folder(tmp_path / "folder" / "inner", fill)
    finally:
        os.umask(before)
    for path in (tmp_path / "old.json", tmp_path / "deep" / "new.json", tmp_path / "folder" / "inner" / "a"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    for path in (tmp_path / "deep", tmp_path / "folder", tmp_path / "folder" / "inner"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask, path


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="'.' cannot be replaced.*inside of it"):
        write_folder(Path("."), lambda folder: pytest.fail("refused before anything is written"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(os, name, fail)
            with pytest.raises(InputError, match="cannot write.*No space left"):
                write_text(tmp_path / "a", "new")
        assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_a_killed_process_left_is_found_at_any_depth(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # killed: nothing is cleaned up
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(os, "replace", lambda *_: None)
        write_file(tmp_path / "deep" / "rollout.json", "x")
        (tmp_path / "deep" / "step-1").mkdir()
        remove_folder(tmp_path / "deep" / "step-1")
    (tmp_path / ".mine").write_text("x")
    assert len(names(tmp_path / "deep")) == 2
    clear_unfinished(tmp_path)
    assert names(tmp_path / "deep") == [] and names(tmp_path) == [".mine", "deep"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\x80", "[" * 100_000], ids=repr)
def test_what_is_no_object_is_named(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=f"{file}.*; do this") as error:
        read_object(file, "; do this")
    assert len(str(error.value)) < 1000
    with pytest.raises(InputError, match="nothing.json"):
        read_object(tmp_path / "nothing.json")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_what_was_there(small_disk):
    write_text(small_disk / "run" / "a.json", json.dumps({"old": 1}))
    write_folder(small_disk / "run" / "step", lambda folder: (folder / "w").write_bytes(b"old" * 100))
    (small_disk / "filler").write_bytes(b"x" * 200_000)
    for _ in range(3):
        with pytest.raises(InputError, match="cannot write.*[Nn]o space left"):
            write_text(small_disk / "run" / "a.json", "x" * 100_000)
        with pytest.raises(InputError, match="cannot write.*[Nn]o space left"):
            write_folder(small_disk / "run" / "step", lambda folder: (folder / "w").write_bytes(b"x" * 100_000))
    assert names(small_disk / "run") == ["a.json", "step"]
    assert read_object(small_disk / "run" / "a.json") == {"old": 1}
    assert (small_disk / "run" / "step" / "w").read_bytes() == b"old" * 100
