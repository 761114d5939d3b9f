"""`opcd diff`: settings, hashes, texts, and scores that differ by more than noise."""

import copy
import json
import shutil

import pytest
from report_runs import CONTEXT, make_run, save_base

from opcd_fast.cli import main
from opcd_fast.evaluation.report import ReportOptions, measure, write_report


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    run = make_run(save_base(root / "base"), root / "run", steps=2, eval_every=2)
    return run, measure(run, ReportOptions())


@pytest.fixture
def diff(made, tmp_path, capsys):
    """Status and lines of `opcd diff` on the run and a copy whose card and record were changed."""

    def run(change):
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            shutil.copytree(made[0], folder)
            card, record = copy.deepcopy(made[1]), json.loads((folder / "run.json").read_text())
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
    assert "temperature (1.0 and 0.5)" in out and "only: KL to the base" in out and "different held-out" in out


def test_a_run_without_a_card(made, capsys):
    assert main(["diff", str(made[0]), str(made[0])]) == 2
    assert "opcd report" in capsys.readouterr().err
