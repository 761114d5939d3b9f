"""Runs of several machines in one file of results: merged, kept, refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from experiments import experiment, record
from experiments.experiment import SYSTEMS, command, run_missing, settings_of
from experiments.persona import EXPERIMENT
from opcd_fast.errors import InputError
from opcd_fast.evaluation.compare import parse_systems
from opcd_fast.training.settings import OPCDConfig

BASE = {"own_kl": 1.0, "fixed_kl": 4.0, "score": 0.0, "scores": [0.0, 0.0]}
SHOWN = {"score": 1.0, "scores": [1.0, 1.0]}
RAN = {"date": "2026-11-30T00:00:00+00:00", "device": "here", "torch": "2"}


def found(label, seed, own_kl=0.2, base=BASE):
    run = {
        "seed": seed, "context": "key", "own_kl": own_kl, "fixed_kl": 0.4, "score": 1.0, "scores": [1.0, 1.0],
        "general_kl": 2.0, "own_top1": 0.9, "length": 5.0, "drawn_answers": 640, "drawn_tokens": 9, "trained_tokens": 9,
        "seconds": 1.0,
    }  # fmt: skip
    baselines = {"key": {"base": {**base}, "base + context": {**SHOWN}}}
    return {"baselines": baselines, "systems": {label: {"runs": [run], "summary": {}}}}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What was asked of `opcd compare`, which answers at once; results and runs go to `tmp_path`."""
    made = []

    def compare(wanted):
        label = wanted.systems[0].partition("=")[0].partition(":")[0]
        made.append((label, wanted.run.seed))
        return found(label, wanted.run.seed)

    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiment, "compare", compare)
    monkeypatch.setattr(experiment, "where_it_ran", lambda: RAN)
    return made


def asked(*systems, seeds=1, **more):
    options = {"steps": None, "again": False, "device": "auto", "smoke": False, **more}
    return argparse.Namespace(systems=systems, seeds=seeds, **options)


def settings(**changes):
    return settings_of(command(replace(EXPERIMENT, **changes), "reverse", 0, "persona", 40))


def merged(kept, label="reverse", seed=0, commit="abc", **more):
    return record.merge(kept, found(label, seed, **more), settings(), label, SYSTEMS[label], {**RAN, "commit": commit})


def test_each_run_is_made_once_and_kept_with_where_it_was_made(calls, tmp_path):
    run_missing(EXPERIMENT, asked("reverse", "off-policy"))
    run_missing(EXPERIMENT, asked("reverse", "off-policy", seeds=2))
    assert calls == [("reverse", 0), ("off-policy", 0), ("reverse", 1), ("off-policy", 1)]
    kept = json.loads((tmp_path / "persona.json").read_text())
    assert [run["seed"] for run in kept["systems"]["off-policy"]["runs"]] == [0, 1]
    assert kept["systems"]["reverse"]["runs"][1]["made"]["device"] == "here"
    assert kept["systems"]["reverse"]["system"] == "opcd:divergence=reverse_kl"
    table = (tmp_path / "persona.md").read_text()
    assert (
        "| reverse | 2 | 80.0%" in table and "here, torch 2: reverse 0, reverse 1, off-policy 0, off-policy 1" in table
    )
    assert (tmp_path / "persona.png").is_file()
    run_missing(EXPERIMENT, asked("reverse", again=True))
    assert calls[4:] == [("reverse", 0)]


