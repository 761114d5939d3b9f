"""Settings of earlier versions: refused where somebody asks for them, ignored where an older run had their default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import CONTEXT, make_run, save_base

from opcd_fast.cli import main
from opcd_fast.errors import InputError
from opcd_fast.evaluation.compare import parse_systems
from opcd_fast.training.run import list_checkpoints, run_settings
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.settings.gone import SETTINGS, VALUES

# config.json of a run with all defaults, as an earlier version wrote it.
OLDER = json.loads((Path(__file__).parent / "older_run_config.json").read_text())
GONE = [
    ("prefix_store", "somewhere", "drop it"),
    ("prefix_dtype", "float8_e4m3fn", "prefix_device"),
    ("teacher_path", "mask", "'pad'"),
    ("rollout", "continuous", "'transformers'"),
]


def test_the_table_is_what_is_gone():
    now = set(OPCDConfig.__dataclass_fields__)
    assert {name: OLDER[name] for name in OLDER.keys() - now} == {name: value for name, (value, _) in SETTINGS.items()}
    assert {name for name, _ in VALUES} <= now
    assert [(name, value) for name, value, _ in GONE if name in now] == list(VALUES)


@pytest.mark.parametrize(("name", "value", "remedy"), GONE)
@pytest.mark.parametrize("way", ["python", "file", "option", "system"])
def test_asking_for_it_says_what_to_use(name, value, remedy, way, tmp_path, capsys):
    if way in ("python", "system"):
        with pytest.raises(InputError) as told:
            if way == "python":
                OPCDConfig(lora_rank=4, **{name: value})
            else:
                parse_systems([f"a=opcd:{name}={value}"])
        said = str(told.value)
    else:
        option = ["--" + name.replace("_", "-"), value]
        if way == "file":
            (tmp_path / "run.yaml").write_text(f"{name.replace('_', '-')}: {value}\n")
            option = ["--config", str(tmp_path / "run.yaml")]
        required = ["--model", "x", "--context", "x", "--prompts", "x"]
        assert main(["train", *required, *option]) == 2
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1
    assert name in said and remedy in said


# --- folders of older runs ----------------------------------------------------------------------------------


def age(folder, **settings):
    """Make the run in `folder` one of an earlier version that had `settings`."""
    path = folder / "config.json"
    path.write_text(json.dumps({**OLDER, **json.loads(path.read_text()), **settings}))
    state = list_checkpoints(folder / "checkpoints")[-1] / "state.json"
    kept = json.loads(state.read_text())
    kept["identity"] |= {"prefix_dtype": None, **settings}
    kept["identity"].pop("prefix_store", None)  # it was free on resume
    state.write_text(json.dumps(kept))


@pytest.fixture
def older(tmp_path):
    """A base and a run of it, not yet old."""
    return save_base(tmp_path / "base"), make_run(tmp_path / "base", tmp_path / "run", steps=2, eval_every=2)


def test_an_older_run_goes_on_and_is_reported(older, capsys):
    base, run = older
    age(run)
    make_run(base, run, steps=3, eval_every=2, resume=True)
    age(run)
    assert main(["report", str(run), "--max-prompts", "2"]) == 0
    settings = json.loads((run / "opcd_card.json").read_text())["settings"]
    assert not SETTINGS.keys() & settings.keys() and settings["lora_rank"] == 4
    (base / "context.txt").write_text(CONTEXT)
    assert main(["check", str(run), "--context", str(base / "context.txt")]) == 0


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in GONE])
def test_an_older_run_that_used_it_is_refused(older, name, value, capsys):
    base, run = older
    age(run, **{name: value})
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match=f"{name}='{value}', which does not exist any more"):
        make_run(base, run, steps=3, eval_every=2, resume=True)
    assert (run / "config.json").read_bytes() == before
    with pytest.raises(InputError, match=f"{name}='{value}', which does not exist any more; take it out"):
        run_settings(run)
    assert main(["report", str(run)]) == 2
    assert name in capsys.readouterr().err


def test_taking_it_out_of_the_file_does_not_change_what_a_run_began_with(older):
    base, run = older
    without = (run / "config.json").read_text()
    age(run, prefix_dtype="float8_e4m3fn")
    (run / "config.json").write_text(without)
    with pytest.raises(InputError, match="prefix_dtype='float8_e4m3fn'.*another output_dir"):
        make_run(base, run, steps=3, eval_every=2, resume=True)
