"""`opcd check` and `opcd diff`: every kind of change is seen and named, quickly and without torch."""

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
from opcd_fast.errors import InputError
from opcd_fast.evaluation import check_run as check
from opcd_fast.evaluation.diff import compare_runs as compare
from opcd_fast.evaluation.report import ReportOptions, measure, write_report
from opcd_fast.training.run import provenance
from opcd_fast.training.run.provenance import FileHashes, template_hash, template_in
from opcd_fast.training.run.record import read_record


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


def changed(place, context=CONTEXT, **options):
    return {f.part for f in check(place / "run", context, **options) if f.state == "changed"}


def test_nothing_changed(place, capsys):
    assert {finding.state for finding in check(place / "run", CONTEXT)} == {"same"}
    assert main(["check", str(place / "run"), "--context", str(place / "context.txt")]) == 0
    assert "same" in capsys.readouterr().out


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_weights(place):
    path = place / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES = {
    "context": lambda place: (place / "context.txt").write_text(CONTEXT + "."),
    "chat template": lambda place: rewrite(place / "base" / "chat_template.jinja", "<|end|>", "<|end|> "),
    "tokenizer": lambda place: rewrite(place / "base" / "tokenizer.json", "ByteLevel", "Bytelevel"),
    "base": change_weights,
}  # fmt: skip


@pytest.mark.parametrize("part", CHANGES)
def test_one_change_is_found_and_named_with_a_remedy(place, part, capsys):
    CHANGES[part](place)
    assert main(["check", str(place / "run"), "--context", str(place / "context.txt")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len("chat template")].strip() for line in lines if "changed" in line] == [part]
    assert lines[[i for i, line in enumerate(lines) if "changed" in line][0] + 1].strip().startswith("->")


def test_a_change_that_keeps_size_and_time_is_seen(place):
    """Somebody sets the modification time back; the status time cannot be set."""
    path = place / "base" / "model.safetensors"
    os.utime(path, (1e9, 1e9))
    hashes = FileHashes()
    before = hashes.of(path)
    change_weights(place)
    os.utime(path, (1e9, 1e9))
    assert FileHashes().of(path) != before
    assert changed(place) == {"base"}


def test_hashes_are_kept_by_size_and_times(place, monkeypatch):
    path, count = place / "base" / "model.safetensors", []
    monkeypatch.setattr(provenance, "RACY_SECONDS", -1)
    monkeypatch.setattr(provenance, "_digest", lambda file: count.append(file) or f"{len(count):064d}")
    assert FileHashes().of(path) == FileHashes().of(path)
    assert len(count) == 1
    os.utime(path)
    FileHashes().of(path)
    assert len(count) == 2
    FileHashes(again=True).of(path)
    assert len(count) == 3
    path.write_bytes(b"shorter")
    FileHashes().of(path)
    assert len(count) == 4


def test_a_file_that_was_just_written_is_not_kept(tmp_path, own_cache):
    (tmp_path / "a").write_text("a")
    FileHashes().of(tmp_path / "a")
    assert not (own_cache / "file-hashes.json").exists()


