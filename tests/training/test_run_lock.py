"""A run's folder has one owner."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from opcd_fast.errors import InputError
from opcd_fast.training.run import RunFolder, Saved, lock
from opcd_fast.training.run.lock import LOCK, RunLock

HOLD = """
import os, sys, time
from pathlib import Path
from opcd_fast.training.run.lock import RunLock
RunLock(Path(sys.argv[1])).take()
if len(sys.argv) > 2 and os.fork():
    os._exit(0)  # what it started lives on
print(os.getpid(), flush=True)
time.sleep(600)
"""


def holding(folder, *more):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_second_process_is_refused_with_the_firsts_pid_and_host(tmp_path, caplog):
    process, _ = holding(tmp_path)
    try:
        with pytest.raises(InputError, match=f"process {process.pid} on host '{socket.gethostname()}'"):
            RunLock(tmp_path).take()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
        folder = RunFolder(tmp_path, resume=False)
        (tmp_path / "metrics.jsonl").write_text("theirs")
        with pytest.raises(InputError, match=str(process.pid)):
            folder.start({})
        assert (tmp_path / "metrics.jsonl").read_text() == "theirs" and not (tmp_path / "config.json").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lock = RunLock(tmp_path)
    lock.take()  # what a killed process left
    assert [record for record in caplog.records if str(process.pid) in record.message]
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.glob("*.lock"))


def test_children_of_a_dead_process_do_not_own_the_folder(tmp_path):
    process, child = holding(tmp_path, "fork")
    try:
        process.wait()
        assert child != process.pid
        RunLock(tmp_path).take()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    locked, calls = lock._locked, []

    def slow(handle):
        calls.append(handle)
        if len(calls) == 1:  # opened here, and removed there before it is locked
            (tmp_path / LOCK).unlink()
        return locked(handle)

    monkeypatch.setattr(lock, "_locked", slow)
    RunLock(tmp_path).take()
    assert len(calls) == 2 and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_another_host_is_refused_with_the_remedy(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(InputError, match=f"process 1 on host 'elsewhere'.*remove '{tmp_path / LOCK}'"):
        RunLock(tmp_path).take()
    assert json.loads((tmp_path / LOCK).read_text()) == {"pid": 1, "host": "elsewhere"}
    (tmp_path / LOCK).unlink()
    RunLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x1b"])
def test_a_damaged_lock_of_nobody_is_taken(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    RunLock(tmp_path).take()


def test_a_folder_is_free_after_a_run_and_one_that_failed(tmp_path):
    for resume in (False, True):
        folder = RunFolder(tmp_path / "run", resume=resume)
        folder.restore({}, 9) if resume else folder.start({"output_dir": "run"})
        assert (tmp_path / "run" / LOCK).is_file()
        folder.save(1, Saved({"w": torch.zeros(1)}, {}), {}, keep=1)
        folder.close()
        assert not (tmp_path / "run" / LOCK).exists()
