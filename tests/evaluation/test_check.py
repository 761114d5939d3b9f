"""`opcd check` and `opcd diff`: every kind of change is seen and named, and noise is none; without torch."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from report_runs import CONTEXT, make_run, save_base

from opcd_fast.cli import main
from opcd_fast.data import read_context
from opcd_fast.errors import InputError
from opcd_fast.evaluation import check_run
from opcd_fast.evaluation.report import ReportOptions, measure, write_report
from opcd_fast.models import place_of
from opcd_fast.training.run import FileHashes, template_hash, template_in

pytestmark = pytest.mark.usefixtures("own_cache")


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
    path, cache, now = place / "base" / "model.safetensors", own_cache / "file-hashes.json", time.time
    right = FileHashes().of(path)
    assert not cache.exists()  # it was just written, and may be written again
    cache.write_text("{")  # damaged
    monkeypatch.setattr(time, "time", lambda: now() + 60)

    def kept():
        """Whether what the cache says of the file is believed."""
        found = FileHashes().of(path)
        cache.write_text(cache.read_text().replace(found, "0" * 64))
        believed = FileHashes().of(path) == "0" * 64
        cache.write_text(cache.read_text().replace("0" * 64, found))
        return believed

    assert kept() and FileHashes().of(path) == right
    for change in (lambda: os.utime(path), lambda: (change_weights(place), os.utime(path, (1e9, 1e9))),
                   lambda: (change_weights(place), os.utime(path, (1e9, 1e9)))):  # fmt: skip
        cache.write_text(cache.read_text().replace(FileHashes().of(path), "0" * 64))
        change()  # the last one sets time and size back: the status time cannot be
        assert FileHashes().of(path) != "0" * 64
    assert FileHashes().of(path) == right  # changed twice, back again
    cache.write_text(cache.read_text().replace(right, "0" * 64))
    assert FileHashes(again=True).of(path) == right


def test_large_files_of_the_hub_are_named_by_their_hash(tmp_path):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_text("weights")  # of another hash: it is not read
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert FileHashes().of(tmp_path / "model.safetensors") == name


def test_a_snapshot_of_the_hub_is_its_commit(place, tmp_path, monkeypatch):
    """A run on a hub id; then the hub's `main` has moved on this machine."""
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


# --- diff -----------------------------------------------------------------------------------------------------


@pytest.fixture
def diff(made, tmp_path, capsys):
    """Status and lines of `opcd diff` on the run and a copy whose card and record were changed."""

    def run(change):
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            shutil.copytree(made[1], folder)
            card, record = copy.deepcopy(made[2]), json.loads((folder / "run.json").read_text())
            if folder == folders[1]:
                change(card, record)
            (folder / "run.json").write_text(json.dumps(record))
            write_report(folder, card, CONTEXT)
        status = main(["diff", *map(str, folders)])
        return status, capsys.readouterr().out

    return run


def test_what_changes_no_result_is_no_difference(diff):
    def change(card, record):
        card["settings"].update(device="elsewhere", output_dir="elsewhere", prefix_dtype=None)
        card["seconds"] = 1e6

    status, out = diff(change)
    assert status == 0 and "alike" in out


def test_settings_hashes_and_the_context_are_compared(diff):
    def change(card, record):
        card["settings"].update(learning_rate=0.5, new_setting=1, prefix_dtype="float8_e4m3fn")
        card["hashes"]["context_sha256"] = "0"
        card["hashes"]["base"]["files"]["model.safetensors"]["sha256"] = "0"
        record["context"] = "always answer with yyy"

    status, out = diff(change)
    assert status == 1
    for line in (
        "setting  learning_rate: 0.01 -> 0.5", "setting  new_setting: None -> 1", "hash     context: differs",
        "prefix_dtype: None -> 'float8_e4m3fn'", "hash     base: model.safetensors has other content",
        "context  -always answer with zzz", "context  +always answer with yyy",
    ):  # fmt: skip
        assert line in out


@pytest.mark.parametrize(("more", "status"), [(0.01, 0), (50, 1)])
def test_only_differences_beyond_noise_count(diff, more, status):
    def change(card, record):
        after = card["kl"]["own"]["after"]
        value = after["value"] + more
        after.update(value=value, low=value - 5, high=value + 5)

    found, out = diff(change)
    (line,) = (line for line in out.splitlines() if "KL, student's own answers" in line)
    assert found == status and line.endswith("differs" if status else "within noise")


def test_other_ways_of_measuring_are_said(diff):
    def change(card, record):
        card["measured_with"]["temperature"] = 0.5
        card["forgetting"] = None
        card["hashes"]["held_out_sha256"] = "0"

    _, out = diff(change)
    assert "temperature (1.0 and 0.5)" in out and "different held-out" in out
    assert "only: KL to base + context, unrelated prompts, KL to the base, unrelated prompts" in out


def test_a_run_without_a_card(made, capsys):
    assert main(["diff", str(made[1]), str(made[1])]) == 2
    assert "opcd report" in capsys.readouterr().err