def test_a_damaged_cache_is_no_cache(tmp_path, own_cache):
    (own_cache / "file-hashes.json").write_text("{")
    (tmp_path / "a").write_text("a")
    assert FileHashes().of(tmp_path / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def test_large_files_of_the_hub_are_named_by_their_hash(tmp_path, monkeypatch):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_text("weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    monkeypatch.setattr(provenance, "_digest", lambda file: pytest.fail("read"))
    assert FileHashes().of(tmp_path / "model.safetensors") == name


def test_a_snapshot_of_the_hub_is_its_commit(place, tmp_path, monkeypatch):
    """A run on a hub id; then the hub's `main` has moved on this machine."""
    from opcd_fast.models.names import place_of

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


def test_a_model_in_memory_cannot_be_checked_and_says_so(place, capsys):
    record = json.loads((place / "run" / "run.json").read_text())
    record["base"] = {"name": None, "commit": None, "files": {}, "fingerprint": "x"}
    (place / "run" / "run.json").write_text(json.dumps(record))
    assert main(["check", str(place / "run"), "--context", str(place / "context.txt")]) == 2
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--context", "context.txt"], "not a folder"),
        (["base", "--context", "context.txt"], "opcd report"),
        (["run", "--context", "nothing.txt"], "nothing.txt"),
        (["run", "--context", "context.txt", "--model", "no/such/folder"], "--model"),
        (["run"], "context"),
    ],
)
def test_usage_errors_are_status_2(place, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["check", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_check_and_diff_do_not_import_torch_and_are_quick(place, made):
    write_report(place / "run", made[2], CONTEXT)
    code = (
        "import sys, time; start = time.perf_counter(); from opcd_fast.cli import main\n"
        "status = main(sys.argv[1:]); took = time.perf_counter() - start\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'imported'\n"
        "print('TOOK', time.process_time(), file=sys.stderr); sys.exit(status)"
    )
    run = str(place / "run")
    for arguments in (["check", run, "--context", str(place / "context.txt")], ["diff", run, run]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(done.stderr.split("TOOK")[1]) < 1  # of processor time: other programs do not count


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
    findings = check(place / "published", CONTEXT, model=str(place / "base"))
    assert {finding.state for finding in findings} == {"same"} and len(findings) == 5
    with pytest.raises(InputError, match="--model"):
        check(place / "published", CONTEXT)


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


def test_the_record_keeps_what_a_report_needs(made):
    base, run, _ = made
    record = read_record(run)
    assert record["context"] == CONTEXT
    assert record["base"]["name"] == str(base)
    assert "model.safetensors" in record["base"]["files"] and "tokenizer.json" in record["tokenizer"]["files"]
    with pytest.raises(InputError, match=f"did you mean '{run}'"):
        read_record(run.parent)


# ------------------------------------------------------------------------------------------------ diff


def two(tmp_path, made, change):
    """The run twice, the second with its card and record changed."""
    _, run, card = made
    paths = []
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name)
        mine, record = copy.deepcopy(card), json.loads((run / "run.json").read_text())
        if name == "b":
            change(mine, record)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        write_report(tmp_path / name, mine, CONTEXT)
        paths.append(tmp_path / name)
    return paths


def estimate(value, half):
    return {"value": value, "low": value - half, "high": value + half, "n": 9, "interval": "bootstrap"}


def test_alike(tmp_path, made, capsys):
    def change(card, record):
        card["settings"]["device"] = "elsewhere"
        card["seconds"] = 1e6

    a, b = two(tmp_path, made, change)
    assert main(["diff", str(a), str(b)]) == 0
    assert "alike" in capsys.readouterr().out


def test_settings_hashes_and_the_context_are_compared(tmp_path, made, capsys):
    def change(card, record):
        card["settings"]["learning_rate"] = 0.5
        card["settings"]["new_setting"] = 1
        card["hashes"]["context_sha256"] = "0"
        card["hashes"]["base"]["files"]["model.safetensors"]["sha256"] = "0"
        record["context"] = "always answer with yyy"

    a, b = two(tmp_path, made, change)
    assert main(["diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    for line in (
        "setting  learning_rate: 0.01 -> 0.5", "setting  new_setting: None -> 1", "hash     context: differs",
        "hash     base: model.safetensors has other content", "context  -always answer with zzz",
        "context  +always answer with yyy",
    ):  # fmt: skip
        assert line in out


@pytest.mark.parametrize(("value", "status"), [(None, 0), ("float8_e4m3fn", 1)])
def test_a_setting_that_is_gone_differs_where_an_older_run_used_it(tmp_path, made, capsys, value, status):
    def change(card, record):
        card["settings"]["prefix_dtype"] = value

    a, b = two(tmp_path, made, change)
    assert main(["diff", str(a), str(b)]) == status
    assert ("prefix_dtype: None -> 'float8_e4m3fn'" in capsys.readouterr().out) == bool(status)


def test_only_differences_beyond_noise_count(tmp_path, made, capsys):
    def change(card, record):
        card["kl"]["own"]["after"].update(estimate(card["kl"]["own"]["after"]["value"] + 0.01, 5.0))

    a, b = two(tmp_path, made, change)
    assert main(["diff", str(a), str(b)]) == 0
    assert "within noise" in capsys.readouterr().out

    def larger(card, record):
        card["kl"]["own"]["after"].update(estimate(card["kl"]["own"]["after"]["value"] + 50, 5.0))

    a, b = two(tmp_path / "more", made, larger)
    assert main(["diff", str(a), str(b)]) == 1
    assert "KL, student's own answers" in [s.name for s in compare(a, b).scores if s.beyond_noise]


def test_other_ways_of_measuring_are_said(tmp_path, made):
    def change(card, record):
        card["measured_with"]["temperature"] = 0.5
        card["forgetting"] = None
        card["hashes"]["held_out_sha256"] = "0"

    notes = " ".join(compare(*two(tmp_path, made, change)).notes)
    assert "temperature (1.0 and 0.5)" in notes and "KL to the base" in notes and "held-out" in notes


def test_a_run_without_a_card(place, capsys):
    assert main(["diff", str(place / "run"), str(place / "run")]) == 2
    assert "opcd report" in capsys.readouterr().err


def test_checking_again_is_quick_when_files_are_large(place, monkeypatch):
    monkeypatch.setattr(provenance, "RACY_SECONDS", -1)
    with open(place / "base" / "model.safetensors", "ab") as file:
        file.truncate(2 << 30)  # a file with a hole
    check(place / "run", CONTEXT)
    start = time.process_time()
    assert changed(place) == {"base"}
    assert time.process_time() - start < 0.5
