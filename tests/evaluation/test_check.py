"""`opcd check`: every kind of change is seen and named, without torch."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from report_runs import CONTEXT, make_run, save_base

from opcd_fast.cli import main
from opcd_fast.data import read_context
from opcd_fast.errors import InputError
from opcd_fast.evaluation import check_run
from opcd_fast.evaluation.report import ReportOptions, measure, write_report
from opcd_fast.training.run import FileHashes, provenance, template_hash, template_in


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPCD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base")
    run = make_run(base, root / "run", steps=2, eval_every=2)
    return base, run, measure(run, ReportOptions())


@pytest.fixture
def place(made, tmp_path):
    """Base and run at a place of their own, and the context's file."""
    base, run, _ = made
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for part in ("base", "tokenizer"):
        assert record[part]["name"] == str(base)
        record[part]["name"] = str(tmp_path / "base")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "context.txt").write_text(CONTEXT)
    return tmp_path


def changed(place, **options):
    context = read_context(place / "context.txt")
    return {f.part for f in check_run(place / "run", context, **options) if f.state == "changed"}


def rewrite(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def change_weights(place):
    path = place / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES = {
    "context": lambda place: rewrite(place / "context.txt", b"zzz", b"zzz."),
    "chat template": lambda place: rewrite(place / "base" / "chat_template.jinja", b"<|end|>", b"<|end|> "),
    "tokenizer": lambda place: rewrite(place / "base" / "tokenizer.json", b"ByteLevel", b"Bytelevel"),
    "base": change_weights,
}


@pytest.mark.parametrize("part", CHANGES)
def test_one_change_is_found_and_named_with_a_remedy(place, part, capsys):
    arguments = ["check", str(place / "run"), "--context", str(place / "context.txt")]
    assert main(arguments) == 0 and "changed" not in capsys.readouterr().out
    CHANGES[part](place)
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    (found,) = (index for index, line in enumerate(lines) if "changed" in line)
    assert lines[found].startswith(part) and lines[found + 1].strip().startswith("->")


def test_what_cannot_be_told_is_status_2(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for arguments, words in (
        (["nowhere", "--context", "context.txt"], "not a folder"),
        (["base", "--context", "context.txt"], "opcd report"),
        (["run", "--context", "nothing.txt"], "nothing.txt"),
        (["run", "--context", "context.txt", "--model", "no/such/folder"], "--model"),
    ):
        assert main(["check", *arguments]) == 2
        assert words in capsys.readouterr().err
    record = json.loads((place / "run" / "run.json").read_text())
    record["base"] = {"name": None, "commit": None, "files": {}, "fingerprint": "x"}
    (place / "run" / "run.json").write_text(json.dumps(record))
    assert main(["check", "run", "--context", "context.txt"]) == 2
    assert "unknown" in capsys.readouterr().out


def test_hashes_are_kept_by_size_and_times(place, own_cache, monkeypatch):
    path, count = place / "base" / "model.safetensors", []
    FileHashes().of(path)
    assert not (own_cache / "file-hashes.json").exists()  # it was just written, and may be written again
    (own_cache / "file-hashes.json").write_text("{")  # damaged
    monkeypatch.setattr(provenance, "RACY_SECONDS", -1)
    monkeypatch.setattr(provenance, "_digest", lambda file: count.append(file) or f"{len(count):064d}")
    assert FileHashes().of(path) == FileHashes().of(path) and len(count) == 1
    for number, change in enumerate((
        lambda: os.utime(path), lambda: (change_weights(place), os.utime(path, (1e9, 1e9))),
        lambda: (change_weights(place), os.utime(path, (1e9, 1e9))),  # the status time cannot be set back
    )):  # fmt: skip
        change()
        FileHashes().of(path)
        assert len(count) == 2 + number
    FileHashes(again=True).of(path)
    assert len(count) == 5


def test_large_files_of_the_hub_are_named_by_their_hash(tmp_path, monkeypatch):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_text("weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    monkeypatch.setattr(provenance, "_digest", lambda file: pytest.fail("read"))
    assert FileHashes().of(tmp_path / "model.safetensors") == name


def test_a_snapshot_of_the_hub_is_its_commit(place, tmp_path, monkeypatch):
    """A run on a hub id; then the hub's `main` has moved on this machine."""
    from opcd_fast.models import place_of

    cache = tmp_path / "hub" / "models--org--model"
    for commit in ("c1", "c2"):
        shutil.copytree(place / "base", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert place_of("org/model").commit == "c1"
    assert changed(place, model="org/model") == set()
    (cache / "refs" / "main").write_text("c2")
    (cache / "snapshots" / "c2" / "model.safetensors").write_bytes(b"other")
    assert changed(place, model="org/model") == {"base"}


def test_a_card_of_other_weights_is_stale(place, made):
    write_report(place / "run", made[2], CONTEXT)
    assert changed(place) == set()
    path = place / "run" / "final" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert changed(place) == {"weights"}


def test_the_published_folder_alone_can_be_checked(place, made):
    write_report(place / "run", made[2], CONTEXT)
    (place / "run" / "final").rename(place / "published")
    shutil.rmtree(place / "run")
    findings = check_run(place / "published", CONTEXT, model=str(place / "base"))
    assert {finding.state for finding in findings} == {"same"} and len(findings) == 5
    with pytest.raises(InputError, match="--model"):
        check_run(place / "published", CONTEXT)


def test_templates_are_found_where_each_version_keeps_them(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            path = tmp_path / name / {"config": "tokenizer_config.json", "single": "chat_template.jinja"}[file]
            path.write_text(text)
        return template_hash(template_in(tmp_path / name))

    new = folder("new", single="T", config="{}")
    assert new == folder("old", config='{"chat_template": "T"}') == template_hash("T") is not None
    assert folder("none", config="{}") is None
    assert folder("many", config='{"chat_template": [{"name": "default", "template": "T"}]}') != new


def test_check_and_diff_do_not_import_torch(place, made):
    write_report(place / "run", made[2], CONTEXT)
    code = (
        "import sys; from opcd_fast.cli import main; status = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'numpy', 'jinja2', 'matplotlib'} & set(sys.modules), 'imported'\n"
        "sys.exit(status)"
    )
    run = str(place / "run")
    for arguments in (["check", run, "--context", str(place / "context.txt")], ["diff", run, run]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