def test_a_run_keeps_the_commit_it_was_begun_with(calls, tmp_path, monkeypatch):
    def stopped(wanted):
        raise KeyboardInterrupt

    works = experiment.compare
    monkeypatch.setattr(experiment, "_commit", lambda: "first")
    monkeypatch.setattr(experiment, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_missing(EXPERIMENT, asked("reverse"))
    monkeypatch.setattr(experiment, "_commit", lambda: "second")
    monkeypatch.setattr(experiment, "compare", works)
    run_missing(EXPERIMENT, asked("reverse", "forward"))
    kept = record.read(tmp_path / "persona.json")["systems"]
    assert [kept[label]["runs"][0]["made"]["commit"] for label in ("reverse", "forward")] == ["first", "second"]


def test_what_another_process_saved_during_a_run_stays(calls, tmp_path, monkeypatch):
    works = experiment.compare

    def compare_beside_another(wanted):
        monkeypatch.setattr(experiment, "compare", works)
        run_missing(EXPERIMENT, asked("forward"))
        return works(wanted)

    monkeypatch.setattr(experiment, "compare", compare_beside_another)
    run_missing(EXPERIMENT, asked("reverse"))
    assert {*record.read(tmp_path / "persona.json")["systems"]} == {"reverse", "forward"}


def test_a_merge_replaces_the_run_of_the_same_seed_alone():
    kept = merged(merged(merged({}), seed=1), label="forward")
    kept = merged(kept, seed=1, commit="new", own_kl=0.1)
    runs = kept["systems"]["reverse"]["runs"]
    assert [(run["made"]["commit"], run["own_kl"]) for run in runs] == [("abc", 0.2), ("new", 0.1)]
    assert len(kept["systems"]["forward"]["runs"]) == 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_new_tokens": 25}, "max_new_tokens"), ({"temperature": 0.5}, "temperature"), ({"regex": "x"}, "regex"),
        ({"batch_size": 8}, "batch_size"), ({"answers_per_prompt": 2}, "answers_per_prompt"),
        ({"context": experiment.HERE / "made_up_money" / "turns.json"}, "context"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(change, name, tmp_path):
    kept = merged({})
    record.check(kept, settings(), "reverse", SYSTEMS["reverse"], tmp_path)
    with pytest.raises(InputError, match=rf"{name} = .* not mixed.*make all runs anew"):
        record.check(kept, settings(**change), "reverse", SYSTEMS["reverse"], tmp_path)


def test_other_numbers_of_steps_types_and_contents_are_refused(tmp_path):
    for change in ({"steps": 41}, {"dtype": "bfloat16"}):
        now = settings()
        now["run"] |= change
        with pytest.raises(InputError, match=next(iter(change))):
            record.check(merged({}), now, "reverse", SYSTEMS["reverse"], tmp_path)
    now = settings()
    now["contents"]["prompts"] = "other"
    with pytest.raises(InputError, match="contents.prompts"):
        record.check(merged({}), now, "reverse", SYSTEMS["reverse"], tmp_path)
    with pytest.raises(InputError, match="system reverse"):
        record.check(merged({}), settings(), "reverse", "opcd", tmp_path)


def test_a_setting_that_came_later_had_its_default(tmp_path):
    kept, now = merged({}), settings()
    del kept["settings"]["run"]["weight_decay"]
    record.check(kept, now, "reverse", SYSTEMS["reverse"], tmp_path)
    now["run"]["weight_decay"] = OPCDConfig().weight_decay * 2
    with pytest.raises(InputError, match="weight_decay"):
        record.check(kept, now, "reverse", SYSTEMS["reverse"], tmp_path)


def test_where_a_run_is_made_does_not_matter():
    here = command(EXPERIMENT, "reverse", 0, "persona", 40, device="cpu")
    there = command(EXPERIMENT, "forward", 2, "elsewhere", 40, device="cuda")
    assert settings_of(here) == settings_of(there)
    assert here.run.dtype == "float32"


def test_a_base_that_measures_differently_is_refused():
    kept = merged({})
    merged(kept, seed=1, base={**BASE, "own_kl": 1.05})
    with pytest.raises(InputError, match=r"own_kl is 1.2000 here and 1.0000"):
        merged(kept, seed=1, base={**BASE, "own_kl": 1.2})


def test_a_base_of_which_more_is_measured_takes_the_place_of_the_old_one():
    more = {**BASE, "own_kl": 1.05, "own_kls": [1.0, 1.1]}
    kept = merged(merged({}), seed=1, base=more)
    assert kept["baselines"]["key"]["base"] == more
    assert merged(kept, seed=2)["baselines"]["key"]["base"] == more


def test_differences_are_over_seeds_in_common():
    kept = merged(merged(merged(merged({}), seed=1, own_kl=0.4), label="forward", own_kl=0.1), seed=2, own_kl=0.4)
    summary = record.summary(kept)
    assert summary["differences"]["forward"]["own_gap_closed"]["mean"] == pytest.approx(0.1)
    assert summary["systems"]["reverse"]["summary"]["own_gap_closed"]["n"] == 3


@pytest.mark.parametrize("label", [label for label in SYSTEMS if label != "gated-begun"])  # whose setting is gone
def test_a_registered_system_is_one_of_compare_and_names_its_divergence(label):
    (system,) = parse_systems(command(EXPERIMENT, label, 0, "persona", 40).systems)
    assert system.label == label and system.config(OPCDConfig(), 0, "runs", resume=False)
    assert "divergence" in system.changes or system.changes["objective"] == "nll"


def test_more_abilities_of_a_run_and_of_the_arms(calls, tmp_path):
    asked_for = []

    def also(folder):
        asked_for.append(folder)
        if folder is None:
            return {"base": ability(0.1), "base + context": ability(0.9)}
        return ability(0.5 if folder == experiment.RUNS / "persona" / "reverse" / "seed-0" else 0)

    def ability(score):
        return {"F1": {"score": score, "scores": [score]}}

    run_missing(replace(EXPERIMENT, also=also), asked("reverse", "forward"))
    assert asked_for.count(None) == 1 and len(asked_for) == 3
    kept = record.read(tmp_path / "persona.json")
    assert kept["systems"]["reverse"]["runs"][0]["abilities"] == ability(0.5)
    (baseline,) = kept["baselines"].values()
    assert [baseline[arm]["abilities"] for arm in ("base", "base + context")] == [ability(0.1), ability(0.9)]
    assert "F1" in (tmp_path / "persona.md").read_text()
