"""What a run's folder holds is what was written, or resuming says in one line which file is not, and loses nothing."""

import json
import os
import random
import shutil
import subprocess

import pytest
from tiny import tiny_tokenizer
from training_runs import lines_of, losses, make

from opcd_fast.errors import InputError
from opcd_fast.training.run import checkpoints as checkpoint


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


SETTINGS = {"steps": 4, "teacher_mode": "ema", "teacher_ema_decay": 0.9}


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """Two runs of four steps, with a checkpoint after two and four, that differ in nothing but time; and one of another
    seed."""
    root = tmp_path_factory.mktemp("made")
    for name, seed in (("run", 0), ("twin", 0), ("other", 1)):
        make(tokenizer, root / name, seed=seed, **SETTINGS).train()
    return root


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resumed(tokenizer, folder, **settings):
    return make(tokenizer, folder, resume=True, **{**SETTINGS, "steps": 6, **settings}).train()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(tokenizer, folder):
    """What resuming says, which changes no file."""
    before = contents(folder)
    with pytest.raises(InputError) as error:
        resumed(tokenizer, folder)
    assert contents(folder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def flipped(data, rng):
    data = bytearray(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


DAMAGES = {
    "bit": flipped,
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "longer": lambda data, _: data + b" ",
}
FILES = ["trainable.safetensors", "teacher.safetensors", "optimizer.pt", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_offered(place, tokenizer, name, kind):
    run, rng = place / "run", random.Random(f"{name} {kind}")
    file = run / "checkpoints" / "step-000004" / name
    whole = file.read_bytes()
    for _ in range(3):
        file.write_bytes(DAMAGES[kind](whole, rng))
        if name == "manifest.json" and kind == "longer":  # a space more means the same
            return
        said = refusal(tokenizer, run)
        assert str(file) in said and "step-000002 is whole" in said
    command = said.split("`")[1]
    subprocess.run(command, shell=True, check=True)
    assert losses(resumed(tokenizer, run)) == losses(resumed(tokenizer, place / "twin"))
    assert (run / "checkpoints" / "damaged-step-000004" / name).exists()


def test_files_of_other_checkpoints_are_not_taken(place, tokenizer):
    run = place / "run"
    newest = run / "checkpoints" / "step-000004"

    def swapped(source, names):
        for name in names:
            kept = (newest / name).read_bytes()
            shutil.copy(source / name, newest / name)
            assert str(newest / name) in refusal(tokenizer, run)
            (newest / name).write_bytes(kept)

    swapped(run / "checkpoints" / "step-000002", FILES[:4])
    swapped(place / "other" / "checkpoints" / "step-000004", FILES[:4])
    (newest / "more.safetensors").write_bytes(b"x")
    assert "more.safetensors" in refusal(tokenizer, run)
    (newest / "more.safetensors").unlink()
    for source in (run / "checkpoints" / "step-000002", place / "twin" / "checkpoints" / "step-000004",
                   place / "other" / "checkpoints" / "step-000004"):  # fmt: skip
        shutil.move(newest, place / "kept")
        shutil.copytree(source, newest)  # manifest and all
        said = refusal(tokenizer, run)
        assert ("holds the checkpoint of another step" in said) == (source.name != newest.name)
        shutil.rmtree(newest)
        shutil.move(place / "kept", newest)
    assert len(losses(resumed(tokenizer, run))) == 6


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval_fixed.json"])
def test_the_files_beside_are_checked_too(place, tokenizer, name):
    file, rng = place / "run" / name, random.Random(name)
    whole = file.read_bytes()
    for damage in (DAMAGES["bit"], DAMAGES["cut"]):
        for _ in range(4):
            file.write_bytes(damage(whole, rng))
            assert str(file) in refusal(tokenizer, place / "run")
    file.unlink()
    assert str(file) in refusal(tokenizer, place / "run")
    file.write_bytes(whole)
    assert len(losses(resumed(tokenizer, place / "run"))) == 6


def test_a_line_damaged_after_the_checkpoint_before_costs_its_steps_only(place, tokenizer):
    file = place / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1].replace("own_kl", "\x00"))
    said = refusal(tokenizer, place / "run")
    assert str(file) in said and "step-000002 is whole" in said
    subprocess.run(said.split("`")[1], shell=True, check=True)
    resumed(tokenizer, place / "run"), resumed(tokenizer, place / "twin")
    assert lines_of(place / "run") == lines_of(place / "twin")


def test_without_a_whole_checkpoint_the_way_out_is_said(place, tokenizer, caplog):
    root = place / "run" / "checkpoints"
    for path in root.iterdir():
        (path / "state.json").write_bytes((path / "state.json").read_bytes() + b"\n")
    said = refusal(tokenizer, place / "run")
    assert "no other checkpoint" in said and str(root / "step-000004" / "manifest.json") in said
    (root / "step-000004" / "manifest.json").unlink()
    resumed(tokenizer, place / "run"), resumed(tokenizer, place / "twin")
    assert [r for r in caplog.records if "cannot be checked" in r.message and "step-000004" in r.message]
    assert lines_of(place / "run") == lines_of(place / "twin")


def test_a_checkpoint_of_an_earlier_version_is_taken_and_its_damage_named(place, tokenizer, caplog):
    run = place / "run"
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    newest = run / "checkpoints" / "step-000004"
    for name, content in (("state.json", b"[]"), ("state.json", b'{"step": "x", "identity": {}}'),
                          ("optimizer.pt", b""),
                          ("trainable.safetensors", b"x" * 99), ("teacher.safetensors", b"")):  # fmt: skip
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(content)
        said = refusal(tokenizer, run)
        assert str(newest / name) in said and "step-000002" in said
        (newest / name).write_bytes(whole)
    whole = (run / "metrics.jsonl").read_text()
    for line in ("[]", "7", "{}", '{"kind": "step", "step": "1"}', '{"kind": "step", "step": 1, "loss": "x"}', '{"ki'):
        (run / "metrics.jsonl").write_text(f"{line}\n{whole}")
        assert str(run / "metrics.jsonl") in refusal(tokenizer, run)
    (run / "metrics.jsonl").write_text(whole + '{"kind": "st')  # what a killed run may leave
    for content in ("", "[1]", "{}", '[{"prompt": 1}]'):
        kept = (run / "eval_fixed.json").read_text()
        (run / "eval_fixed.json").write_text(content)
        with pytest.raises(InputError, match="eval_fixed.json"):
            resumed(tokenizer, run)
        (run / "eval_fixed.json").write_text(kept)
    assert losses(resumed(tokenizer, run)) == losses(resumed(tokenizer, place / "twin"))


def test_a_full_disk_at_any_write_keeps_the_last_checkpoint(place, tokenizer):
    """A file system with room for the run, and for less and less more; then with room again."""
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        shutil.copytree(place / "run", disk / "run")
        free, ended = shutil.disk_usage(disk).free, set()
        for room in (4096, 16384, 45056, 90112, 143360):
            (disk / "filler").write_bytes(b"x" * (free - room))
            with pytest.raises(InputError, match="cannot write|[Nn]o space left") as error:
                resumed(tokenizer, disk / "run", plots=True)
            ended.add(str(error.value).split(" (")[0])
            newest = checkpoint.list_checkpoints(disk / "run" / "checkpoints")[-1]
            assert newest.name == "step-000004" and checkpoint.check_whole(newest) and len(list(newest.iterdir())) == 5
            assert not list((disk / "run").rglob("*.opcd-new")) and not (disk / "run" / "run.lock").exists()
            (disk / "filler").unlink()
        assert len(ended) > 1, ended
        assert losses(resumed(tokenizer, disk / "run")) == losses(resumed(tokenizer, place / "twin"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # weights are mapped still


def test_a_run_obeys_the_umask(tokenizer, tmp_path):
    before = os.umask(0o027)
    try:
        make(tokenizer, tmp_path / "run", steps=2, plots=True, save_best=True).train()
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        wanted = 0o750 if path.is_dir() else 0o640
        assert path.stat().st_mode & 0o777 == wanted, (path, oct(path.stat().st_mode))


def test_the_manifest_says_what_the_checkpoint_is(made):
    path = made / "other" / "checkpoints" / "step-000002"
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 2 and manifest["seed"] == 1
    assert set(manifest["files"]) == set(FILES[:4]) and set(manifest["run"]) == {"metrics.jsonl", "eval_fixed.json"}
    assert all(file["size"] > 0 and len(file["sha256"]) == 64 for file in manifest["files"].values())
